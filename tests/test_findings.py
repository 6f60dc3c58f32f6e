"""docs/findings.md: its tables are what the kept results give, and what they say of planted results."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys

import pytest
import script_project
from golden_models import ROOT
from report_project import Project, answers

from fast_dllm.errors import UsageError

SPEC = importlib.util.spec_from_file_location("make_findings", ROOT / "docs" / "make_findings.py")
findings = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = findings  # where dataclasses look for it
SPEC.loader.exec_module(findings)

SETTINGS = {  # of plain decoding: (wrong answers, forwards)
    "s8_t0.90": (range(10), 1000),
    "s16_t0.95": (range(11), 800),  # one lost of 400: a loss of a point cannot be excluded, of 1.5 it can
    "s32_t0.90": (range(30), 500),
}


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """Name of a table -> its rows of cells, without the head."""
    found = {}
    for name in findings.TABLES:
        block = text.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->")[0]
        found[name] = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()[2:]]
    return found


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    for name in ("01_adaptive_skip", "02_residual_reuse", "04_threshold"):
        made.experiment(name)

    def run(experiment, config, wrong, forwards, **arguments):
        folder = made.run(
            config, answers(400, wrong=wrong), experiment=experiment, arguments=arguments, forwards=forwards
        )
        target = made.folder(config, experiment, base="artifacts")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)

    for config, (wrong, full) in SETTINGS.items():
        run(
            "04_threshold", config, wrong, {"full": full, "commit": 100}, small_block_size=int(config[1:].split("_")[0])
        )
    run("01_adaptive_skip", "r1.00", range(10), {"full": 1000, "commit": 100})
    run("01_adaptive_skip", "r0.90", range(10), {"full": 400, "reused": 300, "commit": 100}, reuse_k=5)
    run("02_residual_reuse", "k2_last", range(9), {"full": 600, "partial": 300, "commit": 100}, reuse_k=2)
    return made


def document(root):
    marks = "".join(f"<!-- table: {name} -->\nbefore\n<!-- end -->\n" for name in findings.TABLES)
    return findings.filled(f"Words.\n\n{marks}", findings.read(root), {})


@pytest.mark.slow  # the bootstrap of all ratios on all subjects
def test_tables_of_the_document_are_what_the_kept_results_give(capsys):
    text = findings.DOCUMENT.read_text()
    assert all(f"<!-- table: {name} -->" in text for name in (*findings.TABLES, *findings.OF_ALL_TASKS))
    assert findings.main(["--check"]) == 0, capsys.readouterr().out


def test_the_runs_for_the_real_models_are_accepted(tmp_path):
    blocks = re.findall(r"```bash cluster\n(.*?)```", findings.DOCUMENT.read_text(), re.DOTALL)
    project = script_project.Project(tmp_path / "project", slurm=False)
    shutil.copytree(ROOT / "experiments", project.root / "experiments", dirs_exist_ok=True)
    lines = "".join(blocks).splitlines()
    assert len(lines) == 4  # three claims on the 7B, one on the 1.5B
    for line in lines:
        words = line.split()
        assert words[:2] == ["bash", "sbatch/run.sh"]
        result = project.run(*words[2:], "--dry-run")
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_changed_number_is_seen(tmp_path, monkeypatch, capsys):
    text = findings.DOCUMENT.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 04 s8_t0.90 "))
    (tmp_path / "findings.md").write_text(text.replace(row, row.replace("9", "8", 1)))
    monkeypatch.setattr(findings, "DOCUMENT", tmp_path / "findings.md")
    monkeypatch.setattr(findings, "PICTURE", tmp_path / "findings.png")
    monkeypatch.setattr(findings, "SUBJECTS_PICTURE", tmp_path / "findings_subjects.png")
    assert findings.main(["--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert findings.main([]) == 0
    assert (tmp_path / "findings.md").read_text() == text
    assert (tmp_path / "findings.png").read_bytes().startswith(b"\x89PNG")


def test_words_stay_and_every_result_has_a_line(project):
    text = document(project.root)
    assert text.startswith("Words.\n\n")
    assert "before" not in text
    rows = {row[0]: row for row in tables_of(text)["every_result"]}
    assert set(rows) == {"04 s8_t0.90", "04 s16_t0.95", "04 s32_t0.90", "01 r1.00", "01 r0.90", "02 k2_last"}
    assert rows["04 s8_t0.90"][2] == "compared with"
    # 5,000 tokens from 1,000 full forwards; with the commits from 1,100; 32 rows each
    assert rows["04 s8_t0.90"][4:] == ["", "4.55", "5.00", "7.0"]
    # 600 whole forwards and 300 of 24 layers of 36
    assert rows["02 k2_last"][6] == "6.25"
    # the best of two settings is looked at: what is excluded is less than the interval's end, which is of one
    assert float(rows["04 s16_t0.95"][4]) > -float(rows["04 s16_t0.95"][2].split("[")[1].split(",")[0])
    assert rows["04 s32_t0.90"][2].startswith("-5.00 [-7")


def test_the_fastest_setting_that_is_as_right_as_plain_is_named(project):
    rows = tables_of(document(project.root))["equal_accuracy"]
    by_reading = {(row[0], row[1]): row[2:] for row in rows}
    strict = "no loss above 1, 95% sure"
    assert by_reading[strict, "04_threshold"] == ["s8_t0.90", "4.55", "1.00", "1.00"]
    assert by_reading[strict, "01_adaptive_skip"] == ["r0.90", "10.00", "2.20", "2.20"]
    observed = "observed loss at most 0.5"
    assert by_reading[observed, "04_threshold"] == ["s16_t0.95", "5.56", "1.00", "1.22"]
    assert by_reading[observed, "01_adaptive_skip"] == ["r0.90", "10.00", "1.80", "2.20"]
    assert by_reading[observed, "02_residual_reuse"] == ["k2_last", "5.56", "1.00", "1.22"]


def test_layers_in_part_are_compared_with_what_costs_no_more(project):
    rows = tables_of(document(project.root))["equal_cost"]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("02 k2_last", "01 r0.90", "10.00"),
        ("02 k2_last", "04 s16_t0.95", "5.56"),
    ]
    assert rows[0][4].startswith("+0.25 [")


def test_results_of_the_further_models_are_read_from_a_folder_each(project):
    subject, *others = findings.SUBJECTS
    kept = project.root / "artifacts"
    shutil.copytree(kept / "04_threshold", kept / "subjects" / subject / "04_threshold")
    runs = findings.runs_by_task(project.root)
    assert set(runs[f"toy_math, {subject}"]) == {f"04_threshold/{config}" for config in SETTINGS}
    assert not any(f"toy_math, {other}" in runs for other in others)


def test_what_is_missing_is_one_line(project, tmp_path):
    with pytest.raises(
        UsageError, match="no table 'nothing'; there are: every_result, equal_accuracy, equal_cost, claims, "
    ):
        findings.filled("<!-- table: nothing -->\n<!-- end -->", findings.read(project.root), {})
    (tmp_path / "empty" / "experiments").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no result of 04_threshold/s8_t0\.90 on toy_math; there are: none"):
        findings.read(tmp_path / "empty")
