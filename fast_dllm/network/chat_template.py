"""Checks that a checkpoint's chat template, which is a program, ends within bounds on time and memory.

A damaged or hostile template may run for ever. When the tokenizer is loaded, a child process runs the template once
within these bounds. Within this process nothing would stop one endless operation, such as a power of large numbers.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fast_dllm.errors import UsageError

SECONDS = 5.0  # one text takes milliseconds
MEMORY_BYTES = 2**30  # beyond what this process has
MOST_CHARACTERS = 10**6  # of a short conversation's text
TRIED = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
    ],
)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError if the tokenizer has no chat template, without which no conversation can be written as text."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template (chat_template.jinja, or chat_template "
            "in tokenizer_config.json); conversations and --apply_chat_template need one"
        )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError if the chat template exceeds a bound on time, memory or length of its text.

    A template may refuse a conversation, such as one with a system message.
    """

    def try_it() -> bool:
        for conversation in TRIED:
            try:
                text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            except MemoryError:
                return False
            except Exception:  # jinja2's and the template's own; `render` tells the user when it matters
                continue
            if len(text) > MOST_CHARACTERS:
                return False
        return True

    if tokenizer.chat_template and not ends_within_bounds(try_it):
        raise UsageError(
            f"the chat template of {tokenizer.name_or_path!r} does not end within {SECONDS:g} seconds, "
            f"{MEMORY_BYTES // 2**20} MiB and {MOST_CHARACTERS} characters for a short conversation"
        )


def ends_within_bounds(work: Callable[[], bool]) -> bool:
    """Whether `work`, in a child process, returns True within SECONDS and MEMORY_BYTES."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            limit_memory()
            status = 0 if work() else 1
        finally:
            os._exit(status)  # nothing of the parent's is flushed or closed a second time
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                child = 0
                return status == 0
            time.sleep(0.002)
        return False
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def limit_memory() -> None:
    """Limit the further memory of this process to MEMORY_BYTES. Does nothing without /proc (macOS)."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
