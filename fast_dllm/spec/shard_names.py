"""Names and limits of the shards of a run, and the numbers of a job array, one for each shard.

A shard's records are in shards/<i>-of-<sharding>/ of the run's folder. The sharding is N, or NxP where P processes
answer each of the N shards. A shard has the records that a run has (job.json, failure.json, progress, the claim), and
done.json once it is answered.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterable, Sequence

SHARDS_FOLDER, DONE_FILE = "shards", "done.json"
MAX_SHARDS = 1000  # elements of a job array, as Slurm has it by default (MaxArraySize 1001)
MAX_GPUS = 16  # of a node
MAX_SHARDS_AT_ONCE = 64  # of an array's jobs; benchmarks/shards.py shows what more of them cost the scheduler


def shard_folder(folder: Path, name: str | None) -> Path:
    """The folder of a shard's records; for None that of the whole run."""
    return Path(folder) if name is None else Path(folder) / SHARDS_FOLDER / name


def sharding(count: int, processes: int = 1) -> str:
    """How a run is divided: "4", or "4x2" where two processes answer each shard."""
    return str(count) if processes == 1 else f"{count}x{processes}"


def parse_sharding(text: str) -> tuple[int, int]:
    """(N, P) of "4x2", "4", or what follows -of- in a shard's name."""
    count, _, processes = text.rpartition("-of-")[2].partition("x")
    return int(count), int(processes or 1)


def names_of(text: str) -> list[str]:
    """The names of all shards of a sharding like "4x2"."""
    return [f"{number}-of-{text}" for number in range(parse_sharding(text)[0])]


# -- numbers of an array -----------------------------------------------------------------------------------------------
def array_numbers(job_id: str) -> set[int]:
    """The numbers in "123_4" or "123_[0-3,7%2]"; empty for a job of no array."""
    match = re.fullmatch(r"\d+_\[?([0-9,-]+)(%\d+)?\]?", job_id)
    numbers: set[int] = set()
    for part in match[1].split(",") if match else ():
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def array_words(numbers: Iterable[int]) -> str:
    """ "0-3,7" of 0, 1, 2, 3 and 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def job_words(job_ids: Sequence[str]) -> str:
    """ "123[0-2] 130[3]" of 123_0, 123_[1-2] and 130_3."""
    bases = dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids)
    return " ".join(
        f"{base}[{array_words(set().union(*(array_numbers(one) for one in job_ids if one.startswith(base + '_'))))}]"
        for base in bases
    )
