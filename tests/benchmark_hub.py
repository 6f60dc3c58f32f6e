"""The benchmarks' data sets with a few made-up items, in the hub's layout, for lm_eval's own task definitions to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent / "fixtures" / "hub"
# The configurations of cais/mmlu that lm_eval's group `mmlu` loads, by its subgroups.
MMLU_SUBJECTS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""".split(),
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
}


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
    """Of a subject's test: 1 to 3, so that a mean over subjects is not the mean over questions."""
    return 1 + len(subject) % 3


def write_hub(folder: Path) -> Path:
    """Fill `folder` with <owner>/<data set> as lm_eval finds them from the working directory; returns it."""
    shutil.copytree(HUB, folder, dirs_exist_ok=True)
    mmlu, configs = folder / "cais" / "mmlu", []
    for subject in sorted(subject for group in MMLU_SUBJECTS.values() for subject in group):
        configs.append({"config_name": subject, "data_files": []})
        for split, count in (("test", num_mmlu_questions(subject)), ("dev", 5)):
            path = mmlu / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(item) + "\n" for item in mmlu_items(subject, split, count)))
            configs[-1]["data_files"].append({"split": split, "path": f"{subject}/{split}.jsonl"})
    (mmlu / "README.md").write_text(f"---\n{json.dumps({'configs': configs}, indent=1)}\n---\n")  # JSON is YAML
    return folder
