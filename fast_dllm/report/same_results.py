"""Which runs are alike: the same computation, by their arguments; the same result, by their answers; plain decoding."""

from __future__ import annotations

from collections.abc import Iterable

from fast_dllm.record.questions import Question
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT

NOT_AN_ANSWER = ("layer_subset", "experiment_name", "batch_size", "show_speed", "device", "model_path", "dtype")
EQUAL_FORWARDS = 0.005  # a smaller relative difference does not show in a factor with two decimals
# the arguments that every experiment's plain decoding has
PLAIN_ARGUMENTS = (
    "threshold", "small_block_size", "bd_size", "use_block_cache", "refresh", "reuse_k", "max_new_tokens",
    "temperature", "top_p",
)  # fmt: skip


def _questions_by_place(run: RunResult) -> dict[tuple[str, int], Question]:
    return {(q.task, q.doc_id): q for q in run.questions.questions} if run.questions else {}


def shared_questions(run: RunResult, other: RunResult) -> list[tuple[Question, Question]]:
    """Pairs (this run's, the other's) of the same question: same subtask, same number, same content."""
    others = _questions_by_place(other)
    pairs = ((question, others.get(place)) for place, question in _questions_by_place(run).items())
    return [
        (question, other_question)
        for question, other_question in pairs
        if other_question is not None and other_question.key == question.key
    ]


def num_flips(run: RunResult, other: RunResult) -> int | None:
    """How many answers differ; None where the two runs did not record answers to the same questions."""
    if not run.questions or not other.questions:
        return None
    pairs = shared_questions(run, other)
    if len(pairs) != len(run.questions.questions) or len(pairs) != len(other.questions.questions):
        return None
    return sum(
        question.answer != other_question.answer or question.correct != other_question.correct
        for question, other_question in pairs
    )


def computation(run: RunResult) -> tuple:
    """The arguments that can change an answer, for comparison. The columns of one k differ in none of them."""
    arguments = {k: v for k, v in run.arguments.items() if k not in NOT_AN_ANSWER and v is not None}
    arguments.setdefault("refresh", "rows")  # the value of a run whose summary does not record it
    return tuple(sorted((key, str(value)) for key, value in arguments.items()))


def rereads(run: RunResult) -> bool:
    """Whether reuse reads stored logits again, so that the choice of layers makes no difference.

    The forwards show it: some steps were reused, and no forward ran without a layer. A foreign run without recorded
    forwards is the lab's, whose only experiment read stored logits.
    """
    if run.summary.is_scored or run.reuse_k is None or run.reuse_k < 2:
        return False
    if run.is_foreign and run.forwards is None:
        return (run.arguments.get("experiment_name") or DEFAULT_EXPERIMENT) == DEFAULT_EXPERIMENT
    return bool((run.forwards or {}).get("reused")) and not run.skips_layers


def reuses(run: RunResult) -> bool:
    """Whether logits were read again or layers rested."""
    return (run.reuse_k or 1) != 1 or bool((run.forwards or {}).get("reused")) or run.skips_layers


def is_plain(run: RunResult, table: ResultTable) -> bool:
    """Whether the run is plain decoding, at some threshold and sub-block size.

    Nothing is reused or skipped, and the experiment's knobs are those of the run that its table is compared with.
    """
    if reuses(run):
        return False
    base = table.runs.get(table.compare_with or "")
    if base is None:
        return True
    return all(
        base.arguments.get(name) == run.arguments.get(name)
        for name in {*base.arguments, *run.arguments} - {*PLAIN_ARGUMENTS, *NOT_AN_ANSWER}
    )


def plain_settings(run: RunResult) -> tuple | None:
    """The settings of plain decoding that can change an answer, in a form that is equal for all experiments.

    `refresh` of an experiment without this knob is seen from its forwards; None if they are not recorded.
    """
    settings = {name: str(run.arguments[name]) for name in PLAIN_ARGUMENTS if run.arguments.get(name) is not None}
    if "refresh" not in settings:
        if run.forwards is None:
            return None
        settings["refresh"] = "rows" if run.forwards.get("sub") else "block"
    return tuple(sorted((name, value) for name, value in settings.items() if name != "reuse_k"))


def columns(table: ResultTable, alike: bool = True) -> dict[int, list[list[RunResult]]]:
    """k -> groups of runs that differ only in the layers that they name.

    alike: True: groups whose runs are one computation, because nothing is skipped (k = 1, or stored logits are read
    again); False: groups whose runs skip different layers.
    """
    groups_of_k: dict[int, dict[tuple, list[RunResult]]] = {}
    for run in table.runs.values():
        if run.reuse_k is None or not run.arguments.get("layer_subset"):
            continue
        if (run.reuse_k == 1 or rereads(run)) == alike:
            groups_of_k.setdefault(run.reuse_k, {}).setdefault(computation(run), []).append(run)
    return {k: [group for group in groups.values() if len(group) > 1] for k, groups in sorted(groups_of_k.items())}


def distinct(runs: Iterable[RunResult], by_answers_alone: bool = False) -> list[list[RunResult]]:
    """Runs grouped by result: a group has the same answers, the same k and as many full-depth forwards.

    by_answers_alone: a group has the same answers, whatever its k and its forwards are.
    """
    groups: list[list[RunResult]] = []
    for run in runs:
        for group in groups:
            if num_flips(run, group[0]) == 0 and (by_answers_alone or _same_cost(run, group[0])):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _same_cost(run: RunResult, other: RunResult) -> bool:
    """Whether k and the number of full-depth forwards are equal. Forwards that are not recorded count as equal."""
    if run.arguments.get("reuse_k") != other.arguments.get("reuse_k"):
        return False
    forwards, other_forwards = run.full_forwards, other.full_forwards
    if forwards is None or other_forwards is None:
        return True
    return abs(forwards - other_forwards) <= EQUAL_FORWARDS * max(forwards, other_forwards)
