"""summary.json: what one run was, what it scored and what it cost. The only reader and the only writer of the file.

    results/<experiment>/<task>[_limit_<N>]/<configuration>/results.json   everything that lm_eval returned
    results/<experiment>/<task>[_limit_<N>]/<configuration>/summary.json   the run on one page; written last, so a whole
                                                                           one marks the run complete

The lab's first runner wrote another form ("earlier", below): no schema version, fewer facts. It is converted when it is
read; what it does not record is None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Mapping, Sequence

from fast_dllm.record.schema import check_fields, parse_subtasks, parse_throughput
from fast_dllm.record.scores import Score
from fast_dllm.record.throughput import Throughput
from fast_dllm.spec.files import as_object, printable, read_json, write_json
from fast_dllm.spec.hashes import file_sha256
from fast_dllm.spec.request import Run
from fast_dllm.spec.tasks import TASKS, task_of
from fast_dllm.spec.values import canonical

SCHEMA_VERSION = 1
SUMMARY_FILE, RESULTS_FILE, QUESTIONS_FILE = "summary.json", "results.json", "questions.json.gz"
MOST_SUMMARY_BYTES = 4 * 2**20
EARLIER = "earlier"  # the state of a result of the lab's first runner, and what a copy of it is called

# Everything beside the task, the limit and the model arguments that lm_eval is given and that can change an answer or a
# score, as the scripts run it. A summary that does not record one of these ran like this.
AS_THE_SCRIPTS_RUN: Mapping[str, object] = {
    "chat_template": True,
    "fewshot_as_multiturn": True,
    "system_instruction": None,
    "gen_kwargs": None,
    "samples": None,
    "seeds": [0, 1234, 1234, 1234],
}


class SummaryError(ValueError):
    """Why a file is no summary; one printable line."""


@dataclass(frozen=True)
class Summary:
    """One run. The fields are the keys of summary.json, in the file's order; None: not recorded, or there is none.

    num_samples: questions scored; num_samples_expected: questions that lm_eval was to score. limit: questions that were
    asked for, None for all. gen_kwargs, samples: as given to lm_eval. seeds: random, numpy, torch, few-shot.
    num_shares: shards that answered something. num_segments: how often the run was begun.
    """

    experiment: str | None = None
    task: str | None = None
    config: str | None = None
    limit: float | None = None
    num_samples: int | None = None
    num_samples_expected: int | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    metric: str | None = None
    generation_code_sha256: str | None = None
    decoding_sha256: str | None = None
    model_args: Mapping[str, object] = field(default_factory=dict)
    subtasks: Mapping[str, Score] = field(default_factory=dict)
    throughput: Throughput = field(default_factory=Throughput)
    num_fewshot: int | None = None
    chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, object] | None = None
    samples: Mapping[str, object] | None = None
    seeds: list | None = None
    num_processes: int | None = None
    num_shares: int | None = None
    num_segments: int | None = None
    num_layers: int | None = None
    model_revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    gpu: str | None = None
    graphs: str | None = None
    num_threads: int | None = None
    peak_memory_bytes: int | None = None
    git_commit: str | None = None
    git_branch: str | None = None
    git_dirty: bool | None = None
    sandbox: str | None = None  # where the model's programs were executed; only where a score needed it
    host: str | None = None
    slurm_job_id: str | None = None
    python: str | None = None
    packages: Mapping[str, object] = field(default_factory=dict)
    seconds_loading: float | None = None
    start_time: str | None = None
    end_time: str | None = None
    results_sha256: str | None = None
    questions_sha256: str | None = None
    summary_sha256: str | None = None  # over all other keys of the file
    # Not in the file:
    is_foreign: bool = False  # of the lab's first runner
    is_edited: bool = False  # the file does not fit its own summary_sha256
    is_scored: bool = False  # the answers are choices by log-likelihood; no text was generated
    gpu_memory_gb: float | None = None  # only the lab's first runner recorded it

    # -- what a result is ----------------------------------------------------------------------------------------------
    @property
    def model(self) -> object:
        return self.model_args.get("model_path")

    @property
    def full_forwards(self) -> float | None:
        """Full-depth forwards: the layers that ran / the layers of the model; None where they are not recorded."""
        layers = sum(self.throughput.layer_forwards.values())
        return layers / self.num_layers if layers and self.num_layers else None

    @property
    def num_questions(self) -> int | None:
        """Questions scored; where they are not recorded, those that the task and the limit say, or None."""
        if not self.is_foreign:
            return self.num_samples
        return _num_questions(self.task or "", self.limit)

    @property
    def origin(self) -> str:
        """For people: where a result comes from that was not made by this code's runner."""
        if not self.is_foreign:
            return ""
        return f"from an {EARLIER} runner: {100 * (self.accuracy or 0):.1f}%, which code is not recorded"

    def settings(self) -> dict[str, object]:
        """What can change an answer or a score: model arguments, num_fewshot and AS_THE_SCRIPTS_RUN's."""
        settings: dict[str, object] = {**self.model_args, "num_fewshot": self.num_fewshot}
        for name, usual in AS_THE_SCRIPTS_RUN.items():
            value = getattr(self, name)
            settings[name] = usual if value is None else value
        return settings

    def differences(self, wanted: Mapping[str, object]) -> list[tuple[str, str, str]]:
        """(setting, what this ran with, what is wanted), of those wanted settings that this records."""
        ran = self.settings()
        if not self.is_foreign and "refresh" in wanted:
            ran.setdefault("refresh", "rows")  # what the code did before it had this knob
        different = []
        for name, value in wanted.items():
            if name not in ran or (name == "num_fewshot" and ran[name] is None):
                continue
            was, expected = setting_text(ran[name]), setting_text(value)
            if was != expected:
                different.append((name, _shortened(was), _shortened(expected)))
        return different

    def other_identity(self, settings: Mapping[str, object], ignored: Sequence[str] = ()) -> list[str]:
        """The differences from a run with these fields, like "threshold 0.9, not 0.5"; for a hash only its name.

        settings: fields of a Summary. ignored: model arguments that change no answer.
        """
        ran = {**{name: getattr(self, name) for name in settings}, **self.settings()}
        wanted = {**settings, **as_object(settings.get("model_args"))}
        changed = []
        for name in wanted:
            if name == "model_args" or name in ignored or name not in ran:
                continue
            texts = setting_text(ran[name]), setting_text(wanted[name])
            if texts[0] != texts[1]:
                shown = f"{name} {_shortened(texts[0])}, not {_shortened(texts[1])}"
                changed.append(name if name in _HASHES else printable(shown))
        return changed

    def fault_for(self, run: Run) -> str:
        """Why this is no complete result of the run; "" when it is. Code, model and settings are not looked at."""
        size = run.task.size(run.limit)
        for name, word, wanted in (
            ("experiment", "experiment", run.experiment),
            ("task", "task", run.task.name),
            ("config", "configuration", run.folder),
        ):
            value = getattr(self, name)
            if value != wanted and not (self.is_foreign and name == "experiment" and value is None):
                return f"it is of {word} '{_plain(value)}'"
        if self.limit != run.limit:
            return f"it has limit '{json.dumps(self.limit)}'"
        if not self.is_foreign:
            if not self.num_samples or self.num_samples != self.num_samples_expected:
                return f"{json.dumps(self.num_samples)} of {json.dumps(self.num_samples_expected)} samples"
            if size is not None and size != self.num_samples:
                return f"{self.num_samples} samples, the task has {size}"
        if self.accuracy is None:
            return "the accuracy is 'null'"
        return ""

    # -- writing -------------------------------------------------------------------------------------------------------
    def as_json(self) -> dict[str, object]:
        """The content of summary.json. Top-level scalars come first, one a line, for people and grep."""
        content: dict[str, object] = {"schema_version": SCHEMA_VERSION}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _NOT_WRITTEN or (value is None and each.name in _ONLY_WITH_VALUE):
                continue
            content[each.name] = dict(value) if isinstance(value, Mapping) else value
        content["throughput"] = self.throughput.as_json()
        content["subtasks"] = {
            name: {
                "accuracy": score.accuracy,
                "accuracy_stderr": score.stderr,
                "metric": score.metric,
                "num_samples": score.num_samples,
            }
            for name, score in self.subtasks.items()
        }
        return content

    def sealed(self, folder: Path) -> Summary:
        """With the hashes of the results and questions files in `folder`, and one over the summary's own content: a
        number that is corrected by hand is seen."""
        results, questions = (file_sha256(folder / name) for name in (RESULTS_FILE, QUESTIONS_FILE))
        sealed = replace(self, results_sha256=results, questions_sha256=questions)
        return replace(sealed, summary_sha256=content_sha256(sealed.as_json()))

    def write(self, folder: Path) -> None:
        """Write the sealed summary into the run's folder, whole or not at all."""
        write_json(folder / SUMMARY_FILE, self.sealed(folder).as_json())


_NOT_WRITTEN = ("is_foreign", "is_edited", "is_scored", "gpu_memory_gb")
_HASHES = ("model_revision", "generation_code_sha256")
_ONLY_WITH_VALUE = ("sandbox", "results_sha256", "questions_sha256", "summary_sha256")


def setting_text(value: object) -> str:
    """One way to write a setting: "max_gen_toks=4" for an object, "None" for an empty one, "0.8" for 0.80."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={canonical(value[name])}" for name in sorted(value)) or canonical(None)
    return canonical(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def content_sha256(content: Mapping[str, object]) -> str:
    """The SHA-256 of a summary's content without `summary_sha256`. Order and spacing do not change it."""
    rest = {key: value for key, value in content.items() if key != "summary_sha256"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: object) -> str:
    """A value as it is in the file; a string without its quotes."""
    return printable(value) if isinstance(value, str) else json.dumps(value)


# -- reading -----------------------------------------------------------------------------------------------------------
def read_summary(path: Path) -> Summary | None:
    """The Summary in a file; None where there is no file. Raises SummaryError."""
    content, fault = read_json(path, MOST_SUMMARY_BYTES)
    if content is None and not fault:
        return None
    if content is None:
        raise SummaryError(f"not valid JSON, {fault}")
    return parse_summary(content)


def parse_summary(content: Mapping[str, object]) -> Summary:
    """The Summary of a file's content, of either form. Raises SummaryError."""
    try:
        if _is_earlier_form(content):
            return _from_earlier_form(content)
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema version '{_plain(content.get('schema_version', ''))}', not {SCHEMA_VERSION}")
        cost = parse_throughput(content.get("throughput"))
        values = {**check_fields(content), "subtasks": parse_subtasks(content.get("subtasks"))}
    except ValueError as error:
        raise SummaryError(str(error)) from None
    seal = content.get("summary_sha256")
    return Summary(
        **values,
        throughput=cost,
        is_edited=seal is not None and seal != content_sha256(content),
        is_scored=bool(cost.scored_requests) and not cost.requests,
    )


# -- the lab's first runner --------------------------------------------------------------------------------------------
# Keys that only a summary of this runner has: one that lost its schema version does not pass for the other form.
_NOT_EARLIER = ("experiment", "num_samples", "generation_code_sha256")


def _is_earlier_form(content: Mapping[str, object]) -> bool:
    return "schema_version" not in content and "accuracy" in content and not any(key in content for key in _NOT_EARLIER)


def _from_earlier_form(content: Mapping[str, object]) -> Summary:
    """Raises ValueError."""
    cost, git, gpu, machine, parameters = (
        as_object(content.get(name)) for name in ("throughput", "git", "gpu_info", "environment", "eval_params")
    )
    arguments = {name: value for name, value in as_object(content.get("model_args")).items() if name != "show_speed"}
    tokens = cost.get("tokens_generated") or None
    values = check_fields(
        {
            "experiment": arguments.get("experiment_name"),
            "task": content.get("task"),
            "config": content.get("config"),
            "limit": parameters.get("limit"),
            "accuracy": content["accuracy"],
            "model_args": {**arguments, "batch_size": parameters.get("batch_size")},
            "num_fewshot": parameters.get("num_fewshot"),
            "gpu": gpu.get("gpu_name"),
            "git_commit": git.get("commit"),
            "git_branch": git.get("branch"),
            "git_dirty": git.get("dirty"),
            "host": machine.get("hostname"),
            "slurm_job_id": machine.get("slurm_job_id"),
            "python": machine.get("python_version"),
            "packages": {"torch": machine.get("torch_version")},
            "end_time": content.get("timestamp"),
        }
    )
    memory = gpu.get("gpu_total_vram_gb")
    return Summary(
        **values,
        throughput=parse_throughput(
            {
                "new_tokens": tokens,
                "seconds_generating": cost.get("total_time_s"),
                "tokens_per_second": cost.get("tokens_per_s"),
            }
        ),
        is_foreign=True,
        is_scored=tokens is None and (_is_scored_task(values["task"]) or _has_choices(content)),
        gpu_memory_gb=float(memory) if isinstance(memory, (int, float)) else None,
    )


def _is_scored_task(name: object) -> bool:
    task = task_of(str(name))
    return task is not None and task.is_scored


def _has_choices(content: Mapping[str, object]) -> bool:
    """The metric of its group is lm_eval's `acc`: the accuracy of the likeliest choice."""
    groups = as_object(content.get("group_results")).values()
    return any(name.startswith("acc,") for group in groups for name in as_object(group))


def _num_questions(name: str, limit: float | None) -> int | None:
    """The questions of a task with a limit; None where that would be a guess."""
    task = TASKS.get(name)
    size = task.questions if task else None
    if limit is None:
        return size
    if limit < 1:
        return None
    if task and task.subtasks:  # the limit counts for each
        return int(limit) * task.subtasks if limit <= task.smallest_subtask else None
    return int(limit if size is None else min(limit, size))
