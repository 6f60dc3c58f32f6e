"""The questions whose answers changed, side by side, the first differing token marked.

No tokenizer is loaded: a token here is a run of letters and digits, or one other character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fast_dllm.record.questions import TEXTS_FILE, QuestionsError, read_texts
from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast, baseline_of, shared_questions
from fast_dllm.report.results import ResultTable, RunResult

TOKEN = re.compile(r"\w+|\W")
LONGEST = 1500  # characters of an answer that are shown


@dataclass(frozen=True)
class Side:
    """An answer cut at its first token that differs: what both begin with, that token, the rest."""

    same: str
    token: str
    rest: str


@dataclass(frozen=True)
class Flip:
    """kind: regressed, improved or changed; sides: None where the texts are not on this machine."""

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
    """Both texts cut behind the tokens that they share at the start."""
    ours, theirs = TOKEN.findall(before), TOKEN.findall(after)
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    sides = [
        Side("".join(t[:shared]), "".join(t[shared : shared + 1]), "".join(t[shared + 1 :])) for t in (ours, theirs)
    ]
    return sides[0], sides[1]


def _texts(run: RunResult) -> Mapping[tuple[str, int], Mapping[str, object]]:
    try:
        return read_texts(run.path.with_name(TEXTS_FILE))
    except QuestionsError:
        return {}


def _kind(own: float, its: float) -> str:
    return "regressed" if own < its else "improved" if own > its else "changed"


def _changed(
    table: ResultTable, found: tuple[Contrast, ...], against: RunResult | None
) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(task, doc_id) -> (kind, configuration) of each contrast in which its answer changed."""
    places: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for c in found:
        run = table.runs[c.configs[0]]
        base = against or baseline_of(table, run)
        for own, its in shared_questions(run, base) if c.paired and base else ():
            if own.answer != its.answer or own.correct != its.correct:
                places.setdefault((own.task, own.doc_id), []).append((_kind(own.correct, its.correct), run.config))
    return places


def flips_of(report: Report, table: ResultTable, most: int = 10, against: RunResult | None = None) -> list[Flip]:
    """Up to `most` changed questions of a table: lost answers first, then won ones, then other wordings."""
    places = _changed(table, report.contrasts.get(table.label, ()), against)
    order = ("regressed", "improved", "changed")
    ranked = sorted(places.items(), key=lambda item: (min(order.index(kind) for kind, _ in item[1]), item[0]))
    texts: dict[str, Mapping] = {}
    found = []
    for (task, doc_id), changes in ranked[:most]:
        kind, config = min(changes, key=lambda entry: order.index(entry[0]))
        run = table.runs[config]
        base = against or baseline_of(table, run)
        if base is None:  # then nothing has changed
            continue
        for one in (run, base):
            texts.setdefault(str(one.path), _texts(one))
        after, before = (texts[str(one.path)].get((task, doc_id)) for one in (run, base))
        sides = split_at_difference(str(before["answer"]), str(after["answer"])) if before and after else (None, None)
        shown = after or before or {}
        others = tuple(name for _, name in changes if name != config)
        prompt, target = str(shown.get("prompt", "")), str(shown.get("target", ""))
        names = (table.label, config, base.config)
        found.append(Flip(*names, others, task, doc_id, kind, prompt, target, *sides))
    return found


def count_changes(table: ResultTable, found: tuple[Contrast, ...], against: RunResult | None = None) -> int:
    return len(_changed(table, found, against))
