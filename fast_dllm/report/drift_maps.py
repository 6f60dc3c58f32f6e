"""The drift maps that `python -m fast_dllm.drift` has left for a task, with a caption that says which run made them."""

from __future__ import annotations

import glob
from collections.abc import Collection
from pathlib import Path

from fast_dllm.report.drawing import file_name
from fast_dllm.spec.files import as_object, read_json

FOLDERS = ("results/drift", "artifacts/drift")


def drift_maps(root: Path, task: str, models: Collection[object]) -> dict[str, tuple[Path, str]]:
    """Name -> (PNG, caption) of the task's drift maps, of any number of questions.

    A drift map comes from a run of its own, which the caption says. Maps of models other than `models` are left out.
    """
    maps: dict[str, tuple[Path, str]] = {}
    for base in FOLDERS:
        for folder in sorted((root / base).glob(f"{glob.escape(task)}*/")):
            if folder.name != task and not folder.name.startswith(f"{task}_limit_"):
                continue
            facts = as_object(read_json(folder / "drift.json")[0])
            model, questions = facts.get("model"), facts.get("questions")
            if isinstance(model, str) and model not in models:
                continue
            size = f", {questions} questions" if isinstance(questions, int) else ""
            for path in sorted(folder.glob("*.png")):
                name = f"drift_{file_name(folder.name)}_{file_name(path.stem)}"
                caption = (
                    f"Drift of the layers between denoising steps, {folder.name}: {path.stem}. Not from the results "
                    f"above: a run of its own ({base}/{folder.name}{size})."
                )
                maps.setdefault(name, (path, caption))
    return maps
