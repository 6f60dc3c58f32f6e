"""The sentences that problems.py tells its stories in: three sets of surface forms of the same kinds of story.

`CLASSIC` are few and the first that the model learnt. `WIDE` are at least thirty a kind, counting an opening with a
question, and are trained on. `HELD_OUT` are never met in training: they are made of the words of the other two, in
sentences of their own. A problem of the test that is told in them asks whether the model reads or remembers.

Slots: {name}, {they}, {them}, {their} (who the story is of), {other} (somebody else), {thing}, {box}, {one_box}
(its plural and singular), {link} ("Then "), {who} ({they} or {name}), numbers
{x}, {y}, {n}.
"""

from dataclasses import dataclass

HE = ("Tom", "Ben", "Max", "Leo", "Sam", "Paul", "Omar", "Ivan", "Hugo", "Dan", "Raj", "Jack")
SHE = ("Ann", "Eva", "Mia", "Zoe", "Lily", "Sara", "Nina", "Rosa", "Emma", "Kim", "Ruth", "Jane")
MORE_HE = ("John", "Bob", "Peter", "Mark", "Tim", "Alex", "Luis", "Adam", "Noah", "Ali", "David", "James")
MORE_SHE = ("Mary", "Anna", "Lisa", "Maria", "Sofia", "Alice", "Clara", "Ella", "Maya", "Olga", "Grace", "Julia")
THINGS = (
    "apples", "pens", "books", "cards", "eggs", "shells", "marbles", "stamps",
    "cookies", "pears", "stickers", "nuts", "beads", "plums", "balls", "stones",
    "lemons", "flowers", "coins", "candles", "tickets", "buttons", "ropes", "cups",
)  # fmt: skip
MORE_THINGS = (
    "oranges", "pencils", "toys", "sweets", "bananas", "roses", "keys", "hats",
    "plates", "photos", "cakes", "crayons", "muffins", "cherries", "peaches", "candies",
)  # fmt: skip
BOXES = ("bags", "boxes", "jars", "baskets", "packs")
MORE_BOXES = ("bins", "trays", "drawers", "bowls", "crates")
ONE_BOX = {box: box.removesuffix("es") if box == "boxes" else box.removesuffix("s") for box in BOXES + MORE_BOXES}
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
UNITS = ("coins", "dollars")
ITEMS = ("book", "pen", "cup", "card", "ball", "toy", "hat", "cake", "candle", "pencil")


@dataclass(frozen=True)
class Wording:
    """The sentences of one set of forms, by what they say; each is a choice of equals.

    relations: how two people compare, by operation of the working; a {n} that a form does not name is 2 (twice, half).
    left: questions that suit a story whose last event is a loss. all_of: questions after a product or a sum.
    """

    he: tuple[str, ...]
    she: tuple[str, ...]
    things: tuple[str, ...]
    boxes: tuple[str, ...]
    units: tuple[str, ...]
    items: tuple[str, ...]
    links: tuple[str, ...]
    openings: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    questions: tuple[str, ...]
    left: tuple[str, ...]
    all_of: tuple[str, ...]
    boxes_openings: tuple[str, ...]
    colours_openings: tuple[str, ...]
    relations: dict[str, tuple[str, ...]]
    other_questions: tuple[str, ...]
    together: tuple[str, ...]
    together_left: tuple[str, ...]
    together_gains: tuple[str, ...]
    together_losses: tuple[str, ...]
    others_have: tuple[str, ...]
    differences: tuple[str, ...]
    purchases: tuple[str, ...]
    purchases_more: tuple[str, ...]
    payments: tuple[str, ...]
    costs: tuple[str, ...]
    change_back: tuple[str, ...]
    shares: tuple[str, ...]


def _fill(patterns, words):
    """Every pattern with every word in the place of its "@"."""
    return tuple(pattern.replace("@", word) for pattern in patterns for word in words)


_OPEN = ("has", "owns", "starts with", "brings", "collects")
CLASSIC = Wording(
    he=HE,
    she=SHE,
    things=THINGS,
    boxes=BOXES,
    units=("coins",),
    items=("book",),
    links=("", "", "Then ", "Later ", "After that ", "Next "),
    openings=_fill(["{name} @ {x} {thing}."], _OPEN),
    gains=(
        *_fill(["{link}{they} @ {n} more."], ("buys", "finds")), "{link}{they} gets {n} more from {other}.",
        *_fill(["{link}{they} @ {n} more."], ("wins", "makes")), "{link}{they} adds {n}.",
    ),
    losses=(
        "{link}{they} gives {n} to {other}.", *_fill(["{link}{they} @ {n}."], ("loses", "sells", "uses", "drops")),
        "{link}{they} hands {other} {n}.",
    ),
    questions=(
        "How many {thing} does {name} have now?", "How many {thing} does {they} have now?",
        "How many {thing} does {name} have in the end?", "How many {thing} does {they} have?",
    ),
    left=("How many {thing} are left?", "How many {thing} does {they} have left?"),
    all_of=(),
    boxes_openings=_fill(["{name} @ {y} {thing} each."], ("has {x} {box} with", "buys {x} {box} of",
                                                          "fills {x} {box} with")),
    colours_openings=_fill(["{name} @ {x} {one} {thing} and {y} {two} {thing}."], _OPEN),
    relations={"+": ("{other} has {n} more than {name}.",), "-": ("{other} has {n} fewer than {name}.",),
               "*": ("{other} has {n} times as many as {name}.",)},
    other_questions=("How many {thing} does {other} have?",),
    together=("How many {thing} do they have together?",),
    together_left=("How many {thing} are left?",),
    together_gains=(),
    together_losses=_fill(["Together they @ {n}."], ("lose", "sell", "use")),
    others_have=(),
    differences=(),
    purchases=("{name} buys {x} {thing} for {y} {unit} each.", "{name} buys {x} {thing}. Each costs {y} {unit}."),
    purchases_more=("{they} also buys a {item} for {n} {unit}.",),
    payments=("{they} pays with {n} {unit}.",),
    costs=_fill(["How many {unit} does {they} @?"], ("pay", "need", "spend")),
    change_back=("How many {unit} are left?", "How many {unit} does {they} get back?"),
    shares=("Then {they} puts them evenly into {n} {box}. How many {thing} are in each?",),
)  # fmt: skip

_HAVE = (
    "has", "owns", "starts with", "brings", "collects", "holds", "keeps", "carries", "gets", "buys", "picks", "finds",
    "makes", "had", "counts", "receives", "begins with",
)  # fmt: skip
_DAYS = ("In the morning", "On Monday", "On Friday", "Today", "At the start", "At first", "Yesterday")
WIDE = Wording(
    he=HE + MORE_HE,
    she=SHE + MORE_SHE,
    things=THINGS + MORE_THINGS,
    boxes=BOXES + MORE_BOXES,
    units=UNITS,
    items=ITEMS,
    links=(
        "", "", "", "", "Then ", "Later ", "After that ", "Next ", "Soon ", "Now ", "On Tuesday ", "The next day ",
        "In the evening ", "A day later ", "In the afternoon ", "Also, ", "Then, ", "After this, ",
    ),
    openings=(
        *_fill(["{name} @ {x} {thing}."], _HAVE),
        *_fill(["@ {name} has {x} {thing}.", "@, {name} had {x} {thing}."], _DAYS),
        "There are {x} {thing} in {name}'s {one_box}.", "{name} has {x} {thing} in a {one_box}.",
        "{name} has {x} {thing} in {their} {one_box}.", "{name}'s {one_box} holds {x} {thing}.",
        "{x} {thing} are in {name}'s {one_box}.", "{name} is given {x} {thing}.", "{name} has got {x} {thing}.",
        "We know that {name} has {x} {thing}.", "A {one_box} has {x} {thing} in it, and it is {name}'s.",
        "There were {x} {thing} on the table of {name}.", "{name} gets {x} {thing} from {other}.",
    ),
    gains=(
        *_fill(
            ["{link}{who} @ {n} more.", "{link}{who} @ {n} more {thing}.", "{link}{who} @ another {n}."],
            ("buys", "finds", "gets", "wins", "makes", "picks", "takes", "collects", "bought", "found", "got"),
        ),
        *_fill(["{link}{other} @ {them} {n} more.", "{link}{other} @ {name} {n} {thing}."],
               ("gives", "brings", "hands", "buys", "gave")),
        "{link}{who} gets {n} more from {other}.", "{link}{who} gets {n} {thing} from {other}.",
        "{link}{who} adds {n}.", "{link}{who} adds {n} more to them.", "{link}{who} is given {n} more.",
        "{link}{who} is given {n} {thing} by {other}.", "{link}{who} receives {n} more {thing}.",
        "{link}{n} more {thing} come from {other}.", "{link}{other} gives {n} {thing} to {them}.",
    ),
    losses=(
        *_fill(
            ["{link}{who} @ {n}.", "{link}{who} @ {n} {thing}.", "{link}{who} @ {n} of them."],
            ("loses", "sells", "uses", "drops", "breaks", "gives away", "throws away", "lost", "sold", "used"),
        ),
        *_fill(["{link}{who} @ {n} to {other}.", "{link}{who} @ {other} {n} {thing}.", "{link}{who} @ {other} {n}."],
               ("gives", "hands", "gave")),
        "{link}{other} takes {n} of them.", "{link}{other} takes {n} {thing} from {them}.",
        "{link}{who} sells {n} of the {thing}.", "{link}{who} sells {n} to {other}.",
        *_fill(["{link}{n} of them are @.", "{link}{n} {thing} are @."], ("lost", "sold", "broken", "used")),
        "{link}{who} has to give {n} to {other}.", "{link}{other} gets {n} of the {thing}.",
        "{link}{who} puts {n} away.",
    ),
    questions=(
        *_fill(["How many {thing} does {name} @?", "How many {thing} does {they} @?", "How many does {name} @?"],
               ("have now", "have", "have in the end", "own now", "have at the end", "have in all")),
        "How many {thing} are there now?", "How many are there in the end?",
        "What is the number of {thing} that {name} has now?", "What is the number of {thing} now?",
        "How many {thing} will {name} have?", "Now how many {thing} does {they} have?",
        "Find the number of {thing} that {name} has.", "How many {thing} has {they} got?",
        "Find out how many {thing} {they} has now.", "In the end, how many {thing} does {name} have?",
    ),
    left=(
        "How many {thing} are left?", "How many are left?", "How many {thing} does {they} have left?",
        "How many {thing} does {name} have left?", "How many {thing} remain?", "How many does {they} still have?",
        "How many {thing} does {name} still have?", "What is the number of {thing} left?",
        "How many {thing} are left in the end?",
    ),
    all_of=(
        "How many {thing} does {name} have in total?", "How many {thing} are there in all?",
        "How many {thing} does {they} have altogether?", "What is the total number of {thing}?",
        "How many {thing} is that in total?", "How many {thing} are there in total?", "How many is that altogether?",
    ),
    boxes_openings=(
        *_fill(["{name} @ {x} {box} with {y} {thing} each.", "{name} @ {x} {box} of {y} {thing} each.",
                "{name} @ {x} {box}. Each {one_box} holds {y} {thing}.", "{name} @ {x} {box} with {y} {thing} in each.",
                "{name} @ {x} {box}. There are {y} {thing} in each {one_box}."],
               ("has", "buys", "fills", "owns", "brings", "packs")),
        "Each of {name}'s {x} {box} holds {y} {thing}.", "{name} puts {y} {thing} into each of {x} {box}.",
        "A {one_box} holds {y} {thing}. {name} has {x} {box}.", "There are {x} {box}. Each has {y} {thing} in it.",
        "{name} has {x} {box}. Each has {y} {thing}.", "There are {x} {box} with {y} {thing} in each of them.",
        "Every {one_box} has {y} {thing} in it. {name} buys {x} {box}.", "{x} {box} hold {y} {thing} each.",
    ),
    colours_openings=(
        *_fill(["{name} @ {x} {one} {thing} and {y} {two} {thing}.", "{name} @ {x} {one} and {y} {two} {thing}.",
                "{name} @ {x} {one} {thing}. {they} also @ {y} {two} {thing}.",
                "{name} @ {x} {one} {thing} and {y} {two} ones."],
               ("has", "owns", "brings", "collects", "keeps", "buys", "picks", "finds")),
        "There are {x} {one} {thing} and {y} {two} {thing} in {name}'s {one_box}.",
        "{x} of {name}'s {thing} are {one} and {y} are {two}.", "{name} has {thing}: {x} {one} and {y} {two}.",
        "A {one_box} holds {x} {one} {thing} and {y} {two} ones.",
    ),
    relations={
        "+": (*_fill(["{other} @ {n} more than {name}.", "{other} @ {n} more {thing} than {name}.",
                      "{other} @ {n} {thing} more than {name}."], ("has", "owns", "had")),
              "{other} has as many as {name} and {n} more."),
        "-": (*_fill(["{other} @ {n} fewer than {name}.", "{other} @ {n} fewer {thing} than {name}.",
                      "{other} @ {n} less than {name}."], ("has", "owns", "had")),
              "{other} has {n} {thing} less than {name}."),
        "*": (*_fill(["{other} @ as many as {name}.", "{other} @ as many {thing} as {name}."],
                     ("has {n} times", "owns {n} times", "has twice", "owns twice", "had {n} times")),
              "{other} has double that number."),
        "/": (*_fill(["{other} @ as many as {name}.", "{other} @ as many {thing} as {name}."],
                     ("has half", "owns half", "had half")), "{other} has half that number."),
    },
    other_questions=(
        *_fill(["How many {thing} does {other} @?", "How many does {other} @?"], ("have", "own", "have now")),
        "What is the number of {other}'s {thing}?", "How many {thing} are {other}'s?",
        "Find out how many {thing} {other} has.",
    ),
    together=_fill(
        ["How many {thing} do they have @?", "How many {thing} do {name} and {other} have @?", "How many are there @?",
         "How many do they have @?"], ("together", "in total", "altogether", "in all"),
    ),
    together_left=(
        "How many {thing} are left?", "How many are left?", "How many {thing} remain?", "How many do they have left?",
        "How many {thing} do they still have?", "How many {thing} do they have now?", "How many are left in the end?",
    ),
    together_gains=(
        *_fill(["Together they @ {n} more.", "{link}they @ {n} more {thing} together."],
               ("buy", "find", "get", "make", "win")), "{link}they are given {n} more.",
    ),
    together_losses=(
        *_fill(["Together they @ {n}.", "{link}they @ {n} of them.", "{link}they @ {n} {thing}."],
               ("lose", "sell", "use", "break", "give away")), "{link}{n} of them are lost.",
    ),
    others_have=_fill(["{other} @ {n} {thing}.", "{other} @ {n}."], ("has", "owns", "had", "also has")),
    differences=(
        "How many more {thing} does {name} have than {other}?", "How many more does {name} have than {other}?",
        "How many more {thing} does {name} have?", "How many {thing} more than {other} does {name} have?",
        "How many fewer {thing} does {other} have than {name}?", "How many fewer does {other} have?",
        "How many more {thing} than {other} does {name} own?", "What is the difference?",
    ),
    purchases=(
        *_fill(["{name} @ {x} {thing} for {y} {unit} each.", "{name} @ {x} {thing}. Each costs {y} {unit}.",
                "{name} @ {x} {thing}. Each one costs {y} {unit}.", "{name} @ {x} {thing} at {y} {unit} each.",
                "{name} @ {x} {thing}. The price of each is {y} {unit}."], ("buys", "gets", "bought", "takes")),
        "{name} pays {y} {unit} for each of {x} {thing}.", "{x} {thing} cost {y} {unit} each. {name} buys them.",
        "One of the {thing} costs {y} {unit}. {name} buys {x}.",
        "{name} buys {x} {thing} and pays {y} {unit} for each.",
    ),
    purchases_more=(
        *_fill(["{they} also @ a {item} for {n} {unit}.", "{link}{who} @ a {item} for {n} {unit}.",
                "{link}{who} @ a {item}. It costs {n} {unit}."], ("buys", "gets", "takes", "bought")),
        "A {item} for {n} {unit} comes to that.", "{they} pays {n} {unit} more for a {item}.",
    ),
    payments=(
        "{they} pays with {n} {unit}.", "{name} pays with {n} {unit}.", "{they} has {n} {unit}.",
        "{they} has {n} {unit} to pay with.", "{they} gives {n} {unit}.", "{name} has {n} {unit} and pays.",
    ),
    costs=(
        *_fill(["How many {unit} does {they} @?", "How many {unit} does {name} @?"],
               ("pay", "need", "spend", "spend in all", "pay in total", "have to pay")),
        "What is the total price?", "What is the price in all?", "How much does {they} pay?",
        "How much does {name} spend?", "How much is that in total?", "How much does it all cost?",
    ),
    change_back=(
        "How many {unit} are left?", "How many {unit} does {they} get back?", "How much does {they} get back?",
        "How many {unit} does {name} have left?", "How many {unit} remain?", "How much is left?",
        "How many {unit} does {they} still have?",
    ),
    shares=_fill(
        [
            "Then {they} puts them evenly into {n} {box}. @", "{they} puts them equally into {n} {box}. @",
            "{link}{who} splits them evenly into {n} {box}. @", "{link}{who} divides them into {n} equal {box}. @",
            "{they} packs them into {n} {box} with the same number in each. @", "They go evenly into {n} {box}. @",
        ],
        ("How many {thing} are in each?", "How many {thing} are in each {one_box}?", "How many are in one {one_box}?",
         "How many does each hold?", "How many {thing} does each {one_box} hold?"),
    ) + _fill(
        [
            "{they} shares them equally among {n} friends. @", "{link}{who} shares them evenly with {n} friends. @",
            "{link}{who} divides them equally among {n} children. @", "{n} friends share them equally. @",
            "{link}{who} gives them to {n} friends, the same number to each. @",
        ],
        ("How many {thing} does each get?", "How many does each get?", "How many {thing} does each one get?",
         "How many {thing} are there for each?", "How many does each of them have?"),
    ),
)  # fmt: skip

HELD_OUT = Wording(
    he=WIDE.he,
    she=WIDE.she,
    things=WIDE.things,
    boxes=WIDE.boxes,
    units=WIDE.units,
    items=WIDE.items,
    links=WIDE.links,
    openings=(
        "{name} holds {x} {thing} in {their} {one_box}.", "On Monday there are {x} {thing} in {name}'s {one_box}.",
        "{name} keeps {x} {thing} in a {one_box}.", "At first there were {x} {thing} in the {one_box} of {name}.",
        "In the morning, {name} picks {x} {thing}.", "{x} {thing} are on {name}'s table.",
        "Yesterday {name} collects {x} {thing}.", "{name} is given {x} {thing} by {other}.",
    ),
    gains=(
        "{link}{other} hands {them} another {n}.", "{link}{n} more {thing} are given to {name}.",
        "{link}{who} takes {n} more from {other}.", "{link}{other} brings {n} more {thing} to {name}.",
        "{link}{who} got {n} {thing} more.", "{link}{who} makes {n} more of them.",
        "{link}{who} receives another {n} {thing} from {other}.", "{link}{n} more are found.",
    ),
    losses=(
        "{link}{n} of the {thing} are given to {other}.", "{link}{who} gives {n} of them to {other}.",
        "{link}{other} takes away {n} of them.", "{link}{who} breaks {n} of the {thing}.",
        "{link}{who} sells {other} {n} of them.", "{link}{n} of {their} {thing} are lost.",
        "{link}{who} throws {n} {thing} away.", "{link}{other} gets {n} {thing} from {them}.",
    ),
    questions=(
        "In the end, how many {thing} does {they} own?", "How many {thing} does {name} hold now?",
        "What is the number of {thing} in the end?", "Find the number of {thing} now.",
        "How many {thing} are there at the end?", "How many {thing} will {they} have in the end?",
    ),
    left=(
        "How many {thing} are still left?", "How many are there still?", "How many {thing} has {name} left?",
        "Find out how many {thing} are left.", "How many {thing} does {they} still own?",
    ),
    all_of=(
        "How many {thing} is that in all?", "In total, how many {thing} are there?",
        "What is the number of {thing} in total?", "How many does {name} have altogether?",
    ),
    boxes_openings=(
        "{name} has {x} {box} and each holds {y} {thing}.", "In each of {name}'s {x} {box} there are {y} {thing}.",
        "{name} carries {x} {box}. {y} {thing} are in each.", "There are {y} {thing} in each {one_box}. "
        "{name} has {x} {box}.", "{name} puts {y} {thing} each into {x} {box}.",
        "{name} makes {x} {box} with the same number in each: {y} {thing}.",
    ),
    colours_openings=(
        "In {name}'s {one_box} there are {x} {one} {thing} and {y} {two} ones.",
        "{name} carries {x} {thing} that are {one} and {y} that are {two}.",
        "There are {x} {one} {thing}. There are also {y} {two} {thing}.",
        "{name} is given {x} {one} and also {y} {two} {thing}.",
        "{name} gets {x} {thing} that are {one} and {y} {two} ones.",
    ),
    relations={
        "+": ("{other} has that number and {n} more.", "{other} keeps {n} more than {name}.",
              "{other} holds {n} {thing} more."),
        "-": ("{other} owns {n} {thing} fewer than {name}.", "{other} keeps {n} less than {name}.",
              "{other} holds {n} {thing} less."),
        "*": ("{other} holds {n} times as many.", "{other} has {n} times that number.",
              "{other} carries twice as many {thing}."),
        "/": ("{other} holds half as many.", "{other} owns half that number.",
        "{other} collects half as many {thing}."),
    },
    other_questions=(
        "How many {thing} does {other} hold?", "What is the number of {thing} that {other} has?",
        "Find the number of {other}'s {thing}.",
    ),
    together=(
        "Together, how many {thing} do they have?", "What is the total number of {thing} that they have?",
        "How many {thing} are there for {name} and {other} together?", "How many {thing} do they own in total?",
    ),
    together_left=("How many {thing} are still left?", "How many do they still have?",
        "How many {thing} do they still own?"),
    together_gains=("{link}they find another {n} together.", "{link}{n} more are given to them."),
    together_losses=("{link}they sell {n} of the {thing}.", "{link}they lose {n} of the {thing} together."),
    others_have=("{other} keeps {n} {thing}.", "{n} {thing} are {other}'s.", "{other} holds {n}."),
    differences=(
        "How many more than {other} does {name} have?", "What is the difference in {thing}?",
        "How many {thing} fewer does {other} have?", "Find out how many more {thing} {name} has.",
    ),
    purchases=(
        "{name} buys {x} {thing} at a price of {y} {unit} each.",
        "The {thing} cost {y} {unit} each, and {name} gets {x}.",
        "Each of the {x} {thing} that {name} buys costs {y} {unit}.", "For each of {x} {thing} {name} pays {y} {unit}.",
    ),
    purchases_more=(
        "Also, {they} pays {n} {unit} for a {item}.", "{link}{who} also takes a {item} that costs {n} {unit}.",
        "A {item} costs {n} {unit} more.",
    ),
    payments=("{name} gives {n} {unit} to pay.", "{they} had {n} {unit}.", "{who} starts with {n} {unit}."),
    costs=(
        "How many {unit} is that altogether?", "How much does {name} need in total?", "What does {they} pay in all?",
        "In total, how many {unit} does {name} spend?",
    ),
    change_back=(
        "How many {unit} does {name} get back?", "How much does {they} still have?", "How many {unit} are still left?",
        "How much does {name} have left?",
    ),
    shares=_fill(
        ["{they} divides them evenly into {n} {box}. @", "{n} {box} get the same number of them. @"],
        ("How many {thing} are there in each {one_box}?", "How many {thing} are in one?"),
    ) + _fill(
        ["{link}{who} splits them equally among {n} friends. @", "{n} children share them evenly. @",
         "{they} gives the same number to each of {n} friends. @"],
        ("How many {thing} does one get?", "How many {thing} are there for each of them?"),
    ),
)  # fmt: skip

WORDINGS = {"classic": CLASSIC, "wide": WIDE, "held_out": HELD_OUT}
