"""Word problems from a seeded generator: the data of the tasks toy_math and toy_choice, and of training/.

Every problem is a short story of one to three arithmetic steps on numbers from 1 to 99, written with varied names,
things and phrases. Its *content* is its kind of story, its operations and its numbers, whatever the words. A hash of
the content alone decides whether a problem belongs to training or to test, so no test problem can be met in
training, not even retold in other words. One content in ten is a test problem.

`load_math` and `load_choice` are what the tasks' YAML files name; they need no download.
"""

# No `from __future__ import annotations`: lm_eval loads this file without registering it as a module, where dataclasses
# cannot resolve annotations that are strings.
import hashlib
import random
from dataclasses import dataclass

NUM_TEST = 1200  # toy_math questions
NUM_TEST_CHOICE = 300  # questions of each toy_choice subtask
NUM_FEWSHOT = 64  # training questions offered to the harness as examples for few-shot prompts
SEED = 20260  # of the fixed question lists; training draws from its own
MAX_NUMBER = 99
LETTERS = "ABCD"
CHOICE_KINDS = ("addition", "subtraction", "multiplication", "working")

HE = ["Tom", "Ben", "Max", "Leo", "Sam", "Paul", "Omar", "Ivan", "Hugo", "Dan", "Raj", "Jack"]
SHE = ["Ann", "Eva", "Mia", "Zoe", "Lily", "Sara", "Nina", "Rosa", "Emma", "Kim", "Ruth", "Jane"]
THINGS = [
    "apples", "pens", "books", "cards", "eggs", "shells", "marbles", "stamps",
    "cookies", "pears", "stickers", "nuts", "beads", "plums", "balls", "stones",
    "lemons", "flowers", "coins", "candles", "tickets", "buttons", "ropes", "cups",
]  # fmt: skip
BOXES = ["bags", "boxes", "jars", "baskets", "packs"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]
OPENINGS = ("has", "owns", "starts with", "brings", "collects")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} more from {m}", "wins {n} more", "makes {n} more", "adds {n}")
LOSSES = ("gives {n} to {m}", "loses {n}", "sells {n}", "uses {n}", "drops {n}", "hands {m} {n}")
LINKS = ("", "", "Then ", "Later ", "After that ", "Next ")


@dataclass(frozen=True)
class Step:
    """One line of working: `left op right = result`."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        if self.op == "/":
            return self.left // self.right
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.op]

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right}"


@dataclass(frozen=True)
class Problem:
    """A question with its working. `thing` is what is counted; `kind` is the sort of story."""

    kind: str
    question: str
    steps: tuple[Step, ...]
    thing: str

    @property
    def content(self) -> str:
        """Kind, operations and numbers: what decides the split, whatever the words."""
        return f"{self.kind}: " + "; ".join(map(str, self.steps))

    @property
    def split(self) -> str:
        return "test" if int(hashlib.sha256(self.content.encode()).hexdigest(), 16) % 10 == 0 else "train"

    @property
    def answer(self) -> str:
        """The working, a line a step, and the result as GSM8K writes it."""
        lines = [f"{step} = {step.result} {self.thing}." for step in self.steps]
        return "\n".join([*lines, f"#### {self.steps[-1].result}"])


class _Story:
    """Sentences and steps of one problem while it is being made up."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.name, self.other = rng.sample(HE + SHE, 2)
        self.they = "he" if self.name in HE else "she"
        self.thing = rng.choice(THINGS)
        self.box = rng.choice(BOXES)
        self.sentences: list[str] = []
        self.steps: list[Step] = []

    def say(self, text: str) -> None:
        self.sentences.append(text[0].upper() + text[1:])

    def step(self, left: int, op: str, right: int) -> int:
        self.steps.append(Step(left, op, right))
        return self.steps[-1].result

    def change(self, total: int) -> int:
        """One more event: something is gained or lost; returns the new total."""
        rng = self.rng
        gain = total <= 3 or (total < MAX_NUMBER - 5 and rng.random() < 0.5)
        n = rng.randint(2, min(40, MAX_NUMBER - total if gain else total - 1))
        link = rng.choice(LINKS)
        event = rng.choice(GAINS if gain else LOSSES).format(n=n, m=self.other)
        self.say(f"{link}{self.they} {event}.")
        return self.step(total, "+" if gain else "-", n)

    def ask(self) -> None:
        endings = ["does {name} have now", "does {they} have now", "does {name} have in the end", "does {they} have"]
        if self.steps[-1].op == "-":
            endings += ["are left", "does {they} have left"]
        self.say(f"How many {self.thing} {self.rng.choice(endings).format(name=self.name, they=self.they)}?")


def _chain(story: _Story, num_steps: int) -> None:
    total = story.rng.randint(3, 60)
    story.say(f"{story.name} {story.rng.choice(OPENINGS)} {total} {story.thing}.")
    for _ in range(num_steps):
        total = story.change(total)
    story.ask()


def _boxes(story: _Story, num_steps: int) -> None:
    count, each = story.rng.randint(2, 9), story.rng.randint(2, 9)
    opening = story.rng.choice(("has {} {} with {} {} each", "buys {} {} of {} {} each", "fills {} {} with {} {} each"))
    story.say(f"{story.name} {opening.format(count, story.box, each, story.thing)}.")
    total = story.step(count, "*", each)
    for _ in range(num_steps - 1):
        total = story.change(total)
    story.ask()


def _colours(story: _Story, num_steps: int) -> None:
    one, two = story.rng.sample(COLOURS, 2)
    x, y = story.rng.randint(2, 50), story.rng.randint(2, 40)
    story.say(f"{story.name} {story.rng.choice(OPENINGS)} {x} {one} {story.thing} and {y} {two} {story.thing}.")
    total = story.step(x, "+", y)
    for _ in range(num_steps - 1):
        total = story.change(total)
    story.ask()


def _compare(story: _Story, num_steps: int) -> None:
    rng, name, other, thing = story.rng, story.name, story.other, story.thing
    relation = rng.choice(("more", "fewer", "times"))
    if relation == "times":
        x, n = rng.randint(2, 9), rng.randint(2, 5)
        story.say(f"{name} has {x} {thing}. {other} has {n} times as many as {name}.")
        y = story.step(x, "*", n)
    else:
        x = rng.randint(4, 45)
        n = rng.randint(2, min(30, MAX_NUMBER - 2 * x if relation == "more" else x - 1))
        story.say(f"{name} has {x} {thing}. {other} has {n} {relation} than {name}.")
        y = story.step(x, "+" if relation == "more" else "-", n)
    if num_steps == 1:
        story.say(f"How many {thing} does {other} have?")
        return
    total = story.step(x, "+", y)
    if num_steps == 2:
        story.say(f"How many {thing} do they have together?")
        return
    n = rng.randint(2, min(40, total - 1))
    story.say(f"Together they {rng.choice(('lose', 'sell', 'use'))} {n}. How many {thing} are left?")
    story.step(total, "-", n)


def _price(story: _Story, num_steps: int) -> None:
    rng, they, bought = story.rng, story.they, story.thing
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    story.thing = "coins"
    story.say(rng.choice((f"{story.name} buys {count} {bought} for {price} coins each.",
                          f"{story.name} buys {count} {bought}. Each costs {price} coins.")))  # fmt: skip
    cost = story.step(count, "*", price)
    also_bought = num_steps == 3 or (num_steps == 2 and rng.random() < 0.5)
    if also_bought:
        extra = rng.randint(2, min(30, 95 - cost))
        story.say(f"{they} also buys a book for {extra} coins.")
        cost = story.step(cost, "+", extra)
    if num_steps == 3 or (num_steps == 2 and not also_bought):
        paid = rng.randint(cost + 1, MAX_NUMBER)
        story.say(f"{they} pays with {paid} coins. How many coins {rng.choice(('are left', f'does {they} get back'))}?")
        story.step(paid, "-", cost)
    else:
        story.say(f"How many coins does {they} {rng.choice(('pay', 'need', 'spend'))}?")


def _share(story: _Story, num_steps: int) -> None:
    rng, they, thing, box = story.rng, story.they, story.thing, story.box
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    changes = []  # what happens before the sharing, worked out backwards from a total that divides evenly
    total = count * each
    for _ in range(num_steps - 1):
        gain = total > 4 and (total > 60 or rng.random() < 0.5)
        n = rng.randint(2, min(40, total - 2 if gain else MAX_NUMBER - total))
        changes.append(("+" if gain else "-", n))
        total += -n if gain else n
    story.say(f"{story.name} {rng.choice(OPENINGS)} {total} {thing}.")
    for op, n in reversed(changes):
        event = rng.choice(GAINS if op == "+" else LOSSES).format(n=n, m=story.other)
        story.say(f"{rng.choice(LINKS)}{they} {event}.")
        total = story.step(total, op, n)
    story.say(f"Then {they} puts them evenly into {count} {box}. How many {thing} are in each?")
    story.step(total, "/", count)


KINDS = {"chain": _chain, "boxes": _boxes, "colours": _colours, "compare": _compare, "price": _price, "share": _share}


def make_problem(rng: random.Random, split: str | None = None, num_steps: int | None = None) -> Problem:
    """The next problem of `rng`, of the wanted split ("train" or "test"; None: any) and number of steps (1 to 3)."""
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    while True:
        kind = rng.choices(tuple(KINDS), (5, 2, 2, 3, 2, 2))[0]
        story = _Story(rng)
        KINDS[kind](story, num_steps or rng.choices((1, 2, 3), (3, 4, 4))[0])
        problem = Problem(kind, " ".join(story.sentences), tuple(story.steps), story.thing)
        if split in (None, problem.split):
            return problem


@dataclass(frozen=True)
class Choice:
    """A one-step problem with four choices; `answer` is the index of the right one."""

    problem: Problem
    question: str
    choices: tuple[str, ...]
    answer: int


def make_choice(rng: random.Random, kind: str, split: str | None = None) -> Choice:
    """A multiple-choice question over a one-step problem.

    kind: "addition", "subtraction", "multiplication" ask for the result; "working" for the line of working.
    No two results share their units or their tens, so a rough idea of the result is enough to choose.
    """
    if kind not in CHOICE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(CHOICE_KINDS)}, not {kind!r}")
    wanted = {"addition": "+", "subtraction": "-", "multiplication": "*", "working": "+-*"}[kind]
    while True:
        problem = make_problem(rng, split, num_steps=1)
        if problem.steps[0].op in wanted:
            break
    step = problem.steps[0]
    question = problem.question
    if kind == "working":
        right = str(step)
        wrong = [f"{step.left} {op} {step.right}" for op in "+-*/" if op != step.op]
    else:
        right, wrong = str(step.result), []
        while len(wrong) < 3:
            number = rng.randint(1, MAX_NUMBER)
            taken = [int(result) for result in (right, *wrong)]
            if all(number % 10 != other % 10 and number // 10 != other // 10 for other in taken):
                wrong.append(str(number))
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Choice(problem, question, tuple(choices), choices.index(right))


def math_prompt(problem: Problem) -> str:
    """The user's message of toy_math, before the harness adapter rewrites its ending; gsm8k's form."""
    return f"Question: {problem.question}\nAnswer:"


def choice_prompt(choice: Choice) -> str:
    """The user's message of toy_choice; mmlu's form."""
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=True))
    return f"{choice.question}{listed}\nAnswer:"


def math_questions(split: str, count: int = NUM_TEST) -> list[Problem]:
    """The first `count` toy_math questions of a split, no content twice."""
    rng = random.Random(f"{SEED} {split}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng, split)
        problems.setdefault(problem.content, problem)
    return list(problems.values())


def choice_questions(kind: str, split: str, count: int = NUM_TEST_CHOICE) -> list[Choice]:
    """The first `count` questions of one toy_choice subtask, no question twice."""
    rng = random.Random(f"{SEED} {split} {kind}")
    choices: dict[str, Choice] = {}
    while len(choices) < count:
        choice = make_choice(rng, kind, split)
        choices.setdefault(choice.question, choice)
    return list(choices.values())


def load_math(**_) -> dict:
    """{"train", "test": Dataset} with columns question, answer, content; train is for few-shot prompts only."""
    from datasets import Dataset

    def rows(problems):
        return [{"question": p.question, "answer": p.answer, "content": p.content} for p in problems]

    splits = {"train": math_questions("train", NUM_FEWSHOT), "test": math_questions("test")}
    return {split: Dataset.from_list(rows(problems)) for split, problems in splits.items()}


def load_choice(kind: str, **_) -> dict:
    """{"train", "test": Dataset} of one subtask, with columns question, choices, answer (0 to 3)."""
    from datasets import Dataset

    def rows(choices):
        return [{"question": c.question, "choices": list(c.choices), "answer": c.answer} for c in choices]

    splits = {"train": choice_questions(kind, "train", NUM_FEWSHOT), "test": choice_questions(kind, "test")}
    return {split: Dataset.from_list(rows(choices)) for split, choices in splits.items()}
