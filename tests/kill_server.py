"""Run eval.py again and again in forked children, each killed at a random moment, until one survives.

For test_kills.py. Forking after the imports makes a run last seconds instead of the 10 that importing everything takes.
Arguments: seed, folder for the results, number of kills, eval.py's arguments. Prints a JSON line for each run.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import eval as entry
from fast_dllm.evaluate import harness  # noqa: F401  (imported here, once, for all children)


def answers(folder: Path) -> list[str]:
    """The request keys of all answers on disk, one that was given twice twice. A torn last line holds none."""
    try:
        lines = [line for file in folder.glob("answers/*/*.jsonl") for line in file.read_bytes().splitlines(True)]
    except FileNotFoundError:  # the run is complete and clears them away at this moment
        return []
    return [key for line in lines if line.endswith(b"\n") for key in json.loads(line)["answers"]]


def content(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def run(arguments: list[str], folder: Path, moment: Callable[[float, int], bool]) -> dict:
    """One run of eval.py, killed when moment(seconds since its start, answers that it has given) says so."""
    began, before = time.monotonic(), len(answers(folder))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.argv = ["eval.py", *arguments, "--output_path", f"{folder}/"]
            entry.main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if moment(time.monotonic() - began, len(answers(folder)) - before):
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    killed = os.WIFSIGNALED(done[1])
    return {
        "killed": killed,
        "status": None if killed else os.WEXITSTATUS(done[1]),
        "seconds": time.monotonic() - began,
        "answers": answers(folder),
        "summary": content(folder / "summary.json"),
        "results": content(folder / "results.json"),
    }


def random_moment(dice: random.Random, longest: float) -> Callable[[float, int], bool]:
    """Any time at all for a third of them; else right around an answer, where something can be lost."""
    if dice.random() < 1 / 3:
        end = dice.uniform(0, longest)
        return lambda seconds, new: seconds > end
    wanted, jitter = dice.randint(1, 4), dice.uniform(0, 0.1)

    def moment(seconds: float, new: int) -> bool:
        if new < wanted:
            return False
        time.sleep(jitter)
        return True

    return moment


def main() -> None:
    dice, folder, kills, arguments = random.Random(int(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    output = os.dup(1)
    os.dup2(2, 1)  # what eval.py prints is not what this prints

    def report(kind: str, number: int, result: dict) -> None:
        os.write(output, (json.dumps({"kind": kind, "number": number} | result) + "\n").encode())

    reference = run(arguments, folder / "reference", lambda seconds, new: False)
    report("reference", 0, reference)
    number, done = 0, 0
    while done < kills:
        number += 1
        for attempt in range(12):
            moment = random_moment(dice, reference["seconds"])
            if attempt == 11:  # every run ends
                moment = lambda seconds, new: False  # noqa: E731
            result = run(arguments, folder / f"run{number}", moment)
            report("run", number, result)
            done += result["killed"]
            if result["summary"] or not result["killed"]:
                break


if __name__ == "__main__":
    main()
