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
from fast_dllm.report.speeds import hardware, processes_on_cpu
from fast_dllm.report.words import fact_of, listed

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
    """spoils: the claim that it forbids. condition: takes one table (TABLE_RULES) or all (RULES_ACROSS) and yields a
    Match for each place. words: a format string; {names} are the configurations, the other fields come from the Match.
    """

    kind: str
    level: str
    spoils: str
    condition: Callable[..., Iterator[Match]]
    words: str


# Facts that must be the same in a whole table, and in all tables of a picture: (kind, what differs, facts to compare).
SAME_FACTS = (
    ("mixed_model", "models", ("model", "model_revision")),
    ("mixed_dtype", "dtypes", ("dtype",)),
    ("mixed_device", "devices", ("device",)),
    ("mixed_task_version", "versions of the task", ("task_version", "prompts", "metric")),
    ("mixed_prompting", "ways to prompt",
     ("num_fewshot", "chat_template", "fewshot_as_multiturn", "system_instruction")),
    ("mixed_generation", "generation settings", ("gen_kwargs",)),
    ("mixed_samples", "choices of questions", ("samples",)),
)  # fmt: skip
ONE_COMPUTATION = "k = {k}: {names} are one computation ({why}), {difference}"
SAME_ANSWERS = "{names} gave the same answers with the same work: "

# A rule is two or three lines: its kind, level, claim and condition; then its sentence.
# fmt: off
TABLE_RULES: tuple[Rule, ...] = (
    # the files
    Rule("corrupt", ALARM, "accuracy", files.left_out, "{names}: corrupt, left out: {reason}"),
    *(
        Rule(kind, ALARM, "accuracy", partial(files.file_faults, kind=kind), "{names}: " + what + ": {reason}")
        for kind, what in (
            ("hand_edited", "changed by hand"),
            ("copies_differ", "two different files"),
            ("not_a_count", "an accuracy that no run can have"),
            ("mixed_limit", "another number of questions than its folder says"),
        )
    ),
    Rule("missing", ALARM, "accuracy", files.missing, "{count} of {total} configurations {have} no result: {names}"),
    Rule("stale", ALARM, "provenance", files.stale,
         "stale, its generation code is no longer the experiment's: {names}"),
    # answers
    Rule("too_few_questions", ALARM, "accuracy", answers.too_few_questions,
         "{total} questions are too few for any claim: they can show {shown} (80% power, 10% of answers changing)"),
    Rule("loglikelihood_reuse", ALARM, "reuse", answers.reuse_of_scored_task,
         "{task} is scored by log-likelihood, where nothing can be reused: {what}"),
    Rule("equal_tokens", ALARM, "accuracy", answers.equal_tokens,
         "k = {k}: {tokens} tokens each, so the same answers, and yet other accuracies ({accuracies}): these numbers "
         "cannot be of the same answers"),
    Rule("k1_differs", ALARM, "accuracy", partial(answers.column_differences, kind="k1_differs"), ONE_COMPUTATION),
    Rule("columns_differ", ALARM, "accuracy", partial(answers.column_differences, kind="columns_differ"),
         ONE_COMPUTATION),
    Rule("columns_alike", NOTE, "reuse", partial(answers.column_differences, kind="columns_alike"),
         "k = {k}: {names} cannot be told apart: {difference}"),
    *(
        Rule("identical_answers", level, "reuse",
             partial(answers.layers_without_effect, really_skipped=level == ALARM),
             "k = {k}: " + SAME_ANSWERS + "the choice of layers had no effect")
        for level in (ALARM, NOTE)
    ),
    Rule("identical_answers", ALARM, "reuse", answers.no_setting_has_effect,
         SAME_ANSWERS + "none of {count} settings had any effect"),
    Rule("identical_answers", ALARM, "reuse", partial(answers.setting_without_effect, differs_in_k=True),
         SAME_ANSWERS + "reuse had no effect"),
    Rule("identical_answers", NOTE, "reuse", partial(answers.setting_without_effect, differs_in_k=False),
         SAME_ANSWERS + "the setting had no effect, or too few questions show one"),
    Rule("unexplained_difference", ALARM, "accuracy", answers.unexplained_difference,
         "{config} ({accuracy}) differs from {base} ({base_accuracy}), but reused nothing and skipped no layer: no "
         "forward explains it"),
    Rule("answers_never_stop", ALARM, "accuracy", answers.answers_never_stop,
         "answers ran on to the limit of {longest} tokens instead of ending: {lengths}"),
    # one table, one thing
    Rule("mixed_code", ALARM, "accuracy", settings.mixed_code, "mixed code in one table, {count} {what}: {values}"),
    Rule("name_contradicts", ALARM, "accuracy", settings.contradicting_names,
         "{names} ran with {argument} = {value}, its name says {expected}"),
    Rule("mixed_arguments", ALARM, "accuracy", settings.mixed_arguments, "mixed {argument} in one table: {values}"),
    Rule("mixed_limit", ALARM, "accuracy", settings.several_limits, "different limits in one table: {values}"),
    Rule("mixed_questions", ALARM, "accuracy", settings.several_question_counts,
         "different numbers of questions in one table: {values}"),
    Rule("mixed_task", ALARM, "accuracy", settings.several_tasks, "different tasks in one table: {values}"),
    *(
        Rule(kind, ALARM, "accuracy", partial(settings.several_values, facts=facts),
             "different " + what + " in one table ({fact}): {values}")
        for kind, what, facts in (*SAME_FACTS, ("mixed_seeds", "seeds", ("seeds",)))
    ),
    *(
        Rule("mixed_versions", NOTE, "provenance", partial(settings.several_values, facts=(package,)),
             "different versions of {fact}: {values}")
        for package in ("torch", "lm_eval")
    ),
    # speeds
    Rule("mixed_gpu", ALARM, "speed", partial(speeds.several_values, value_of=hardware),
         "speeds from different hardware: {values}"),
    Rule("gpu_memory", NOTE, "speed", speeds.several_memory_sizes,
         "GPUs of one name with different memory in use (error correction on and off?): {values}"),
    Rule("several_segments", ALARM, "speed", speeds.interrupted,
         "interrupted and continued, so each piece warmed up again: {names}"),
    Rule("mixed_batch_size", ALARM, "speed", partial(speeds.several_values, value_of=fact_of("batch_size")),
         "speeds at different batch sizes: {values}"),
    Rule("mixed_num_processes", ALARM, "speed", partial(speeds.several_values, value_of=processes_on_cpu),
         "speeds at different numbers of processes on one CPU: {values}"),
    Rule("speed_outlier", ALARM, "speed", speeds.outliers_of_columns,
         "{names} took {ratio} times as long as {peers} for the same {work}: its speed was measured under other "
         "conditions"),
    Rule("reuse_slower", ALARM, "speed", speeds.slower_than_without_reuse,
         "k = {k} is slower than k = 1 on the same hardware ({ratio} times its tokens/s): this reuse saved nothing"),
    # foreign results
    Rule("earlier_form", NOTE, "provenance", files.not_recorded,
         "imported or from an earlier runner, no result of this code; not recorded: {lacking}"),
    Rule("no_throughput", NOTE, "speed", files.without_time, "tokens and seconds are not recorded: {names}"),
    Rule("dirty_checkout", NOTE, "provenance", files.uncommitted_changes,
         "ran from a checkout with uncommitted changes, so the commit does not say which code: {names}"),
)

RULES_ACROSS: tuple[Rule, ...] = (
    Rule("plain_differs", ALARM, "accuracy", answers.plain_differs,
         "{names} and {other} are plain decoding with the same settings, but {flips} answers differ"),
    Rule("accuracies_of_another_table", ALARM, "accuracy", answers.accuracies_of_another_table,
         "all {total} accuracies are those of {older} to the digit, though {changed} of its configurations wrote other "
         "answers (other token counts; by chance: {chance}): probably an older results file was read again"),
    *(
        Rule(kind, ALARM, "accuracy", partial(settings.experiments_differ, facts=facts),
             "the experiments differ in " + what + " ({fact}): {values}")
        for kind, what, facts in SAME_FACTS
    ),
    Rule("speed_outlier", ALARM, "speed", speeds.outliers_across,
         "{names} took up to {ratio} times as long as the very same forwards in {peers}: {whose} measured under other "
         "conditions"),
)
# fmt: on


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
