"""Judges the result of a run: is there one, is it whole, and is it of today's code, the settings and the model?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fast_dllm.record.summary import (
    AS_THE_SCRIPTS_RUN,
    EARLIER,
    SUMMARY_FILE,
    Summary,
    SummaryError,
    read_summary,
)
from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.files import is_newer, printable, set_aside
from fast_dllm.spec.hashes import decoding_sha256, policy_sha256, replays
from fast_dllm.spec.request import Request, Run


@dataclass(frozen=True)
class Judgement:
    """The state of a run's result.

    state: "complete", EARLIER (complete, but from the lab's first runner), "stale" (whole, but of other code or
    settings), "corrupt", or "pending" (no file). detail: an explanation for people. other_model: whether it is whole,
    but of another model than the request's. summary: None if there is none that can be read.
    """

    state: str
    detail: str = ""
    other_model: bool = False
    summary: Summary | None = None

    @property
    def is_whole(self) -> bool:
        return self.state in ("complete", EARLIER, "stale")

    @property
    def is_complete(self) -> bool:
        return self.state in ("complete", EARLIER)


class Judge:
    """Judges the runs of one request. The hashes of today's code are computed once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.policy = policy_sha256(request.code_root, request.experiment)
        self.replays = replays(request.code_root)
        self._decoding: dict[bool, str] = {}

    def decoding(self, scored: bool) -> str:
        """Today's decoding hash, for scored tasks or for the others."""
        if scored not in self._decoding:
            self._decoding[scored] = decoding_sha256(self.request.code_root, scored)
        return self._decoding[scored]

    def judge(self, run: Run) -> Judgement:
        """The state of the run's result.

        It is that of the summary in results/. If there is none, it is that of the copy in artifacts/, unless the run
        was begun again after the copy was made.
        """
        root = self.request.root
        for top, remark in (("results", ""), ("artifacts", "only in artifacts/")):
            path = root / top / run.path / SUMMARY_FILE
            try:
                summary, fault = read_summary(path), ""
            except SummaryError as error:
                summary, fault = None, str(error)
            if summary is None and not fault:
                continue
            if top == "results" or not is_newer(root / "results" / run.path / "job.json", path):
                return self._judge(run, path, summary, fault, remark)
        return Judgement("pending")

    def _judge(self, run: Run, path: Path, summary: Summary | None, fault: str, remark: str) -> Judgement:
        fault = fault if summary is None else summary.fault_for(run)
        if summary is None or fault:
            return Judgement("corrupt", f"corrupt: {fault}", summary=summary)
        other_model = self.request.model is not None and summary.model != self.request.model
        reason = self._stale(run, path, summary, other_model)
        if reason:
            return Judgement("stale", f"stale: {printable(reason)}", other_model, summary)
        remarks = [remark, summary.origin]
        if summary.is_foreign:
            remarks += [f"{name} {ran}" for name, ran, _ in summary.differences(run.arguments)]
        if self.request.model is None and summary.model != DEFAULT_MODEL:
            remarks.append(f"model {summary.model}")
        if not summary.is_foreign and not self._engine_is_known(run, summary):
            remarks.append("engine changed, replay not recorded")
        detail = printable(", ".join(filter(None, remarks)))
        if summary.is_foreign:
            return Judgement(EARLIER, f"{detail}; --force runs it again", False, summary)
        return Judgement("complete", detail, False, summary)

    def _stale(self, run: Run, path: Path, summary: Summary, other_model: bool) -> str:
        """Why a whole result is not what the run would compute today; "" if it is."""
        differences = summary.differences({**AS_THE_SCRIPTS_RUN, **run.arguments})
        differing = [f"{name} {ran}, not {wanted}" for name, ran, wanted in differences]
        if differing and not summary.is_foreign:
            return f"it ran with {', and '.join(differing)}"
        if other_model:
            return f"it ran with model {summary.model}, not {self.request.model}"
        if summary.is_foreign:
            return ""
        if summary.generation_code_sha256 != self.policy:
            return "generation code changed since it ran"
        weights = self.request.root / "models" / "tiny" / "model.safetensors"
        if summary.model == "tiny" and path.parts[-5] == "results" and is_newer(weights, path):
            return "models/tiny changed since it ran"
        return ""

    def _engine_is_known(self, run: Run, summary: Summary) -> bool:
        """Whether the result's engine is today's, or one that is recorded to give this experiment's transcript."""
        ran = summary.decoding_sha256
        return ran == self.decoding(run.task.is_scored) or run.experiment in self.replays.get(str(ran), ())


def fault_of_new(folder: Path, run: Run) -> str:
    """Why the summary in a run's folder is not a complete one, written after job.json; "" if it is."""
    try:
        summary = read_summary(folder / SUMMARY_FILE)
    except SummaryError as error:
        return str(error)
    if summary is None:
        return "no file"
    fault = summary.fault_for(run)
    return fault or ("" if is_newer(folder / SUMMARY_FILE, folder / "job.json") else "it is of a run before this one")


def set_aside_foreign(path: Path, run: Run) -> None:
    """Rename a summary that is not a result of this code for this run, so that it is not overwritten.

    One of the lab's first runner becomes summary.earlier.json, one that is not whole summary.corrupt.json.
    """
    try:
        summary = read_summary(path)
    except SummaryError:
        set_aside(path, "corrupt")
        return
    if summary is not None and summary.fault_for(run):
        set_aside(path, "corrupt")
    elif summary is not None and summary.is_foreign:
        set_aside(path, EARLIER)
