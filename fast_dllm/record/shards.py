"""Shards of one evaluation: which requests each shard answers, and which process works on which shard.

    <folder>/answers/<key>/plan.0001/plan.json           the number of shards, and of processes for each
    <folder>/answers/<key>/plan.0001/<call>/shares.json  the requests of one call of the harness, by shard
    <folder>/shards/0-of-4/.lock.0001                    the claim on a shard (spec/locks.py)
    <folder>/shards/0-of-4/done.json                     the shard is answered

A plan is published in one step, by renaming a folder. If several processes do that at once, one succeeds and the others
read its plan. The plan with the highest number counts. A plan with another number of shards is started only while no
process works on a shard. The result does not depend on this: an answer that two processes gave counts once.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fast_dllm.errors import UsageError
from fast_dllm.spec.files import read_json, sync_folder, write_json
from fast_dllm.spec.locks import Claim, acquire, is_held, owner_of
from fast_dllm.spec.shard_names import SHARDS_FOLDER, shard_folder, sharding

LOCK = ".lock"  # the base of the claims in a run's or a shard's folder
KEY_DIGITS = 16  # of a request's key, in a plan
# Up to this many rows a forward takes a GPU about the same time, which is that of reading the weights.
ROWS_PER_FORWARD = 256
# A prompt of this many tokens makes each forward of the answer about twice as long.
LONG_PROMPT = 8192


class ShardAnswered(Exception):  # noqa: N818 (no error: the end of a shard)
    """Ends the evaluation of a shard once all its requests are answered."""


@dataclass(frozen=True)
class Shard:
    """Shard number `index` (from 0) of `count`. processes: how many answer it together."""

    index: int
    count: int
    processes: int = 1

    @classmethod
    def parse(cls, text: str, processes: int) -> Shard:
        """The shard that a text like "0/4" names. Raises UsageError."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
        if not match or not int(match[1]) < int(match[2]):
            raise UsageError(f"--shard must be i/N with i from 0 to N - 1, as in 0/4, not {text!r}")
        return cls(int(match[1]), int(match[2]), processes)

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.sharding}"

    @property
    def sharding(self) -> str:
        """The number of shards as text, like "4", or "4x2" if two processes answer each of the four."""
        return sharding(self.count, self.processes)


def generation_cost(prompt_tokens: int, answer_tokens: int) -> float:
    """The expected cost of a generated answer, in forwards; only ratios matter."""
    return prompt_tokens / ROWS_PER_FORWARD + answer_tokens * (1 + prompt_tokens / LONG_PROMPT)


def balanced(costs: Mapping[str, float], count: int) -> list[list[str]]:
    """The keys in `count` lists whose sums of costs are about equal.

    Each key goes to the list with the smallest sum, the most expensive key first. The largest sum is at most 4/3 of the
    best possible (Graham 1969). Equal input gives equal output.
    """
    groups: list[list[str]] = [[] for _ in range(count)]
    sums = [(0.0, 0, index) for index in range(count)]  # of equal sums the one with fewer keys
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        total, number, index = heapq.heappop(sums)
        groups[index].append(key)
        heapq.heappush(sums, (total + costs[key], number + 1, index))
    return groups


# -- who is at work ----------------------------------------------------------------------------------------------------
def shards_at_work(folder: Path) -> list[str]:
    """Names of the shards of a run that a living process holds."""
    folders = sorted((Path(folder) / SHARDS_FOLDER).glob("*-of-*"))
    return [path.name for path in folders if is_held(path / LOCK)]


def check_nobody_at_work(folder: Path) -> None:
    """Raises UsageError if a process works on a shard of the run, so that the whole run cannot be evaluated now."""
    names = shards_at_work(folder)
    if names:
        owner = owner_of(shard_folder(folder, names[0]) / LOCK)
        raise UsageError(f"shard {names[0]} of {folder} is being answered by process {owner}; wait for it, or end it")


def check_run_is_free(folder: Path) -> None:
    """Raises UsageError if a process evaluates the whole run, so that no shard of it can be answered now."""
    if is_held(Path(folder) / LOCK):
        raise UsageError(f"{folder} is being evaluated by process {owner_of(Path(folder) / LOCK)}")


def claim_shard(folder: Path) -> Claim:
    """Claim the shard whose records are in `folder`. Raises UsageError while another process has the claim."""
    claim = acquire(Path(folder) / LOCK, wait=False)
    if claim is None:
        raise UsageError(f"shard {Path(folder).name} is being answered by process {owner_of(Path(folder) / LOCK)}")
    return claim


def discard(folder: Path) -> None:
    """Delete the records of a run's shards, once the run is complete."""
    shutil.rmtree(Path(folder) / SHARDS_FOLDER, ignore_errors=True)


# -- the plan ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Which questions each shard of a run answers, and which shard this process answers."""

    path: Path
    shard: Shard

    @classmethod
    def of(cls, answers: Path, folder: Path, shard: Shard) -> Plan:
        """The run's latest plan, if it is for this number of shards; else a new plan.

        answers: the folder of the run's answers; folder: the run's folder. Raises UsageError while processes answer
        another number of shards.
        """
        while True:
            last = max(filter(_number_of_plan, answers.glob("plan.*")), key=_number_of_plan, default=None)
            content = read_json(last / "plan.json")[0] if last else None
            if last and content and content.get("division") == shard.sharding:
                return cls(last, shard)
            others = [name for name in shards_at_work(folder) if not name.endswith(f"-of-{shard.sharding}")]
            if others:
                present = others[0].partition("-of-")[2]
                raise UsageError(
                    f"{folder} is being answered in {present} shards ({', '.join(others)} at work), not in "
                    f"{shard.sharding}: use the same number, or wait for them"
                )
            number = _number_of_plan(last) + 1 if last else 1
            _publish(answers / f"plan.{number:04d}", "plan.json", {"schema_version": 1, "division": shard.sharding})

    def keys_of_shard(self, costs: Mapping[str, float]) -> frozenset[str]:
        """The keys that this shard answers in one call of the harness. costs: key -> cost, of all keys of the call.

        The first process writes how the keys are divided; the others read it. Raises OSError.
        """
        digest = sha256("\n".join(sorted(costs)).encode()).hexdigest()[:KEY_DIGITS]
        if not (self.path / digest).is_dir():
            shards = [[key[:KEY_DIGITS] for key in keys] for keys in balanced(costs, self.shard.count)]
            _publish(self.path / digest, "shares.json", {"schema_version": 1, "shares": shards})
        content, fault = read_json(self.path / digest / "shares.json")
        if content is None:
            raise OSError(f"{self.path / digest}/shares.json cannot be read: {fault or 'no file'}")
        try:
            short_keys = frozenset(content["shares"][self.shard.index])
        except (KeyError, IndexError, TypeError):
            raise OSError(f"{self.path / digest}/shares.json is no plan of {self.shard.count} shards") from None
        return frozenset(key for key in costs if key[:KEY_DIGITS] in short_keys)


def _number_of_plan(path: Path) -> int:
    """12 for plan.0012; 0 for a file that is no plan."""
    digits = path.name.partition(".")[2]
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) <= 9 else 0


def _publish(path: Path, name: str, content: dict) -> None:
    """Create the folder `path` with one file in one step; an existing folder stays as it is."""
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    write_json(new / name, content)
    try:
        new.rename(path)  # fails if the folder exists and is not empty
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(new)
        return
    sync_folder(path.parent)


def request_kinds(output_types: Iterable[str]) -> set[str]:
    """The names of the harness's methods that tasks with these output types call."""
    return {"loglikelihood" if kind == "multiple_choice" else kind for kind in output_types}
