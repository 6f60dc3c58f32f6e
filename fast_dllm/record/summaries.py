"""Is a summary.json a complete result of what its folder says, and of today's code?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.files import as_object, is_newer, read_json
from fast_dllm.spec.hashes import decoding_sha256, policy_sha256, replays
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.values import canonical

SCHEMA_VERSION = 1
QUESTIONS_FILE = "questions.json.gz"  # what each question got; see fast_dllm/record/questions.py
# Keys that a summary of this code has and one of the lab's earlier runner has not: a file that lost its schema version
# does not pass for one of those.
_NOT_EARLIER = ("experiment", "num_samples", "generation_code_sha256", "fast_dllm_sha256")


@dataclass(frozen=True)
class Judgement:
    """state: complete, earlier (of the lab's runner before this one), stale, corrupt; pending where there is no file.

    detail: for people. other_model: it is whole, but of another model than was asked for. content: the summary.
    """

    state: str
    detail: str = ""
    other_model: bool = False
    content: Mapping[str, object] | None = None

    @property
    def is_whole(self) -> bool:
        return self.state in ("complete", "earlier", "stale")

    @property
    def is_complete(self) -> bool:
        return self.state in ("complete", "earlier")


class Judge:
    """Judges the runs of one request; what today's code is, is read once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.policy = policy_sha256(request.code_root, request.experiment)
        self.replays = replays(request.code_root)
        self._decoding: dict[bool, str] = {}

    def decoding(self, scored: bool) -> str:
        if scored not in self._decoding:
            self._decoding[scored] = decoding_sha256(self.request.code_root, scored)
        return self._decoding[scored]

    def judge(self, run: Run) -> Judgement:
        """What is in results/; where nothing is, in artifacts/, unless another run has begun since that was kept."""
        root = self.request.root
        for top, remark in (("results", ""), ("artifacts", "only in artifacts/")):
            path = root / top / run.path / "summary.json"
            content, fault = read_json(path)
            if content is None and not fault:
                continue
            if top == "results" or not is_newer(root / "results" / run.path / "job.json", path):
                return self._judge(run, path, content, fault, remark)
        return Judgement("pending")

    def _judge(self, run: Run, path: Path, content: dict | None, fault: str, remark: str) -> Judgement:
        if content is None:
            return Judgement("corrupt", f"corrupt: not valid JSON, {fault}")
        earlier = is_earlier(content)
        reason = (earlier_fault if earlier else fault_of)(content, run)
        if reason:
            return Judgement("corrupt", f"corrupt: {reason}")
        model = as_object(content.get("model_args")).get("model_path")
        other = self.request.model is not None and model != self.request.model
        reason = self._stale(run, path, content, model, earlier)
        if reason:
            return Judgement("stale", f"stale: {reason}", other, content)
        if earlier:
            told = f"from an earlier runner: {100 * content['accuracy']:.1f}%, which code is not recorded"
            others = [f"{name} {was}" for name, was, _ in differences(content, run, earlier=True)]
            detail = ", ".join(filter(None, [remark, told, *others, *self._other_model(model)]))
            return Judgement("earlier", f"{detail}; --force runs it again", False, content)
        remarks = [remark, *self._other_model(model)]
        if not self._engine_is_known(run, content):
            remarks.append("engine changed, replay not recorded")
        return Judgement("complete", ", ".join(filter(None, remarks)), False, content)

    def _other_model(self, model: object) -> list[str]:
        """Not what these scripts run unless told to, and nobody asked for another here: say so."""
        return [f"model {model}"] if self.request.model is None and model != DEFAULT_MODEL else []

    def _stale(self, run: Run, path: Path, content: Mapping, model: object, earlier: bool) -> str:
        differing = [f"{name} {was}, not {wanted}" for name, was, wanted in differences(content, run)]
        if differing and not earlier:
            return f"it ran with {', and '.join(differing)}"
        if self.request.model is not None and model != self.request.model:
            return f"it ran with model {model}, not {self.request.model}"
        if earlier:
            return ""
        if content.get("generation_code_sha256") != self.policy:
            return "generation code changed since it ran"
        weights = self.request.root / "models" / "tiny" / "model.safetensors"
        if model == "tiny" and path.parts[-5] == "results" and is_newer(weights, path):
            return "models/tiny changed since it ran"
        return ""

    def _engine_is_known(self, run: Run, content: Mapping) -> bool:
        """The engine is today's, or one that was seen to give this experiment's transcript."""
        ran = content.get("decoding_sha256")
        return ran == self.decoding(run.task.is_scored) or run.experiment in self.replays.get(str(ran), ())


def differences(content: Mapping, run: Run, earlier: bool = False) -> list[tuple[str, str, str]]:
    """(argument, what it ran with, what its folder should have run), of those that the summary tells."""
    ran = dict(as_object(content.get("model_args")))
    examples = (as_object(content.get("eval_params")) if earlier else content).get("num_fewshot")
    if examples is not None:
        ran["num_fewshot"] = examples
    if not earlier and "refresh" in run.arguments:
        ran.setdefault("refresh", "rows")  # what the code did before it had this knob
    return [
        (name, canonical(ran[name]), canonical(wanted))
        for name, wanted in run.arguments.items()
        if name in ran and canonical(ran[name]) != canonical(wanted)
    ]


# -- whole, and of this run? -------------------------------------------------------------------------------------------
def _told(content: Mapping, name: str) -> str:
    """A value as it stands in the file; a string without its quotes, nothing where there is none."""
    value = content.get(name, "")
    return value if isinstance(value, str) else json.dumps(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def fault_of(content: Mapping, run: Run) -> str:
    """Why a summary is not a complete result of this run; "" when it is."""
    if content.get("schema_version") != SCHEMA_VERSION:
        return f"schema version '{_told(content, 'schema_version')}', not {SCHEMA_VERSION}"
    samples, expected = content.get("num_samples"), content.get("num_samples_expected")
    size = run.task.size(run.limit)
    for name, word, wanted in (("experiment", "experiment", run.experiment), ("task", "task", run.task.name)):
        if content.get(name) != wanted:
            return f"it is of {word} '{_told(content, name)}'"
    if content.get("limit", "") != run.limit:
        return f"it has limit '{json.dumps(content.get('limit', ''))}'"
    if content.get("config") != run.folder:
        return f"it is of configuration '{_told(content, 'config')}'"
    if not _is_count(samples) or samples != expected:
        return f"{json.dumps(samples)} of {json.dumps(expected)} samples"
    if size is not None and size != expected:
        return f"{expected} samples, the task has {size}"
    if not _is_share(content.get("accuracy")):
        return f"the accuracy is '{json.dumps(content.get('accuracy'))}'"
    return ""


def is_earlier(content: Mapping) -> bool:
    """Of the form that the lab's runner before this one wrote: no schema version, and none of this one's keys."""
    return "schema_version" not in content and "accuracy" in content and not any(key in content for key in _NOT_EARLIER)


def earlier_fault(content: Mapping, run: Run) -> str:
    """Why such a summary is not a result of this run; it must name its task and configuration and have a number."""
    experiment = as_object(content.get("model_args")).get("experiment_name", run.experiment)
    limit = as_object(content.get("eval_params")).get("limit")
    if content.get("task") != run.task.name:
        return f"it is of task '{_told(content, 'task')}'"
    if content.get("config") != run.folder:
        return f"it is of configuration '{_told(content, 'config')}'"
    if experiment not in (run.experiment, None):
        return f"it is of experiment '{experiment}'"
    if "eval_params" in content and limit != run.limit:
        return f"it has limit '{json.dumps(limit)}'"
    if not _is_share(content.get("accuracy")):
        return f"the accuracy is '{json.dumps(content.get('accuracy'))}'"
    return ""
