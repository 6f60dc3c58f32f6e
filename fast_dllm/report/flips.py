"""Finds the questions whose answers changed, and where each pair of answers starts to differ.

No tokenizer is loaded: here a token is a sequence of letters and digits, or one other character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fast_dllm.record.questions import TEXTS_FILE, QuestionsError, read_texts
from fast_dllm.report.build import Report
from fast_dllm.report.compare import name_beside
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import shared_questions

TOKEN = re.compile(r"\w+|\W")
LONGEST = 1500  # characters of an answer that are shown


@dataclass(frozen=True)
class Side:
    """An answer in three parts: the start that both answers share, the first token that differs, the rest."""

    same: str
    token: str
    rest: str


@dataclass(frozen=True)
class Flip:
    """A question whose answer differs from the baseline's.

    others: further configurations in which it changed. kind: regressed, improved or changed (another wording). before,
    after: the baseline's and the configuration's answer; None if the texts are not on this machine.
    """

    table: str
    config: str
    baseline: str
    others: tuple[str, ...]
    task: str
    doc_id: int
    kind: str
    prompt: str
    target: str
    before: Side | None
    after: Side | None


def split_at_difference(before: str, after: str) -> tuple[Side, Side]:
    """Both texts, each split after the tokens that they share at the start."""
    tokens, other_tokens = TOKEN.findall(before), TOKEN.findall(after)
    shared = 0
    while shared < min(len(tokens), len(other_tokens)) and tokens[shared] == other_tokens[shared]:
        shared += 1
    sides = [
        Side("".join(t[:shared]), "".join(t[shared : shared + 1]), "".join(t[shared + 1 :]))
        for t in (tokens, other_tokens)
    ]
    return sides[0], sides[1]


def _texts(run: RunResult) -> Mapping[tuple[str, int], Mapping[str, object]]:
    """(task, doc_id) -> prompt, target and answer; empty if the run's texts cannot be read."""
    try:
        return read_texts(run.path.with_name(TEXTS_FILE))
    except QuestionsError:
        return {}


def _kind(correct: float, base_correct: float) -> str:
    return "regressed" if correct < base_correct else "improved" if correct > base_correct else "changed"


def _changed(report: Report, table: ResultTable) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(task, doc_id) -> (kind, configuration) for each contrast in which the answer to that question changed."""
    places: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for c in report.contrasts.get(table.label, ()):
        run = table.runs[c.configs[0]]
        base = report.baseline(table, run)
        for question, base_question in shared_questions(run, base) if c.paired and base else ():
            if question.answer != base_question.answer or question.correct != base_question.correct:
                places.setdefault((question.task, question.doc_id), []).append(
                    (_kind(question.correct, base_question.correct), run.config)
                )
    return places


def flips_of(report: Report, table: ResultTable, most: int = 10) -> list[Flip]:
    """Up to `most` changed questions of a table: first those regressed, then improved, then with another wording."""
    places = _changed(report, table)
    order = ("regressed", "improved", "changed")
    ranked = sorted(places.items(), key=lambda item: (min(order.index(kind) for kind, _ in item[1]), item[0]))
    texts: dict[str, Mapping] = {}
    flips = []
    for (task, doc_id), changes in ranked[:most]:
        kind, config = min(changes, key=lambda entry: order.index(entry[0]))
        run = table.runs[config]
        base = report.baseline(table, run)
        if base is None:  # then nothing has changed
            continue
        for each in (run, base):
            if str(each.path) not in texts:
                texts[str(each.path)] = _texts(each)
        after, before = (texts[str(each.path)].get((task, doc_id)) for each in (run, base))
        sides = split_at_difference(str(before["answer"]), str(after["answer"])) if before and after else (None, None)
        shown = after or before or {}
        others = tuple(name for _, name in changes if name != config)
        prompt, target = str(shown.get("prompt", "")), str(shown.get("target", ""))
        names = (table.label, config, name_beside(base, table.label))
        flips.append(Flip(*names, others, task, doc_id, kind, prompt, target, *sides))
    return flips


def count_changes(report: Report, table: ResultTable) -> int:
    return len(_changed(report, table))
