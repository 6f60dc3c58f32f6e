"""The report from end to end: what it writes, for nothing, one cell, many; hostile names; bad input; the pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from golden_models import ROOT
from report_project import FULL, NINE, SUBSETS, Project, answers, earlier

from fast_dllm.errors import UsageError
from fast_dllm.report import figures
from fast_dllm.report.__main__ import collect, main
from fast_dllm.report.build import build_report
from fast_dllm.report.compare import contrasts
from fast_dllm.report.folders import read_tables
from fast_dllm.report.same_results import distinct

BARS = "class Options(Base):\n    reread_above: float = 1.0\n"  # an experiment with a knob

HOSTILE = "<script>alert(1)</script> & **bold** | `x` [a](http://b) $1$ ``` \x1b[31m"
VOID = {"meta", "img", "br"}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """Without pictures, which take most of the time."""
    monkeypatch.setattr("fast_dllm.report.write.png", lambda figure: b"png")
    monkeypatch.setattr("fast_dllm.report.write.svg", lambda figure: b"svg")
    return Project(tmp_path)


def made(project: Project, *words: str, folder: str = "toy_math") -> dict:
    assert main(list(words), project.root) == 0
    return json.loads((project.root / "results" / "report" / folder / "report.json").read_text())


def sentences(content: dict) -> list[str]:
    """The verdict and the details behind it."""
    return [*content["verdict"], *content["details"]]


def text_of(project: Project, name: str, folder: str = "toy_math") -> str:
    return (project.root / "results" / "report" / folder / name).read_text()


class Page(HTMLParser):
    """Checks that every tag is closed; keeps tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# ---- contents ----


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> tuple[Project, dict, str]:
    """A clean matrix with its report, pictures too, and what the command printed. No test may change it."""
    project = Project(tmp_path_factory.mktemp("clean"))
    project.nine()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        content = made(project, "--task", "toy_math")
    return project, content, printed.getvalue()


def test_a_clean_matrix(clean):
    _, content, printed = clean
    assert content["num_alarms"] == 0
    (table,) = content["tables"]
    assert [run["config"] for run in table["runs"]] == NINE
    first, second = table["contrasts"]
    assert (first["configs"], first["baseline"]) == (["k2_first", "k2_middle", "k2_last"], "k1_first")
    assert (first["improved"], first["regressed"], first["flips"], first["paired"]) == (0, 2, 2, True)
    assert (second["regressed"], second["outcome"]) == (30, "loses")
    assert second["p_value"] == pytest.approx(2 * 0.5**30)
    assert second["p_adjusted"] == pytest.approx(4 * 0.5**30)
    assert len(content["verdict"]) == 3
    assert "00_baseline: k3 (first = middle = last) loses 10.0 points" in " ".join(sentences(content))
    run = table["runs"][3]
    assert run["full_depth_forwards"] == 100 + 350 + 50 + 150
    assert run["speed_up_forwards"] == pytest.approx(1000 / 650)
    [row] = [line for line in printed.splitlines() if line.split()[:1] == ["k3_last"]]
    assert "86.67%" in row
    assert len(row) <= 80
    assert "every difference with its 95% interval: results/report/toy_math/report.md, under" in printed
    assert printed.rstrip().endswith("wrote results/report/toy_math/report.html")


def test_the_page_opens_from_a_disk_with_the_verdict_open_and_every_other_section_folded_and_linked(clean):
    text = text_of(clean[0], "report.html")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == page.tags.count("figure") == 4
    assert page.tags.count("table") == 5  # matrix, comparisons, AUP, and two of the provenance
    assert "http" not in text.replace("http-equiv", "")
    verdict, rest = text.split("<nav", 1)
    assert "<details" not in verdict
    assert verdict.count("<li>") == 3
    links = re.findall(r'href="#([a-z-]+)"', rest)
    assert links == re.findall(r'<a id="([a-z-]+)">', rest)
    assert len(links) == len(re.findall('<details class="section">', text)) == 7


def test_png_and_svg_are_whole_files_and_the_same_report_is_the_same_bytes(clean):
    project, _, _ = clean
    folder = project.root / "results" / "report" / "toy_math"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")}
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    made(project, "--task", "toy_math")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_flips_stand_side_by_side_with_the_first_differing_token_marked(clean):
    project, content, _ = clean
    assert content["tables"][0]["num_changed_questions"] == 30
    assert len(content["flips"]) == 10
    flip = content["flips"][0]
    assert (flip["kind"], flip["config"], flip["others"]) == ("regressed", "k2_first", ["k3_first"])
    assert (flip["before"]["same"], flip["before"]["token"]) == ("It is ", "10")
    assert flip["after"]["token"] == "not"
    assert "It is ⟦not⟧ 10." in text_of(project, "report.md")
    assert "<mark>not</mark> 10." in text_of(project, "report.html")


def test_too_few_questions_name_no_best_setting(project, capsys):
    project.nine(num_questions=50, lost=(2, 2, 5))
    content = made(project, "--brief")
    assert content["verdict"][0].startswith("No setting can be called the best: 50 questions are too few for any claim")
    assert not any("the best is" in sentence for sentence in sentences(content))
    assert content["verdict"][0] in capsys.readouterr().out


def test_no_time_of_a_cpu_is_compared(project):
    project.nine(num_questions=1000, changes={"gpu": None, "device": "cpu"})
    project.run("k1_first", answers(1000, range(10)), seconds=30.0, changes={"gpu": None, "device": "cpu"})
    content = made(project)
    assert content["num_alarms"] == 0
    assert {run["reference_tokens_per_second"] for run in content["tables"][0]["runs"]} == {None}
    assert "Times on a CPU are not compared" in text_of(project, "report.md")
    assert "count forwards" in content["verdict"][1]
    assert not [sentence for sentence in sentences(content) if "times the tokens/s" in sentence]


def test_the_best_setting_has_its_gain_its_interval_and_its_cost(project):
    project.nine(num_questions=1000)
    gain, cost, unknown = made(project)["verdict"]
    assert "00_baseline/k2 (first = middle = last): 1.54 times the tokens per full-depth forward of k1_first" in gain
    assert "its accuracy changes by -0.2 points [-0.7, +0.2] on 1,000 questions" in cost
    assert "a loss above 1 point is excluded" in cost
    assert "1.20 times the tokens/s on Quadro RTX 6000" in cost
    assert unknown.startswith("What cannot be told: a difference below ")


def test_texts_that_were_purged_are_said_to_be_gone(project):
    project.nine()
    for path in project.root.rglob("texts.jsonl.gz"):
        path.unlink()
    content = made(project)
    assert content["flips"][0]["before"] is None
    assert "texts are not on this machine" in text_of(project, "report.md")


def test_the_command_in_the_report_makes_it_again(project):
    project.nine(limit=300)
    content = made(project, "--limit=300", "--flips", "2", folder="toy_math_limit_300")
    assert len(content["flips"]) == 2
    assert content["command"] == "python -m fast_dllm.report --flips 2 --task toy_math --limit 300"
    again = made(project, *content["command"].split()[3:], folder="toy_math_limit_300")
    assert again == content


# ---- sizes ----


def test_a_report_on_nothing(project):
    content = made(project, "--task", "toy_math")
    assert content["verdict"] == ["No results of 00_baseline on toy_math yet: there is nothing to tell."]
    Page(text_of(project, "report.html"))


def test_a_report_on_one_cell(project):
    project.run("k1_first", answers(300, range(9)))
    content = made(project)
    assert {alarm["kind"] for alarm in content["alarms"]} == {"missing"}
    assert content["tables"][0]["contrasts"] == []
    assert "k1_first gets 97.0%" in " ".join(sentences(content))
    assert '<details class="section" open><summary><h2>Alarms</h2>' in text_of(project, "report.html")


def test_every_task_has_a_report_of_its_own(project):
    project.nine()
    project.run("plain", answers(100, range(40)), task="toy_choice", scored=True)
    assert main([], project.root) == 0
    assert (project.root / "results" / "report" / "toy_choice" / "report.html").is_file()
    content = json.loads(text_of(project, "report.json", "toy_choice"))
    assert "scored by log-likelihood: 60.0%" in " ".join(sentences(content))


# ---- the comparison ----


def test_groups_are_compared_stratum_by_stratum(project):
    """Weighted as the task weights them; here by size."""
    base = {"a": answers(40, range(4)), "b": answers(160, range(8))}
    worse = {"a": answers(40, range(10)), "b": answers(160, range(8))}
    project.run("k1_first", [], strata=base)
    project.run("k2_first", [], strata=worse, forwards={**FULL, "full": 350})
    (c,) = contrasts(read_tables(project.root, "00_baseline", "toy_math")[0])
    assert (c.num_strata, c.num_questions, c.regressed, c.improved) == (2, 200, 6, 0)
    assert c.difference == pytest.approx(-6 / 200)
    made(project)
    assert "stratified over 2 subtasks" in text_of(project, "report.md")


def test_runs_on_other_questions_are_not_paired(project):
    project.run("k1_first", answers(300, range(10)))
    project.run("k2_first", answers(200, range(30)), forwards={**FULL, "full": 350})
    (c,) = contrasts(read_tables(project.root, "00_baseline", "toy_math")[0])
    assert not c.paired
    assert c.regressed is None


def test_against_another_run(project):
    project.nine()
    project.experiment("01_other")
    project.run("k1_first", answers(300, range(15)), experiment="01_other")
    content = made(project, "--against", "01_other/k1_first")
    found = {(c["configs"][0], c["baseline"]) for table in content["tables"] for c in table["contrasts"]}
    assert found == {(f"k{k}_first", "01_other/k1_first") for k in (1, 2, 3)}


def test_every_ratio_is_to_the_run_that_against_names(project):
    project.nine(num_questions=1000, lost=(10, 12, 14))
    project.experiment("01_other")
    project.run("k1_first", answers(1000, range(15)), experiment="01_other", seconds=8.0)
    content = made(project, "--against", "00_baseline/k2_middle", "--csv")
    gain, cost, _ = content["verdict"]
    assert "00_baseline/k3 (first = middle = last): 1.22 times the tokens per full-depth forward of k2_middle" in gain
    assert "(9.38 against 7.69, all forwards counted)" in gain
    seconds_k3 = 10 / 1.4
    assert f"{10 / 1.2 / seconds_k3:.2f} times the tokens/s" in cost
    runs = [run for table in content["tables"] for run in table["runs"]]
    assert len(runs) == 10
    for run, row in zip(runs, rows_of(project, "runs.csv"), strict=True):
        ratio = run["tokens_per_full_depth_forward"] / (5000 / 650)
        assert run["speed_up_forwards"] == float(row["speed_up_forwards"]) == pytest.approx(ratio)
        assert run["reference_tokens_per_second"] == pytest.approx(5000 / (10 / 1.2))
    for table in content["tables"]:
        for c in table["contrasts"]:
            first = next(run for run in table["runs"] if run["config"] == c["configs"][0])
            assert c["forward_gain"] == pytest.approx(first["speed_up_forwards"])
    assert {(flip["table"], flip["baseline"]) for flip in content["flips"]} == {
        ("00_baseline", "k2_middle"),
        ("01_other", "00_baseline/k2_middle"),
    }
    text = text_of(project, "report.md").replace("\\", "")
    assert text.count("Speed-ups are against k2_middle: ") == 1
    assert text.count("Speed-ups are against 00_baseline/k2_middle: ") == 1
    assert not re.search("(against|of) (this table's )?k = 1", text)
    assert "00_baseline: k = 3 runs at 1.17 times the tokens/s of k2_middle on" in " ".join(sentences(content))


def test_no_claim_against_a_run_whose_table_is_spoilt(project):
    project.nine(num_questions=1000)
    project.experiment("01_other")
    for config, seed in (("k1_first", 1), ("k1_last", 2)):
        project.run(config, answers(1000, range(10)), experiment="01_other", changes={"seeds": [seed] * 4})
    assert made(project)["verdict"][0].startswith("The best setting is 00_baseline/k2 ")
    spoilt = made(project, "--against", "01_other/k1_first")
    assert spoilt["verdict"][0].startswith("No setting can be called the best: alarms forbid it (mixed seeds)")


STATES = {"n1": {"states": 1}, "n2": {"states": 2}, "n4": {"states": 4}}


def guessing(project: Project, configs: tuple[str, ...]) -> None:
    """06_idea, whose settings have the same answers in fewer forwards: 900, 600 and 500."""
    project.experiment("06_idea", BARS.replace("reread_above: float = 1.0", "states: int = 1"),
                       matrix={"configurations": STATES, "compare_with": "n1"})  # fmt: skip
    for config in configs:
        full = {"n1": 900, "n2": 600, "n4": 500}[config]
        project.run(config, answers(1000, range(10)), experiment="06_idea", arguments=STATES[config],
                    forwards={"full": full})  # fmt: skip


def test_the_same_answers_in_fewer_forwards_are_a_result_of_their_own(project):
    guessing(project, ("n1", "n2", "n4"))
    content = made(project)
    assert content["num_alarms"] == 0
    assert [(c["configs"], c["outcome"]) for c in content["tables"][0]["contrasts"]] == [
        (["n2"], "identical"),
        (["n4"], "identical"),
    ]
    gain, cost, _ = content["verdict"]
    assert "The best setting is 06_idea/n4: 1.80 times the tokens per full-depth forward of n1" in gain
    assert "+0.0 points" in cost
    assert "(the same answers)" in cost
    found = " ".join(sentences(content))
    assert "06_idea: n2 gives the very same answers as n1 on all 1000 questions, at 1.50 times its tokens" in found
    assert "the same answers, 1.80 times the tokens per full-depth forward" in text_of(project, "report.md")


def test_forwards_that_differ_by_rounding_are_one_result(project):
    for full, num_results in ((903, 1), (950, 2)):
        for subset, count in (("first", 900), ("middle", full), ("last", 900)):
            project.run(f"k1_{subset}", answers(300, range(10)), forwards={"full": count})
        (table,) = read_tables(project.root, "00_baseline", "toy_math")
        assert len(distinct(table.runs.values())) == num_results
        assert contrasts(table) == []  # all are the baseline's own computation


def test_against_makes_a_candidate_of_a_table_without_its_own_baseline(project):
    guessing(project, ("n2", "n4"))
    project.run("k1_first", answers(1000, range(10)), forwards={"full": 900})
    gain = made(project, "--against", "00_baseline/k1_first")["verdict"][0]
    assert "06_idea/n4: 1.80 times the tokens per full-depth forward of 00_baseline/k1_first" in gain


def test_the_verdict_says_what_cannot_be_told_and_why(project):
    project.nine(lost=(10, 12, 40))
    unknown = made(project)["verdict"][-1]
    assert "whether 1 of the 2 results is more or less accurate than the baseline (too few answers changed" in unknown
    assert unknown.endswith("; there are no alarms.")
    shutil.rmtree(project.folder("k3_last"))
    project.run("k1_first", answers(300, range(10)), seconds=22.0)
    unknown = made(project)["verdict"][-1]
    assert "; the accuracy of 00_baseline/k3_last, because of an alarm below (missing); " in unknown
    assert "; the speed of 00_baseline, because of an alarm below (speed outlier)." in unknown


def test_the_curve_to_beat(project):
    """04 is the control; a result that beats its envelope at equal speed is named, one below it is not."""
    sweep = {f"t{t}": {"threshold": t} for t in (0.5, 0.8, 1.0)}
    project.experiment("04_threshold", matrix={"configurations": sweep, "compare_with": "t1.0"})
    for (config, given), wrong, full in zip(sweep.items(), (90, 40, 10), (200, 500, 900), strict=True):
        project.run(
            config, answers(400, range(wrong)), experiment="04_threshold", arguments=given, forwards={"full": full}
        )
    for k, wrong in ((1, 10), (2, 12), (3, 60)):
        forwards = {"full": {1: 900, 2: 450, 3: 450}[k]}
        for subset in SUBSETS:
            project.run(f"k{k}_{subset}", answers(400, range(wrong)), forwards=forwards)
    content = made(project)
    assert content["envelope"][0] == "04_threshold/t0.5" or content["envelope"][-1] == "04_threshold/t0.5"
    beaten = {c["configs"][0]: (c["baseline"], c["outcome"]) for c in content["equal_speed"]}
    assert beaten["k2_first"] == ("04_threshold/t0.5", "gains")
    assert beaten["k3_first"] == ("04_threshold/t0.5", "gains")
    assert "beats plain decoding (t0.5) at equal speed" in " ".join(sentences(content))
    assert [entry["name"] for entry in content["aup"]][-1] == "plain decoding, its envelope"


@pytest.mark.parametrize("spoilt", ["00_baseline", "04_threshold"])
def test_no_claim_against_the_curve_where_either_table_is_spoilt(project, spoilt):
    sweep = {f"t{t}": {"threshold": t} for t in (0.5, 0.8, 1.0)}
    project.experiment("04_threshold", matrix={"configurations": sweep, "compare_with": "t1.0"})
    for (config, given), wrong, full in zip(sweep.items(), (90, 40, 10), (200, 500, 900), strict=True):
        changes = {"dtype": "float16"} if (spoilt, config) == ("04_threshold", "t0.5") else {}
        project.run(config, answers(400, range(wrong)), experiment="04_threshold", arguments=given,
                    forwards={"full": full}, changes=changes)  # fmt: skip
    for config, wrong, full in (("k1_first", 10, 900), ("k2_first", 12, 450)):
        changes = {"dtype": "float16"} if (spoilt, config) == ("00_baseline", "k1_first") else {}
        project.run(config, answers(400, range(wrong)), forwards={"full": full}, changes=changes)
    content = made(project)
    assert any(alarm["kind"] == "mixed_dtype" and alarm["table"] == spoilt for alarm in content["alarms"])
    assert content["equal_speed"][0]["outcome"] == "gains"
    assert not any("plain decoding" in sentence for sentence in sentences(content))


def test_a_matrix_without_columns_of_one_k_has_its_speed_up_in_seconds(project):
    bars = {"r1.0": {"reread_above": 1.0}, "r0.9": {"reread_above": 0.9}}
    project.experiment("01_idea", BARS, matrix={"configurations": bars, "compare_with": "r1.0"})
    for config, seconds, full in (("r1.0", 12.0, 900), ("r0.9", 8.0, 500)):
        project.run(config, answers(300, range(9), tag=config), experiment="01_idea", arguments=bars[config],
                    seconds=seconds, forwards={"full": full})  # fmt: skip
    content = made(project)
    assert [run["reference_tokens_per_second"] for run in content["tables"][0]["runs"]] == [5000 / 12] * 2
    row = next(line for line in text_of(project, "report.md").splitlines() if line.startswith("| r0.9 "))
    assert row.split("|")[-3].strip() == "1.50"


def test_no_speed_up_against_a_baseline_whose_time_is_of_another_kind_of_run(project):
    project.nine()
    bars = {"r1.0": {"reread_above": 1.0}, "r0.9": {"reread_above": 0.9}}
    project.experiment("01_idea", BARS, matrix={"configurations": bars, "compare_with": "r1.0"})
    project.run("r1.0", answers(300, range(10)), experiment="01_idea", arguments=bars["r1.0"], seconds=60.0)
    project.run("r0.9", answers(300, range(9), tag="!"), experiment="01_idea", arguments=bars["r0.9"],
                seconds=8.0, forwards={"full": 500})  # fmt: skip
    content = made(project)
    assert [run["reference_tokens_per_second"] for run in content["tables"][1]["runs"]] == [None, None]
    row = next(line for line in text_of(project, "report.md").splitlines() if line.startswith("| r1.0 "))
    assert "time measured under other conditions" in row
    found = points_of_speed(project)
    assert "r1.0" not in found
    assert "r0.9" in found


def test_layers_run_are_the_unit_where_they_are_counted(project):
    project.run("k1_first", answers(300, range(10)), forwards={"full": 400, "partial": 150})  # a partial one: 24 of 36
    (run,) = made(project)["tables"][0]["runs"]
    assert run["full_depth_forwards"] == 500
    assert run["layer_forwards_per_token"] == pytest.approx(18_000 / 5000)


def test_the_report_shows_guesses_and_the_rows_that_they_cost(project):
    guesses = {
        "guesses_offered.step": 1922, "guesses_accepted.step": 907, "guesses_offered.commit": 376,
        "guesses_accepted.commit": 119, "guesses_offered.opening": 620,
    }  # fmt: skip
    project.run("k1_first", answers(300, range(10)), forwards={"full": 400, "partial": 150}, guesses=guesses)
    project.run("k1_last", answers(300, range(10)), forwards={"full": 400, "partial": 150})
    guessing, plain = made(project, "--csv")["tables"][0]["runs"]
    assert guessing["row_layer_forwards_per_token"] == pytest.approx(32 * 18_000 / 5000)
    assert not any(name.startswith("guesses") for name in plain)
    text = text_of(project, "report.md").replace("\\", "")
    assert text.count("| k1_first | 907 of 1,922 | 119 of 376 | 0 of 620 |") == 1
    assert re.search(r"\| k1_first \| 300 \|.*\| 3\.60 \| 115 \|", text), "both costs are side by side"
    assert text.count("nearly free") == 1
    first, last = rows_of(project, "runs.csv")
    for name, count in guesses.items():
        assert (first[name.replace(".", "_")], last[name.replace(".", "_")]) == (str(count), "")
    assert first["guesses_accepted_opening"] == "0"

    project.run("k1_first", answers(300, range(10)))
    made(project)
    assert "guessed" not in text_of(project, "report.md")


def test_an_import_never_counts_as_this_code(project, tmp_path):
    project.nine()
    for config in NINE:
        earlier(tmp_path / "theirs" / "toy_math", config, 0.99, limit=None, task="toy_math", tokens=4000)
    content = made(project, "--import", str(tmp_path / "theirs"), "--experiment", "00_baseline")
    assert [(table["label"], table["imported"]) for table in content["tables"]] == [
        ("00_baseline", False),
        ("theirs (imported)", True),
    ]
    assert "theirs" not in json.dumps(content["aup"])
    assert not any("the best is theirs" in sentence for sentence in sentences(content))


# ---- hostile names, bad input ----


def test_html_and_markdown_in_names_and_answers_stay_text(project, tmp_path):
    rows = answers(300, range(10))
    project.run("k1_first", [(HOSTILE + a, c) for a, c in rows])
    project.run("k2_first", [(HOSTILE + "other" + a, c) for a, c in rows], forwards={**FULL, "full": 350})
    name = "<b>x</b>|**y**"
    for config in NINE:
        place = tmp_path / "theirs" / name / "toy_math"
        earlier(
            place,
            config,
            0.5,
            task="toy_math",
            limit=None,
            tokens=4000 + ord(config[-1]),
            gpu_info={"gpu_name": HOSTILE},
        )
    made(project, "--import", str(tmp_path / "theirs"), "--experiment", "00_baseline")
    html = text_of(project, "report.html")
    page = Page(html)
    assert "script" not in page.tags
    assert not {"b", "strong", "em"} & set(page.tags)
    assert page.tags.count("a") == 14  # seven links and their anchors
    assert "<script>alert(1)</script>" in page.text
    markdown = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text_of(project, "report.md"), flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert "**y**" not in markdown.replace("\\*\\*y\\*\\*", "")


def test_an_imported_summary_never_names_a_folder_outside_results(project, tmp_path):
    project.nine()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "holiday.png").write_bytes(b"mine")
    theirs = tmp_path / "theirs" / "runs"
    climbing = f"{'../' * 12}{victim.relative_to('/')}"
    for number, name in enumerate((climbing, str(victim), "..", ".hidden", "a\\..\\b\x1b")):
        earlier(theirs, f"k{number}_first", 0.5, task=name, limit=None)
    earlier(theirs, "k9_first", 0.5, task="toy_math", limit=None)
    content = made(project, "--import", str(tmp_path / "theirs"), "--experiment", "00_baseline")
    [table] = [table for table in content["tables"] if table["imported"]]
    assert [run["config"] for run in table["runs"]] == ["k9_first"]
    assert set(table["left_out"]) == {f"k{number}_first" for number in range(5)}
    assert all("not a name that a file can have" in reason for reason in table["left_out"].values())
    assert [path.name for path in victim.iterdir()] == ["holiday.png"]
    assert [path.name for path in (project.root / "results" / "report").iterdir()] == ["toy_math"]


def test_damaged_summaries_are_left_out_and_the_report_is_made(project):
    project.nine()
    texts = (
        "[" * 100_000,
        '{"schema_version": 1, "accuracy": 0.5, "num_samples": -1}',
        '{"schema_version": 1, "accuracy": 0.5, "num_samples": ' + "9" * 400 + "}",
        '{"schema_version": 1, "accuracy": 0.5, "gpu": "\\udfff"}',
        '{"accuracy": 0.5, "git": [], "throughput": {"tokens_generated": "many"}, "model_args": 7}',
        '{"accuracy": 0.5, "gpu_info": {"gpu_total_vram_gb": [1]}, "group_results": [3], "task": {}}',
    )
    for config, text in zip(NINE[3:], texts, strict=True):
        (project.folder(config) / "summary.json").write_text(text)
    [table] = made(project)["tables"]
    assert sorted(table["left_out"]) == sorted(NINE[3:])
    assert [run["config"] for run in table["runs"]] == NINE[:3]


def test_a_terminal_sees_no_control_characters(project, tmp_path, capsys):
    for config in NINE:
        earlier(tmp_path / "theirs" / "gsm8k", config, 1061 / 1319, limit=None, git={"commit": f"\x1b[31m{config}"})
    assert main(["--import", str(tmp_path / "theirs")], project.root) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experiment", "99_none"], "unknown experiment '99_none'; there are: 00_baseline"),
        (["--task", "nope"], "unknown task 'nope'; valid: gpqa_main_n_shot, gsm8k, humaneval, "),
        (["--task", "toy_math", "--limit", "7"], "no results of toy_math_limit_7; there are: toy_math"),
        (["--limit", "0"], "--limit must be a whole number of at least 1, not '0'"),
        (["--limit", "x"], "--limit must be a whole number"),
        (["--limit", "12"], "no results with --limit 12; there are: toy_math"),
        (["--flips", "-1"], "--flips must be a whole number of at least 0"),
        (["--against", "00_baseline/k9"], "--against: no result '00_baseline/k9'; there are: 00_baseline/k1_first"),
        (
            ["--experiment", "01_other", "--against", "00_baseline/k1_last"],
            "--against: --experiment leaves out 00_baseline/k1_last; add it: --experiment 01_other,00_baseline",
        ),
        (["--experiment", "01_other", "--against", "00_baseline/k9"], "--against: no result '00_baseline/k9'"),
        (["--import", "/nowhere"], "--import: no folder '/nowhere'"),
        (["--fail-on", "note"], "invalid choice: 'note'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(project, words, message, capsys):
    project.nine()
    project.experiment("01_other")
    project.run("k1_first", answers(300, range(10)), experiment="01_other")
    assert main(words, project.root) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (project.root / "results" / "report").exists()


def test_a_report_that_cannot_be_written_is_refused_before_anything_is(project):
    project.nine()
    (project.root / "results" / "report").write_text("a file where a folder should be")
    with pytest.raises(UsageError, match=f"cannot write into '{project.root}/results/report': it is not a folder"):
        main([], project.root)


def test_without_any_result_and_task_there_is_one_line(project, capsys):
    assert main([], project.root) == 2
    assert "nothing has been run" in capsys.readouterr().err


def test_an_empty_import_is_bad_input(project, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["--import", str(tmp_path / "empty")], project.root) == 2
    assert "no summary.json below" in capsys.readouterr().err


def test_a_damaged_matrix_is_bad_input_and_not_the_nine(project, capsys):
    project.nine()
    folder = project.root / "experiments" / "00_baseline"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.json").write_text('{"configurations": ')
    assert main([], project.root) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "experiments/00_baseline/matrix.json: not valid JSON" in error
    assert not (project.root / "results" / "report").exists()


def test_the_exit_status_for_scripts(project):
    project.nine()
    assert main(["--fail-on", "alarm"], project.root) == 0
    project.run("k1_first", answers(300, range(10)), seconds=30.0)
    assert main(["--fail-on", "alarm"], project.root) == 3


# ---- pictures ----


def drawn_figures(project: Project, *words: str) -> dict:
    _, tables = collect(list(words), project.root)
    ((folder, found),) = tables.items()
    return figures.draw(build_report(folder, folder, None, found, project.root, ""))


def points_of_speed(project: Project) -> set[str]:
    """Configurations in the picture of accuracy against seconds."""
    _, tables = collect([], project.root)
    ((folder, found),) = tables.items()
    report = build_report(folder, folder, None, found, project.root, "")
    return {point.run.config for point in figures.points_of(report, lambda run: run.tokens_per_second, report.hardware)}


def test_the_pictures_have_their_axes_series_and_labels(project):
    project.nine()
    drawn = {name: figure for name, (figure, _) in drawn_figures(project).items()}
    assert set(drawn) == {
        "accuracy_tokens_per_forward",
        "accuracy_tokens_per_second",
        "differences",
        "heat_map_00_baseline",
    }
    axes = drawn["accuracy_tokens_per_forward"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["k1", "k2", "k3"]
    series = next(line for line in axes.lines if line.get_linestyle() == "None")
    assert list(series.get_xdata()) == pytest.approx([5.0, 5000 / 650, 5000 / 533])
    assert axes.get_legend_handles_labels()[1] == ["Pareto front", "00_baseline"]
    heat = drawn["heat_map_00_baseline"].axes[0]
    assert heat.images[0].get_array().shape == (3, 3)
    assert [label.get_text() for label in heat.get_xticklabels()] == list(SUBSETS)
    assert [text.get_text() for text in heat.texts] == ["96.7"] * 3 + ["96.0"] * 3 + ["86.7"] * 3
    assert [label.get_text() for label in drawn["differences"].axes[0].get_yticklabels()] == ["k2", "k3"]


def test_speeds_that_an_alarm_calls_incomparable_are_grey_and_without_a_front(project):
    project.nine()
    labels = drawn_figures(project)["accuracy_tokens_per_second"][0].axes[0].get_legend_handles_labels()[1]
    assert labels == ["Pareto front", "00_baseline"]
    for k, lost in ((1, 10), (3, 40)):
        project.run(f"k{k}_first", answers(300, range(lost)), arguments={"batch_size": 8})
    figure, caption = drawn_figures(project)["accuracy_tokens_per_second"]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["00_baseline, grey"]
    assert "Grey: speeds that cannot be compared" in caption


def test_a_sweep_of_two_arguments_is_a_heat_map_and_the_envelope_is_drawn(project):
    sweep = {f"t{t}_s{s}": {"threshold": t, "small_block_size": s} for t in (0.5, 0.9) for s in (8, 32)}
    project.experiment("04_threshold", matrix={"configurations": sweep, "compare_with": "t0.9_s8"})
    for i, (config, given) in enumerate(sweep.items()):
        project.run(config, answers(300, range(40 - 10 * i)), experiment="04_threshold", arguments=given,
                    forwards={"full": 300 + 100 * i})  # fmt: skip
    drawn = drawn_figures(project)
    assert drawn["heat_map_04_threshold"][0].axes[0].images[0].get_array().shape == (2, 2)
    labels = drawn["accuracy_tokens_per_forward"][0].axes[0].get_legend_handles_labels()[1]
    assert "plain: envelope" in labels


def test_a_heat_map_shows_every_configuration_of_a_matrix_with_more_than_two_arguments(project):
    """Two configurations must not share a cell; what one leaves as it is has the value that its run recorded."""
    given = {
        "r1.0": {"reread_above": 1.0},
        "r0.9": {"reread_above": 0.9},
        "r0.5": {"reread_above": 0.5},
        "r0.9_s1": {"reread_above": 0.9, "small_block_size": 1},
        "r0.9_t0.8": {"reread_above": 0.9, "threshold": 0.8},
    }
    project.experiment("01_idea", BARS, matrix={"configurations": given, "compare_with": "r1.0"})
    for i, (config, arguments) in enumerate(given.items()):
        project.run(config, answers(100, range(10 * i)), experiment="01_idea", arguments=arguments)
    axes = drawn_figures(project)["heat_map_01_idea"][0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.5", "0.9", "1.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n0.9", "8\n0.8", "8\n0.9"]
    cells = [text.get_text() for text in axes.texts]
    assert cells == ["–", "–", "80.0", "70.0", "60.0", "90.0", "–", "–", "100.0"]


def test_a_drift_map_of_fewer_questions_is_shown_and_one_of_another_model_is_not(project):
    project.nine()
    for base, name, model in (
        ("artifacts", "toy_math_limit_100", "tiny"),
        ("artifacts", "toy_math_limit_50", "another"),
        ("results", "toy_mathematics", "tiny"),
    ):
        folder = project.root / base / "drift" / name
        folder.mkdir(parents=True)
        (folder / "layers.png").write_bytes(b"png")
        (folder / "drift.json").write_text(json.dumps({"model": model}))
    made(project)
    text = text_of(project, "report.html")
    assert "Drift of the layers between denoising steps, toy_math_limit_100: layers." in text
    assert "Not from the results above: a run of its own (artifacts/drift/toy_math_limit_100)." in text
    assert "toy_math_limit_50" not in text
    assert "toy_mathematics" not in text


# ---- the house ----


@pytest.mark.slow
def test_the_report_needs_no_torch_and_no_model(project):
    project.nine()
    program = (
        "import sys\nfrom pathlib import Path\nfrom fast_dllm.report.__main__ import main\n"
        f"assert main([], Path({str(project.root)!r})) == 0\n"
        "bad = {'torch', 'transformers', 'lm_eval', 'statsmodels', 'datasets'} & set(sys.modules)\nassert not bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- CSV files ----


def rows_of(project: Project, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text_of(project, name).splitlines()))


def test_csv_files_have_what_the_report_has(project):
    project.nine(num_questions=50, lost=(1, 2, 4), arguments={"note": "=1+1"})
    project.run("k3_last", answers(50, wrong=range(4)), changes={"gpu": "NVIDIA A40"}, arguments={"note": "=1+1"})
    content = made(project, "--task", "toy_math", "--csv")
    assert content["num_alarms"]
    runs, (table,) = rows_of(project, "runs.csv"), content["tables"]
    assert [row["config"] for row in runs] == NINE
    for row, run in zip(runs, table["runs"], strict=True):
        assert float(row["accuracy"]) == run["accuracy"]
        assert [float(row["accuracy_low"]), float(row["accuracy_high"])] == run["interval"]
        assert float(row["tokens_per_full_depth_forward"]) == run["tokens_per_full_depth_forward"]
        assert float(row["speed_up_forwards"]) == run["speed_up_forwards"]
        assert (row["arg_reuse_k"], row["arg_layer_subset"]) == (row["config"][1], row["config"][3:])
        assert (row["forwards_prefill"], row["forwards_partial"], row["limit"]) == ("100", "", "")
        assert row["arg_note"] == "'=1+1"  # a spreadsheet would compute it
    of_alarms = {(alarm["kind"], config) for alarm in content["alarms"] for config in alarm["configs"]}
    assert {(kind, row["config"]) for row in runs for kind in row["alarms"].split()} == of_alarms

    questions = rows_of(project, "questions.csv")
    assert len(questions) == 9 * 50
    assert len({row["key"] for row in questions}) == 50  # the same question has the same key in each run
    right = sum(float(row["correct"]) for row in questions if row["config"] == "k3_last")
    assert right == float(runs[NINE.index("k3_last")]["num_correct"]) == 46

    documented = re.findall(r"`([a-z_0-9<>]+)`", (ROOT / "docs" / "report.md").read_text())
    columns = {name for rows in (runs, questions) for name in rows[0] if not name.startswith("arg_")}
    assert columns <= set(documented), "docs/report.md names every column"

    old_picture = project.root / "results" / "report" / "toy_math" / "heat_map_gone.png"
    old_picture.write_bytes(b"x")
    made(project, "--task", "toy_math")
    assert not old_picture.with_name("runs.csv").exists()  # of another report
    assert not old_picture.exists()
