"""What frozen policies answer on the golden models: given again by today's engine, and the record of that."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from fast_dllm import transcripts
from fast_dllm.decode import experiments
from fast_dllm.errors import UsageError
from fast_dllm.spec.hashes import REPLAYS_FILE, decoding_sha256, replays


@pytest.mark.slow
def test_todays_engine_gives_every_transcript_again():
    """What the command does before it records; a minute of one core."""
    assert transcripts.replay(experiments.available()) == []


@pytest.mark.parametrize("name", experiments.available()[::3])
def test_todays_engine_gives_a_sample_of_the_transcript_again(golden_models, name):
    """The first and the last configuration, on a model each. All of them are replayed for the record; see below."""
    transcript = transcripts.read_transcript(name)
    names = list(transcript["configurations"])
    for which, chosen in (("tiny28", names[0]), ("tiny36", names[-1])):
        models = {which: golden_models[which]}
        assert transcripts.differences(experiments.load(name), transcript, models, [chosen]) == []


@pytest.mark.parametrize("name", experiments.available())
def test_a_frozen_experiment_is_the_text_and_the_matrix_of_its_transcript(name):
    transcripts.check_frozen(experiments.load(name), transcripts.read_transcript(name))


def test_the_record_says_that_todays_engine_was_replayed():
    listed = replays(experiments.ROOT).get(decoding_sha256(experiments.ROOT), ())
    missing = set(experiments.available()) - set(listed)
    assert not missing, f"{REPLAYS_FILE} does not list today's engine for {missing}; run: {transcripts.COMMAND}"


def test_transcripts_exercise_every_way_to_unmask_and_reuse():
    """Several tokens a step, re-read steps, prefills, and a block behind a committed one."""
    steps, tokens, kinds = 0, 0, set()
    for written in transcripts.read_transcript("00_baseline")["configurations"].values():
        for answer in (answer for answers in written["answers"].values() for answer in answers):
            steps += answer["forwards"].get("full", 0) + answer["forwards"].get("reused", 0)
            tokens, kinds = tokens + len(answer["tokens"]), kinds | set(answer["forwards"])
    assert tokens > 1.2 * steps
    assert kinds == {"prefill", "full", "reused", "commit"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A project with one experiment, of one configuration, whose transcript is written in a moment."""
    folder = tmp_path / "experiments" / "00_small"
    shutil.copytree(experiments.EXPERIMENTS / "00_baseline", folder)
    (folder / transcripts.TRANSCRIPT_FILE).unlink()
    matrix = {"compare_with": "a", "configurations": {"a": {"reuse_k": 2, "layer_subset": "middle", "threshold": 0.5}}}
    (folder / "matrix.json").write_text(json.dumps(matrix))
    monkeypatch.setattr(experiments, "EXPERIMENTS", folder.parent)
    monkeypatch.setattr(transcripts, "GOLDEN_MODELS", ("tiny28",))
    monkeypatch.setattr(transcripts, "PROMPT_LENGTHS", (5,))
    monkeypatch.setattr(transcripts, "NEW_TOKENS", 32)
    return folder


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["transcripts", *words])
    return transcripts.main()


def test_the_command_writes_a_transcript_and_records_what_it_replays(small, monkeypatch, capsys):
    root, today = small.parent.parent, decoding_sha256(experiments.ROOT)
    record = {"schema_version": 1, "replayed": {"1" * 64: ["00_small", "07_other"], "2" * 64: ["00_small"]}}
    (root / REPLAYS_FILE).write_text(json.dumps(record))

    assert run(monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{transcripts.COMMAND} --write 00_small" in told

    assert run(monkeypatch, "--write", "00_small") == 0
    assert replays(root) == {"1" * 64: ("07_other",), today: ("00_small",)}, (
        "what an earlier transcript was replayed with"
    )
    written = (small / "transcript.json").read_bytes()
    assert json.loads(written)["golden_parity"] is False

    (root / REPLAYS_FILE).unlink()
    assert run(monkeypatch) == 0
    assert replays(root) == {today: ("00_small",)}

    assert run(monkeypatch, "--write", "00_small") == 2, "it is frozen"
    assert "--force" in capsys.readouterr().err
    assert run(monkeypatch, "--write", "00_small", "--force") == 0
    assert (small / "transcript.json").read_bytes() == written


def test_another_answer_is_told_and_nothing_is_recorded(small, monkeypatch, capsys):
    assert run(monkeypatch, "--write", "00_small") == 0
    (small.parent / "replays.json").unlink()
    content = json.loads((small / "transcript.json").read_text())
    content["configurations"]["a"]["answers"]["tiny28"][0]["tokens"][3] += 1
    (small / "transcript.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert run(monkeypatch) == 1
    told = capsys.readouterr()
    assert told.out.startswith("00_small, a on tiny28, prompt 0: tokens [")
    assert "nothing is recorded" in told.err
    assert not (small.parent / "replays.json").exists()


@pytest.mark.parametrize(("file", "fault"), [("generation_functions.py", "its text"), ("matrix.json", "its matrix")])
def test_a_changed_experiment_is_not_replayed(small, monkeypatch, capsys, file, fault):
    assert run(monkeypatch, "--write", "00_small") == 0
    path = small / file
    path.write_text(path.read_text().replace("0.5", "0.6") + "\n" if file == "matrix.json" else path.read_text() + "\n")
    with pytest.raises(UsageError, match=fault):
        transcripts.replay(["00_small"])
    capsys.readouterr()
    assert run(monkeypatch) == 2
    assert f"{transcripts.COMMAND} --write 00_small" in capsys.readouterr().err


def test_without_the_golden_models_the_command_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(transcripts, "GOLDEN", tmp_path)
    with pytest.raises(UsageError, match=rf"^no golden model tiny28 in {tmp_path}"):
        transcripts.golden_model("tiny28")
