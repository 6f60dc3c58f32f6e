"""The rules of all alarms: name, the claim that the alarm forbids, its sentence, and the condition.

An alarm forbids a claim; a note only informs. The conditions are in conditions_*.py. docs/report.md lists the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from fast_dllm.report import conditions_answers as answers
from fast_dllm.report import conditions_files as files
from fast_dllm.report import conditions_settings as settings
from fast_dllm.report import conditions_speeds as speeds
from fast_dllm.report.matches import Match
from fast_dllm.report.results import ResultTable
from fast_dllm.report.words import listed

ALARM, NOTE = "alarm", "note"


@dataclass(frozen=True)
class Alarm:
    """kind: its name in report.json; spoils: the claim that it forbids (accuracy, speed, reuse or provenance).

    text: one line for people.
    """

    kind: str
    table: str
    configs: tuple[str, ...]
    spoils: str
    text: str
    level: str = ALARM


@dataclass(frozen=True)
class Rule:
    """spoils: the claim that it forbids. words: a format string; {names} are the configurations, the other fields come
    from the Match. condition: takes one table (TABLE_RULES) or all (RULES_ACROSS) and yields a Match for each place."""

    kind: str
    level: str
    spoils: str
    words: str
    condition: Callable[..., Iterator[Match]]


# Facts that must be the same in a whole table, and in all tables of a picture: (kind, what differs, facts to compare).
SAME_FACTS = (
    ("mixed_model", "models", ("model", "model_revision")),
    ("mixed_dtype", "dtypes", ("dtype",)),
    ("mixed_device", "devices", ("device",)),
    ("mixed_task_version", "versions of the task", ("task_version", "prompts", "metric")),
    (
        "mixed_prompting",
        "ways to prompt",
        ("num_fewshot", "chat_template", "fewshot_as_multiturn", "system_instruction"),
    ),
    ("mixed_generation", "generation settings", ("gen_kwargs",)),
    ("mixed_samples", "choices of questions", ("samples",)),
)
ONE_COMPUTATION = "k = {k}: {names} are one computation ({why}), {difference}"
SAME_ANSWERS = "{names} gave the same answers with the same work: "

TABLE_RULES: tuple[Rule, ...] = (
    # the files
    Rule("corrupt", ALARM, "accuracy", "{names}: corrupt, left out: {reason}", files.left_out),
    *(
        Rule(kind, ALARM, "accuracy", "{names}: " + what + ": {reason}", partial(files.file_faults, kind=kind))
        for kind, what in (
            ("hand_edited", "changed by hand"),
            ("copies_differ", "two different files"),
            ("not_a_count", "an accuracy that no run can have"),
            ("mixed_limit", "another number of questions than its folder says"),
        )
    ),
    Rule("missing", ALARM, "accuracy", "{count} of {total} configurations have no result: {names}", files.missing),
    Rule(
        "stale", ALARM, "provenance", "stale, its generation code is no longer the experiment's: {names}", files.stale
    ),
    # answers
    Rule(
        "too_few_questions",
        ALARM,
        "accuracy",
        "{total} questions are too few for any claim: they can show {shown} (80% power, 10% of answers changing)",
        answers.too_few_questions,
    ),
    Rule(
        "loglikelihood_reuse",
        ALARM,
        "reuse",
        "{task} is scored by log-likelihood, where nothing can be reused: {what}",
        answers.reuse_of_scored_task,
    ),
    Rule(
        "equal_tokens",
        ALARM,
        "accuracy",
        "k = {k}: {tokens} tokens each, so the same answers, and yet other accuracies ({accuracies}): these numbers "
        "cannot be of the same answers",
        answers.equal_tokens,
    ),
    Rule("k1_differs", ALARM, "accuracy", ONE_COMPUTATION, partial(answers.column_differences, kind="k1_differs")),
    Rule(
        "columns_differ", ALARM, "accuracy", ONE_COMPUTATION, partial(answers.column_differences, kind="columns_differ")
    ),
    Rule(
        "columns_alike",
        NOTE,
        "reuse",
        "k = {k}: {names} cannot be told apart: {difference}",
        partial(answers.column_differences, kind="columns_alike"),
    ),
    *(
        Rule(
            "identical_answers",
            level,
            "reuse",
            "k = {k}: " + SAME_ANSWERS + "the choice of layers had no effect",
            partial(answers.layers_without_effect, really_skipped=level == ALARM),
        )
        for level in (ALARM, NOTE)
    ),
    Rule(
        "identical_answers",
        ALARM,
        "reuse",
        SAME_ANSWERS + "none of {count} settings had any effect",
        answers.no_setting_has_effect,
    ),
    Rule(
        "identical_answers",
        ALARM,
        "reuse",
        SAME_ANSWERS + "reuse had no effect",
        partial(answers.setting_without_effect, differs_in_k=True),
    ),
    Rule(
        "identical_answers",
        NOTE,
        "reuse",
        SAME_ANSWERS + "the setting had no effect, or too few questions show one",
        partial(answers.setting_without_effect, differs_in_k=False),
    ),
    Rule(
        "unexplained_difference",
        ALARM,
        "accuracy",
        "{config} ({accuracy}) differs from {base} ({base_accuracy}), but reused nothing and skipped no layer: no "
        "forward explains it",
        answers.unexplained_difference,
    ),
    Rule(
        "answers_never_stop",
        ALARM,
        "accuracy",
        "answers ran on to the limit of {longest} tokens instead of ending: {lengths}",
        answers.answers_never_stop,
    ),
    # one table, one thing
    Rule("mixed_code", ALARM, "accuracy", "mixed code in one table, {count} {what}: {values}", settings.mixed_code),
    Rule(
        "name_contradicts",
        ALARM,
        "accuracy",
        "{names} ran with {argument} = {value}, its name says {expected}",
        settings.contradicting_names,
    ),
    Rule("mixed_arguments", ALARM, "accuracy", "mixed {argument} in one table: {values}", settings.mixed_arguments),
    Rule("mixed_limit", ALARM, "accuracy", "different limits in one table: {values}", settings.several_limits),
    Rule(
        "mixed_questions",
        ALARM,
        "accuracy",
        "different numbers of questions in one table: {values}",
        settings.several_question_counts,
    ),
    Rule("mixed_task", ALARM, "accuracy", "different tasks in one table: {values}", settings.several_tasks),
    *(
        Rule(
            kind,
            ALARM,
            "accuracy",
            "different " + what + " in one table ({fact}): {values}",
            partial(settings.several_values, facts=facts),
        )
        for kind, what, facts in (*SAME_FACTS, ("mixed_seeds", "seeds", ("seeds",)))
    ),
    *(
        Rule(
            "mixed_versions",
            NOTE,
            "provenance",
            "different versions of {fact}: {values}",
            partial(settings.several_values, facts=(package,)),
        )
        for package in ("torch", "lm_eval")
    ),
    # speeds
    Rule("mixed_gpu", ALARM, "speed", "speeds from different hardware: {values}", speeds.several_gpus),
    Rule(
        "gpu_memory",
        NOTE,
        "speed",
        "GPUs of one name with different memory in use (error correction on and off?): {values}",
        speeds.several_memory_sizes,
    ),
    Rule(
        "several_segments",
        ALARM,
        "speed",
        "interrupted and continued, so each piece warmed up again: {names}",
        speeds.interrupted,
    ),
    Rule("mixed_batch_size", ALARM, "speed", "speeds at different batch sizes: {values}", speeds.several_batch_sizes),
    Rule(
        "mixed_num_processes",
        ALARM,
        "speed",
        "speeds at different numbers of processes on one CPU: {values}",
        speeds.several_process_counts,
    ),
    Rule(
        "speed_outlier",
        ALARM,
        "speed",
        "{names} took {ratio} times as long as {peers} for the same {work}: its speed was measured under other "
        "conditions",
        speeds.outliers_of_columns,
    ),
    Rule(
        "reuse_slower",
        ALARM,
        "speed",
        "k = {k} is slower than k = 1 on the same hardware ({ratio} times its tokens/s): this reuse saved nothing",
        speeds.slower_than_without_reuse,
    ),
    # foreign results
    Rule(
        "earlier_form",
        NOTE,
        "provenance",
        "imported or from an earlier runner, no result of this code; not recorded: {lacking}",
        files.not_recorded,
    ),
    Rule("no_throughput", NOTE, "speed", "tokens and seconds are not recorded: {names}", files.without_time),
    Rule(
        "dirty_checkout",
        NOTE,
        "provenance",
        "ran from a checkout with uncommitted changes, so the commit does not say which code: {names}",
        files.uncommitted_changes,
    ),
)

RULES_ACROSS: tuple[Rule, ...] = (
    Rule(
        "plain_differs",
        ALARM,
        "accuracy",
        "{names} and {other} are plain decoding with the same settings, but {flips} answers differ",
        answers.plain_differs,
    ),
    Rule(
        "accuracies_of_another_table",
        ALARM,
        "accuracy",
        "all {total} accuracies are those of {older} to the digit, though {changed} of its configurations wrote other "
        "answers (other token counts; by chance: {chance}): probably an older results file was read again",
        answers.accuracies_of_another_table,
    ),
    *(
        Rule(
            kind,
            ALARM,
            "accuracy",
            "the experiments differ in " + what + " ({fact}): {values}",
            partial(settings.experiments_differ, facts=facts),
        )
        for kind, what, facts in SAME_FACTS
    ),
    Rule(
        "speed_outlier",
        ALARM,
        "speed",
        "{names} took up to {ratio} times as long as the very same forwards in {peers}: {whose} measured under other "
        "conditions",
        speeds.outliers_across,
    ),
)


def _alarms(rule: Rule, matches: Iterator[Match], table: str = "") -> Iterator[Alarm]:
    for match in matches:
        text = rule.words.format(names=listed(match.configs), **match.values)
        yield Alarm(rule.kind, match.table or table, match.configs, rule.spoils, text, rule.level)


def find_alarms(tables: list[ResultTable]) -> list[Alarm]:
    """All alarms and notes of the tables: alarms first, then by table."""
    alarms: list[Alarm] = []
    for table in tables:
        for rule in TABLE_RULES:
            alarms += _alarms(rule, rule.condition(table), table.label)
    for rule in RULES_ACROSS:
        alarms += _alarms(rule, rule.condition(tables))
    return sorted(alarms, key=lambda alarm: alarm.level != ALARM)
