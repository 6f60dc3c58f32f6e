"""Results that outlive results/: copies in git-tracked artifacts/, and old files that are kept beside new ones."""

from __future__ import annotations

from pathlib import Path

from fast_dllm.record.judgement import set_aside_foreign
from fast_dllm.record.summary import QUESTIONS_FILE, SummaryError, read_summary
from fast_dllm.runner.messages import say
from fast_dllm.runner.records import folder_of
from fast_dllm.spec.files import copy_whole, is_same, write_whole
from fast_dllm.spec.hashes import file_sha256, policy_file
from fast_dllm.spec.matrix import GENERATION_FILE
from fast_dllm.spec.request import Request, Run


def keep(request: Request, run: Run) -> None:
    """Copy a run's summary, its questions and its policy to artifacts/, which is tracked: results/ may be purged.

    The questions go first, so that a summary in artifacts/ always has them. Nothing is copied for a shard. Where
    artifacts/ cannot be written, one line says so and the result stays in results/.
    """
    source = folder_of(request, run) / "summary.json"
    if request.shard is not None or not source.is_file():
        return
    target = request.root / "artifacts" / run.path / "summary.json"
    try:
        questions = source.with_name(QUESTIONS_FILE)
        if questions.is_file():
            copy_whole(questions, target.with_name(QUESTIONS_FILE))
        _keep_policy(request, run, source)
        if not is_same(source, target):
            set_aside_foreign(target, run)
            write_whole(target, source.read_bytes())
    except OSError as error:
        say(f"== {run.path}: artifacts/ cannot be written ({error.strerror}); the result is in results/ alone")


def _keep_policy(request: Request, run: Run, summary: Path) -> None:
    """Copy the policy that a summary is of to artifacts/code/<its SHA-256>.py, once for all runs of it.

    The run left the text beside its summary; where it did not, the experiment's text will do while it is unchanged.
    """
    try:
        content = read_summary(summary)
    except SummaryError:
        return
    sha256 = content and content.generation_code_sha256
    if not sha256:
        return  # not recorded: the lab's first runner
    target = request.root / "artifacts" / "code" / f"{sha256}.py"
    if target.exists():
        return
    for text in (summary.with_name(GENERATION_FILE), policy_file(request.code_root, request.experiment)):
        if file_sha256(text) == sha256:
            copy_whole(text, target)
            return
    say(f"== {run.path}: the text of its policy ({sha256[:12]}) is no longer here, and artifacts/code/ goes without it")
