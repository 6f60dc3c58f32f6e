"""The benchmarks' data sets with made-up items, in the hub's layout, as lm_eval's own task definitions load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent / "fixtures" / "hub"
# The configurations of cais/mmlu, with the subgroup of lm_eval's group `mmlu` that each belongs to.
MMLU_SUBGROUPS = dict(line.split()[::-1] for line in (HUB.parent / "mmlu_subjects.txt").read_text().splitlines())


def mmlu_items(subject: str, split: str, count: int) -> list[dict]:
    """Sums in a data set's columns; the right letter goes round with the numbers."""
    items = []
    for number in range(count):
        left, right = len(subject), number + (2 if split == "test" else 40)
        answer = (left + number) % 4
        choices = [str(left + right + place - answer) for place in range(4)]
        words = subject.replace("_", " ")
        question = f"A course in {words} has {left} seats and adds {right}. How many seats does it have then?"
        items.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    return items


def num_mmlu_questions(subject: str) -> int:
    """Of a subject's test: 2 to 4, so that a mean over subjects is not the mean over questions."""
    return 2 + len(subject) % 3


def write_hub(folder: Path) -> Path:
    """Fill `folder` with <owner>/<data set> as lm_eval finds them from the working directory; returns it."""
    shutil.copytree(HUB, folder, dirs_exist_ok=True)
    mmlu, configs = folder / "cais" / "mmlu", []
    for subject in sorted(MMLU_SUBGROUPS):
        configs.append({"config_name": subject, "data_files": []})
        for split, count in (("test", num_mmlu_questions(subject)), ("dev", 5)):
            path = mmlu / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(item) + "\n" for item in mmlu_items(subject, split, count)))
            configs[-1]["data_files"].append({"split": split, "path": f"{subject}/{split}.jsonl"})
    (mmlu / "README.md").write_text(f"---\n{json.dumps({'configs': configs}, indent=1)}\n---\n")  # JSON is YAML
    return folder
