"""Word problems from a seeded generator: the data of the tasks toy_math and toy_choice, and of training/.

Every problem is a short story of one to five arithmetic steps on numbers from 1 to 99, with varied names, things and
phrases (wordings.py). Its *content* is its kind of story, its operations and its numbers, whatever the words. A hash of
the content alone decides whether a problem belongs to training or to test, so no test problem can be met in training,
not even retold in other words. One content in ten is a test problem.

`load_math` and `load_choice` are what the tasks' YAML files name; they need no download.
"""

# No `from __future__ import annotations`: lm_eval loads this file without registering it as a module, where dataclasses
# cannot resolve annotations that are strings.
import hashlib
import random
import re
from dataclasses import dataclass

from tasks.toy.wordings import COLOURS, ONE_BOX, WORDINGS, Wording

NUM_TEST = 1200  # toy_math questions
NUM_NEW = 1200  # toy_math_new questions
NUM_TEST_CHOICE = 300  # questions of each toy_choice subtask
NUM_FEWSHOT = 64  # training questions offered to the harness as examples for few-shot prompts
SEED = 20260  # of the fixed question lists; training draws from its own
MAX_NUMBER = 99
LETTERS = "ABCD"
CHOICE_KINDS = ("addition", "subtraction", "multiplication", "working")


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

    def __init__(self, rng: random.Random, words: Wording):
        self.rng, self.words = rng, words
        self.name, self.other = rng.sample(words.he + words.she, 2)
        male = self.name in words.he
        self.slots = {
            "name": self.name,
            "other": self.other,
            **dict(
                zip(("they", "them", "their"), ("he", "him", "his") if male else ("she", "her", "her"), strict=True)
            ),
        }
        self.thing = rng.choice(words.things)
        box = rng.choice(words.boxes)
        self.slots |= {"thing": self.thing, "box": box, "one_box": ONE_BOX[box]}
        self.sentences: list[str] = []
        self.steps: list[Step] = []

    def pick(self, forms: tuple[str, ...]) -> str:
        """One of the forms; where there is one only, the generator is left as it is."""
        return forms[0] if len(forms) == 1 else self.rng.choice(forms)

    def say(self, form: str, **slots: object) -> None:
        """Add a form with its slots filled and its sentences' first letters made large."""
        if "{who}" in form:
            slots["who"] = self.rng.choice((self.slots["they"], self.name))
        text = form.format(**{**self.slots, **slots})
        self.sentences.append(re.sub(r"(^|\. )([a-z])", lambda start: start[1] + start[2].upper(), text))

    def step(self, left: int, op: str, right: int) -> int:
        self.steps.append(Step(left, op, right))
        return self.steps[-1].result

    def change(self, total: int, least: int = 1) -> int:
        """One more event: something is gained or lost; returns the new total, `least` or more."""
        rng = self.rng
        gain = total <= 3 or (total < MAX_NUMBER - 5 and rng.random() < 0.5)
        n = rng.randint(2, min(40, MAX_NUMBER - total if gain else total - least))
        link = self.pick(self.words.links)
        self.say(self.pick(self.words.gains if gain else self.words.losses), link=link, n=n)
        return self.step(total, "+" if gain else "-", n)

    def ask(self) -> None:
        words = self.words
        self.say(self.pick(words.questions + (words.left if self.steps[-1].op == "-" else words.all_of)))


def _chain(story: _Story, num_steps: int) -> None:
    total = story.rng.randint(3, 60)
    story.say(story.pick(story.words.openings), x=total)
    for _ in range(num_steps):
        total = story.change(total)
    story.ask()


def _boxes(story: _Story, num_steps: int) -> None:
    count, each = story.rng.randint(2, 9), story.rng.randint(2, 9)
    story.say(story.pick(story.words.boxes_openings), x=count, y=each)
    total = story.step(count, "*", each)
    for _ in range(num_steps - 1):
        total = story.change(total)
    story.ask()


def _colours(story: _Story, num_steps: int) -> None:
    one, two = story.rng.sample(COLOURS, 2)
    x, y = story.rng.randint(2, 50), story.rng.randint(2, 40)
    story.say(story.pick(story.words.colours_openings), x=x, y=y, one=one, two=two)
    total = story.step(x, "+", y)
    for _ in range(num_steps - 1):
        total = story.change(total)
    story.ask()


def _compare(story: _Story, num_steps: int) -> None:
    rng, words = story.rng, story.words
    op = rng.choice(tuple(words.relations))
    if op == "*":
        x, n = rng.randint(2, 9), rng.randint(2, 5)
    elif op == "/":
        x, n = 2 * rng.randint(2, 30), 2
    else:
        x = rng.randint(4, 45)
        n = rng.randint(2, min(30, MAX_NUMBER - 2 * x if op == "+" else x - 1))
    relation = story.pick(words.relations[op])
    if "{n}" not in relation:
        n = 2  # twice, double, half
    story.say(COMPARE_OPENING, x=x)
    story.say(relation, n=n)
    y = story.step(x, op, n)
    if num_steps == 1:
        story.say(story.pick(words.other_questions))
        return
    total = story.step(x, "+", y)
    for _ in range(num_steps - 2):
        gain = bool(words.together_gains) and total < MAX_NUMBER - 5 and (total <= 3 or rng.random() < 0.4)
        n = rng.randint(2, min(40, MAX_NUMBER - total if gain else total - 1))
        form = story.pick(words.together_gains if gain else words.together_losses)
        story.say(form, n=n, link=story.pick(words.links) if "{link}" in form else "")
        total = story.step(total, "+" if gain else "-", n)
    story.say(story.pick(words.together_left if story.steps[-1].op == "-" else words.together))


def _difference(story: _Story, num_steps: int) -> None:
    total = story.rng.randint(5, 60)
    story.say(story.pick(story.words.openings), x=total)
    for _ in range(num_steps - 1):
        total = story.change(total, least=2)
    n = story.rng.randint(1, total - 1)
    story.say(story.pick(story.words.others_have), n=n)
    story.step(total, "-", n)
    story.say(story.pick(story.words.differences))


def _price(story: _Story, num_steps: int) -> None:
    rng, words = story.rng, story.words
    extras = max(0, num_steps - 2)
    while True:
        count, price = rng.randint(2, 9), rng.randint(2, 9)
        if count * price <= 95 - 14 * extras:
            break
    unit = story.thing = story.pick(words.units)
    story.say(story.pick(words.purchases), x=count, y=price, unit=unit)
    cost = story.step(count, "*", price)
    extras += num_steps == 2 and rng.random() < 0.5
    for left in range(extras, 0, -1):
        extra = rng.randint(2, min(30, 95 - 14 * (left - 1) - cost))
        form = story.pick(words.purchases_more)
        link = story.pick(words.links) if "{link}" in form else ""
        story.say(form, n=extra, unit=unit, link=link, item=story.pick(words.items))
        cost = story.step(cost, "+", extra)
    if len(story.steps) < num_steps:
        paid = rng.randint(cost + 1, MAX_NUMBER)
        story.say(story.pick(words.payments), n=paid, unit=unit)
        story.say(story.pick(words.change_back), unit=unit)
        story.step(paid, "-", cost)
    else:
        story.say(story.pick(words.costs), unit=unit)


def _share(story: _Story, num_steps: int) -> None:
    rng, words = story.rng, story.words
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    changes = []  # what happens before the sharing, worked out backwards from a total that divides evenly
    total = count * each
    for _ in range(num_steps - 1):
        gain = total > 4 and (total > 60 or rng.random() < 0.5)
        n = rng.randint(2, min(40, total - 2 if gain else MAX_NUMBER - total))
        changes.append(("+" if gain else "-", n))
        total += -n if gain else n
    story.say(story.pick(words.openings), x=total)
    for op, n in reversed(changes):
        form = story.pick(words.gains if op == "+" else words.losses)
        story.say(form, n=n, link=story.pick(words.links))
        total = story.step(total, op, n)
    form = story.pick(words.shares)
    story.say(form, n=count, link=story.pick(words.links) if "{link}" in form else "")
    story.step(total, "/", count)


COMPARE_OPENING = "{name} has {x} {thing}."
KINDS = {"chain": _chain, "boxes": _boxes, "colours": _colours, "compare": _compare, "price": _price, "share": _share}
KIND_WEIGHTS = (5, 2, 2, 3, 2, 2)
WIDE_KINDS = KINDS | {"difference": _difference}
WIDE_KIND_WEIGHTS = (*KIND_WEIGHTS, 2)
STEP_WEIGHTS = {"classic": (3, 4, 4), "wide": (3, 4, 4, 4, 4), "held_out": (3, 4, 4)}  # of 1, 2, ... steps


def make_problem(
    rng: random.Random, split: str | None = None, num_steps: int | None = None, wording: str = "classic"
) -> Problem:
    """The next problem of `rng`, of the wanted split ("train" or "test"; None: any) and number of steps (1 to 5).

    wording: "classic", "wide" or "held_out" (wordings.py). None steps: 1 to 3, in wide words 1 to 5.
    """
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if wording not in WORDINGS:
        raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, not {wording!r}")
    kinds, weights = (KINDS, KIND_WEIGHTS) if wording == "classic" else (WIDE_KINDS, WIDE_KIND_WEIGHTS)
    steps = STEP_WEIGHTS[wording]
    while True:
        kind = rng.choices(tuple(kinds), weights)[0]
        story = _Story(rng, WORDINGS[wording])
        kinds[kind](story, num_steps or rng.choices(range(1, len(steps) + 1), steps)[0])
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
    """The user's message of toy_math: the question alone, as a reader would put it."""
    return problem.question


def choice_prompt(choice: Choice) -> str:
    """The user's message of toy_choice; mmlu's form."""
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=True))
    return f"{choice.question}{listed}\nAnswer:"


def new_questions(seed: str, count: int = NUM_NEW) -> list[Problem]:
    """`count` further questions of toy_math's test split from a named seed, no content twice and none of toy_math."""
    known = {problem.content for problem in math_questions("test")}
    rng = random.Random(f"new {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng, "test")
        if problem.content not in known:
            problems.setdefault(problem.content, problem)
    return list(problems.values())


def math_questions(split: str, count: int = NUM_TEST, wording: str = "classic") -> list[Problem]:
    """The first `count` questions of a split of toy_math, or of such problems in another wording, no content twice."""
    rng = random.Random(f"{SEED} {split}" + ("" if wording == "classic" else f" {wording}"))
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng, split, wording=wording)
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


def load_math(wording: str = "classic", split: str = "test", seed: str = "", **_) -> dict:
    """{"train", "test": Dataset} with columns question, answer, content.

    train: examples for few-shot prompts. test: the questions that are asked, which are of the split `split`; with a
    `seed`, those of `new_questions`. No question is one of the examples.
    """
    from datasets import Dataset

    def rows(problems):
        return [{"question": p.question, "answer": p.answer, "content": p.content} for p in problems]

    examples = math_questions("train", NUM_FEWSHOT, wording)
    if seed:
        questions = new_questions(seed)
    elif split == "train":
        questions = math_questions("train", NUM_FEWSHOT + NUM_TEST, wording)[NUM_FEWSHOT:]
    else:
        questions = math_questions(split, NUM_TEST, wording)
    return {"train": Dataset.from_list(rows(examples)), "test": Dataset.from_list(rows(questions))}


def load_choice(kind: str, **_) -> dict:
    """{"train", "test": Dataset} of one subtask, with columns question, choices, answer (0 to 3)."""
    from datasets import Dataset

    def rows(choices):
        return [{"question": c.question, "choices": list(c.choices), "answer": c.answer} for c in choices]

    splits = {"train": choice_questions(kind, "train", NUM_FEWSHOT), "test": choice_questions(kind, "test")}
    return {split: Dataset.from_list(rows(choices)) for split, choices in splits.items()}
