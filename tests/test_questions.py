"""Each question's result beside the summary: what is kept, how small, and how damage shows."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_project import Project, answers, sample

from fast_dllm.record import questions
from fast_dllm.record.cost import Cost
from fast_dllm.record.summary import content_sha256, parse_summary

ROOT = Path(__file__).resolve().parent.parent
METRIC = "exact_match,flexible-extract"


def collected(task="sums", rows=((1, "b", 0.0), (0, "a", 1.0)), **found):
    samples = {task: [sample(task, i, a, c) for i, a, c in rows]}
    return questions.collect(samples, {"results": {task: {METRIC: 0.5}}, "versions": {task: 3.0}} | found)


def test_what_is_written_is_read(tmp_path):
    content, texts = collected()
    hashes = questions.write(tmp_path, content, texts)
    assert set(hashes) == {questions.QUESTIONS_FILE, questions.TEXTS_FILE}
    found = questions.read(tmp_path / questions.QUESTIONS_FILE)
    assert [(q.task, q.doc_id, q.correct, q.answer) for q in found.questions] == [
        ("sums", 0, 1.0, questions.short_hash("a")),
        ("sums", 1, 0.0, questions.short_hash("b")),
    ]
    assert found.versions == {"sums": 3.0}
    lines = questions.read_texts(tmp_path / questions.TEXTS_FILE)
    assert (lines["sums", 1]["answer"], lines["sums", 1]["target"]) == ("b", "1")


def test_what_each_answer_cost_is_kept_where_all_are_known(tmp_path):
    samples = {"sums": [sample("sums", i, "a", 1.0) for i in range(2)], "more": [sample("more", 0, "a", 1.0)]}
    found = {"results": {task: {METRIC: 1.0} for task in samples}}
    costs = {
        ("sums", 0): Cost(new_tokens=20, layer_forwards={"full": 72, "partial": 24.5, "commit": 36}),
        ("sums", 1): Cost(new_tokens=9, layer_forwards={"full": 36, "prefill": 36}),
    }
    content, texts = questions.collect(samples, found, costs)
    questions.write(tmp_path, content, texts)
    kept = [(q.new_tokens, q.layers, q.step_layers) for q in questions.read(tmp_path / "questions.json.gz").questions]
    assert kept == [(20, 132.5, 96.5), (9, 72, 36), (None, None, None)]
    content["tasks"]["sums"]["layers"].pop()
    questions.write(tmp_path, content, texts)
    with pytest.raises(questions.QuestionsError, match="different lengths"):
        questions.read(tmp_path / "questions.json.gz")


def test_only_the_primary_metrics_filter_counts_and_repeated_rows_count_once():
    rows = [
        sample("sums", 0, "a", 1.0),
        sample("sums", 0, "a", 1.0),
        sample("sums", 0, "a", 0.0) | {"filter": "strict-match"},
    ]
    content, _ = questions.collect({"sums": rows}, {"results": {"sums": {METRIC: 1.0}}})
    assert content["tasks"]["sums"]["correct"] == [1]


def test_a_scored_question_keeps_the_chosen_option():
    row = sample("pick", 0, "", 1.0, "acc") | {
        "filter": "none",
        "resps": [[(-3.0, False)], [(-1.0, True)], [(-2.0, False)]],
    }
    content, texts = questions.collect({"pick": [row]}, {"results": {"pick": {"acc,none": 1.0}}})
    assert content["tasks"]["pick"]["answers"] == ["#1"]
    assert texts[0]["answer"] == "-3.0000 -1.0000 -2.0000"


def test_a_metric_that_is_no_number_for_one_question_is_left_out():
    content, texts = collected(rows=[(0, "a", [True, False])])
    assert (content["tasks"], texts) == ({}, [])


@pytest.mark.parametrize(("whole", "weights"), [(0.25, "size"), (0.5, "equal"), (0.4, "unknown")])
def test_how_a_group_weights_its_subtasks_is_seen_in_its_number(whole, weights):
    samples = {"a": [sample("a", 0, "x", 1.0)], "b": [sample("b", i, "x", 0.0) for i in range(3)]}
    found = {"results": {"a": {METRIC: 1.0}, "b": {METRIC: 0.0}}, "groups": {"g": {METRIC: whole}}}
    content, _ = questions.collect(samples, found | {"group_subtasks": {"g": ["a", "b"]}})
    assert content["groups"] == {"g": weights}


# Named: a gzip header holds the second it was made in, and pytest-xdist's workers must agree on the tests' names.
DAMAGES = {
    "empty": b"",
    "torn": b"torn",
    "cut_off": gzip.compress(b'{"schema_version": 1, "groups": {}, "tasks": {}}')[:-12],
    "no_object": gzip.compress(b"[]"),
    "another_schema": gzip.compress(b'{"schema_version": 9}'),
    "nothing_in_it": gzip.compress(b'{"schema_version": 1}'),
    "deep": gzip.compress(b'{"schema_version": ' + b"[" * 100_000),
    "gigabytes": gzip.compress(b'{"schema_version": 1, "x": "' + b"x" * 100_000_000 + b'"}'),
    "escape": gzip.compress(b'{"schema_version": "\\u001b[31m"}'),
    "huge_number": gzip.compress(
        b'{"schema_version": 1, "groups": {}, "tasks": {"a": {"keys": "0123456789ab", "doc_ids": [0], "answers": ["x"],'
        b' "correct": [' + b"9" * 400 + b"]}}}"
    ),
    "no_text": gzip.compress(
        b'{"schema_version": 1, "groups": {}, "tasks": {"a": {"keys": "0123456789ab", "doc_ids": [[]], "answers": [{}],'
        b' "correct": [1]}}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / questions.QUESTIONS_FILE
    path.write_bytes(damage)
    with pytest.raises(questions.QuestionsError) as raised:
        questions.read(path)
    assert str(raised.value).isprintable()


def test_a_small_file_that_inflates_to_a_gigabyte_takes_little_memory(tmp_path):
    path = tmp_path / questions.QUESTIONS_FILE
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * 10_000_000)
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom fast_dllm.record import questions\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    questions.read(Path(sys.argv[1]))\nexcept questions.QuestionsError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, check=True)
    fault, kilobytes = done.stdout.splitlines()
    assert "inflates to more than" in fault
    assert int(kilobytes) < 400_000


def test_the_seal_covers_everything_and_not_the_spacing(tmp_path):
    folder = Project(tmp_path).run("k1_first", answers(30))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["summary_sha256"] == content_sha256(summary)
    assert content_sha256(dict(reversed(summary.items()))) == summary["summary_sha256"]
    assert content_sha256(summary | {"host": "x"}) != summary["summary_sha256"]
    assert parse_summary(summary).sealed(folder).as_json() == summary
