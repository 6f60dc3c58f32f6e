"""docs/findings.md: its tables are what the kept results give, and what they say of planted results."""

from __future__ import annotations

import importlib.util
import re
import sys

import numpy as np
import pytest
from golden_models import ROOT
from report_project import Project, answers

from fast_dllm.drift.sums import DriftSums
from fast_dllm.errors import UsageError
from fast_dllm.record import questions

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
    return findings.filled(f"Words.\n\n{marks}", findings.read(root))


def test_tables_of_the_document_are_what_the_kept_results_give(capsys):
    text = findings.DOCUMENT.read_text()
    assert all(f"<!-- table: {name} -->" in text for name in findings.TABLES)
    assert findings.main(["--check"]) == 0, capsys.readouterr().out


def test_the_ranges_that_are_quoted_are_those_of_the_kept_map():
    text = " ".join(findings.DOCUMENT.read_text().split())
    told = r"by (\d+)% of what leaves them \((.+?)\), (\d+)% \((.+?)\), (\d+)% \((.+?)\), least for (\S+) \((\d+)%\)"
    quoted = re.search(told, text)
    kept = (ROOT / "artifacts" / "drift" / "toy_math_limit_100" / "ranges.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in kept.splitlines()[2:]]
    errors = {row[0]: round(float(row[1].split("%")[0])) for row in rows}
    assert {quoted[2]: int(quoted[1]), quoted[4]: int(quoted[3]), quoted[6]: int(quoted[5])} == {
        name: errors[name] for name in ("1-12", "12-23", "24-35")
    }
    assert (quoted[7], int(quoted[8])) == min(errors.items(), key=lambda item: item[1])


def every_result() -> dict[str, list[str]]:
    """Result -> its row of the last table: accuracy with interval, points, p, tokens a forward (both units), rows."""
    return {row[0]: row for row in tables_of(findings.DOCUMENT.read_text())["every_result"]}


def test_what_is_quoted_in_both_units_is_what_the_table_gives():
    rows, text = every_result(), " ".join(findings.DOCUMENT.read_text().split())
    quoted = re.search(r"what is (\S+) or (\S+) times plain decoding here is (\S+) or (\S+) times there", text)
    plain = rows["04 s8_t0.90"]
    gains = [f"{float(rows[f'01 {c}'][i]) / float(plain[i]):.2f}" for i in (4, 5) for c in ("r0.80_s1", "r0.90_s1")]
    assert list(quoted.groups()) == gains


def test_the_summary_quotes_what_the_table_gives():
    rows, document = every_result(), findings.DOCUMENT.read_text()
    summary = " ".join(document.split("## Summary")[1].split("##")[0].split())
    plain, reread, control = rows["04 s8_t0.90"], rows["01 r0.90_s1"], rows["04 s16_t0.90"]
    beat, often = (next(row for name, row in rows.items() if name.startswith(f"00 k{k}_first")) for k in (2, 3))
    gain = {name: float(row[4]) / float(plain[4]) for name, row in (("k2", beat), ("01", reread), ("04", control))}
    loss, low, high = re.findall(r"[+-][\d.]+", reread[2])
    lost = [float(row[2].split()[0].lstrip("-")) for row in (beat, often)]
    assert f"With k = 2 it gives {gain['k2']:.2f} times" in summary
    assert f"loses {lost[0]:.2f} points; with k = 3 it loses {lost[1]:.1f} points" in summary
    assert f"*only while the model is sure* gives {gain['01']:.2f} times" in summary
    assert f"({loss} points, 95% interval {low} to {high})" in summary
    assert f"counted it is {float(reread[5]) / float(plain[5]):.2f} times" in summary
    assert f"loses at most a point gives {gain['04']:.2f} times" in summary


def test_what_the_readme_quotes_is_what_the_table_gives():
    rows, text = every_result(), " ".join((ROOT / "README.md").read_text().split())
    best, plain = rows["01 r0.90_s1"], rows["04 s8_t0.90"]
    gives = re.search(
        r"gives (\S+) tokens per forward, (\S+) times plain decoding "
        r"\((\S+) tokens per denoising forward, (\S+) times\), "
        r"at no loss \((\S+) points, (\S+) to (\S+)\)",
        text,
    )
    loss, low, high = (float(number) for number in re.findall(r"[+-][\d.]+", best[2]))
    assert gives.groups() == (
        best[5],
        f"{float(best[5]) / float(plain[5]):.2f}",
        best[4],
        f"{float(best[4]) / float(plain[4]):.2f}",
        f"{loss:+.1f}",
        f"{low:.1f}",
        f"{high:+.1f}",
    )
    beat = next(row for name, row in rows.items() if name.startswith("00 k2_first"))
    assert f"saves a third of the denoising forwards and loses {beat[2].split()[0].lstrip('-')} points" in text
    assert 1 - float(plain[4]) / float(beat[4]) == pytest.approx(1 / 3, abs=0.04)
    within_a_point = rows["04 s16_t0.90"]
    assert f"loses at most a point gives {within_a_point[5]} ({within_a_point[4]})" in text


def test_the_demos_accuracies_are_those_of_the_kept_answers_to_its_questions():
    """The first 200 of the 1,200."""
    text = (ROOT / "README.md").read_text()
    for k in (1, 2, 3):
        folder = ROOT / "artifacts" / "00_baseline" / "toy_math" / f"k{k}_first"
        kept = questions.read(folder / questions.QUESTIONS_FILE)
        right = sum(one.correct for one in kept.questions if one.doc_id < 200)
        assert f"| k = {k} | {right / 2:.1f}% ±" in text


@pytest.mark.parametrize("page", sorted((ROOT / "experiments").glob("0[1-9]*/README.md")), ids=lambda p: p.parent.name)
def test_the_pairs_in_an_experiments_page_are_those_of_the_kept_results(page):
    """Accuracy and tokens a forward as `97.58, 8.79`."""
    known = {(row[1].split()[0], row[4]) for row in every_result().values()}
    quoted = set(re.findall(r"(\d\d\.\d\d), (\d\.\d\d)", page.read_text()))
    assert quoted or page.parent.name == "03_carry_rows"  # which has a column for each
    assert quoted <= known


def test_the_control_page_quotes_the_corrected_p():
    page = (ROOT / "experiments" / "04_threshold" / "README.md").read_text()
    quoted = re.search(r"sub-blocks of 32 lose (\S+) points.*?\(p = (\S+) after Holm\)", page, re.DOTALL)
    row = every_result()["04 s32_t1.00"]
    assert row[2].startswith(f"-{quoted[1]} ")
    assert f"p = {float(row[3].removeprefix('p = ')):.3f}" == f"p = {quoted[2]}"


def test_the_changes_that_are_quoted_are_those_of_the_kept_map():
    kept = DriftSums.read(ROOT / "artifacts" / "drift" / "toy_math_limit_100" / "drift.json")
    changes = 100 * kept.relative("residual", ("layer", "step"))[:, 1:]
    changes = changes[:, np.isfinite(changes).all(axis=0)]
    low, high = changes[:8], changes[8:]
    spans = [f"{part.min():.0f} to {part.max():.0f}%" for part in (low, high)]
    text = " ".join(findings.DOCUMENT.read_text().split())
    assert f"changes by {spans[0]} from step to step in layers 0 to 7 and by {spans[1]} above, most at step 2" in text
    assert changes.mean(axis=0).argmax() + 1 == 2


@pytest.mark.slow
def test_a_changed_number_is_seen(tmp_path, monkeypatch, capsys):
    text = findings.DOCUMENT.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 04 s8_t0.90 "))
    (tmp_path / "findings.md").write_text(text.replace(row, row.replace("9", "8", 1)))
    monkeypatch.setattr(findings, "DOCUMENT", tmp_path / "findings.md")
    monkeypatch.setattr(findings, "PICTURE", tmp_path / "findings.png")
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
    assert rows["04 s8_t0.90"][4:] == ["5.00", "4.55", "7.0"]
    # 600 whole forwards and 300 of 24 layers of 36
    assert rows["02 k2_last"][4] == "6.25"
    assert rows["04 s32_t0.90"][2].startswith("-5.00 [-7")


def test_the_fastest_setting_that_is_as_right_as_plain_is_named(project):
    rows = tables_of(document(project.root))["equal_accuracy"]
    by_reading = {(row[0], row[1]): row[2:] for row in rows}
    strict = "no loss above 1, 95% sure"
    assert by_reading[strict, "04_threshold"] == ["s8_t0.90", "5.00", "1.00", "1.00"]
    assert by_reading[strict, "01_adaptive_skip"] == ["r0.90", "12.50", "2.50", "2.50"]
    observed = "observed loss at most 0.5"
    assert by_reading[observed, "04_threshold"] == ["s16_t0.95", "6.25", "1.00", "1.25"]
    assert by_reading[observed, "01_adaptive_skip"] == ["r0.90", "12.50", "2.00", "2.50"]
    assert by_reading[observed, "02_residual_reuse"] == ["k2_last", "6.25", "1.00", "1.25"]


def test_the_picture_shows_every_experiment_and_the_envelope(project):
    axes = findings.picture(findings.read(project.root)).axes[0]
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"the control's envelope", "01_adaptive_skip", "02_residual_reuse", "04_threshold"}
    envelope = next(line for line in axes.get_lines() if line.get_label() == "the control's envelope")
    assert list(envelope.get_xdata()) == [5.0, 6.25, 10.0]


def test_layers_in_part_are_compared_with_what_costs_no_more(project):
    rows = tables_of(document(project.root))["equal_cost"]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("02 k2_last", "01 r0.90", "12.50"),
        ("02 k2_last", "04 s16_t0.95", "6.25"),
    ]
    assert rows[0][4].startswith("+0.25 [")


def test_what_is_missing_is_one_line(project, tmp_path):
    with pytest.raises(UsageError, match="no table 'nothing'; there are: every_result, equal_accuracy, equal_cost"):
        findings.filled("<!-- table: nothing -->\n<!-- end -->", findings.read(project.root))
    (tmp_path / "empty" / "experiments").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no result of 04_threshold/s8_t0\.90 on toy_math; there are: none"):
        findings.read(tmp_path / "empty")
