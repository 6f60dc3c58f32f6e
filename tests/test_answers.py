"""The store of answers: nothing lost but the batch in flight, nothing reused that could differ."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fast_dllm.errors import TakenOverError
from fast_dllm.record.answers import SYNC_SECONDS, AnswerStore, num_answers, request_key
from fast_dllm.record.batches import BatchRecord, Ledger
from fast_dllm.record.cost import Cost

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {"model": "tiny", "threshold": 0.9, "code": "abc"}
COST = Cost(seconds_generating=0.5, new_tokens=10, forwards={"sub": 3})


def files_of(store: AnswerStore) -> list[Path]:
    return sorted(store.folder.glob("*.jsonl"))


def test_a_second_process_finds_the_answers_of_the_first_and_sums_their_cost(tmp_path):
    with AnswerStore(tmp_path, IDENTITY) as first:
        first.append({"a": "one\n\u2713", "b": [-0.1, True]}, COST)
    with AnswerStore(tmp_path, IDENTITY) as second:
        assert second["a"] == "one\n\u2713"
        assert second["b"] == [-0.1, True]
        assert "c" not in second
        assert second.num_segments == 1
        second.append({"c": "three"}, COST)
        assert second.cost == Cost(seconds_generating=1.0, new_tokens=20, forwards={"sub": 6})
        assert second.num_segments == 2
    assert [file.name for file in files_of(second)] == ["001.rank0.jsonl", "002.rank0.jsonl"]


def test_shards_side_by_side_are_one_segment_and_each_further_beginning_is_another(tmp_path):
    ledger = Ledger()
    assert (ledger.num_segments, ledger.num_shards) == (0, 1)
    ledger.segments |= {("0-of-3", 1), ("1-of-3", 2), ("2-of-3", 3)}
    assert (ledger.num_segments, ledger.num_shards) == (1, 3)
    ledger.segments.add(("1-of-3", 4))  # that shard was killed and begun anew
    assert (ledger.num_segments, ledger.num_shards) == (2, 3)
    ledger.segments.add((None, 5))  # the whole run answered what was missing
    assert (ledger.num_segments, ledger.num_shards) == (3, 3)


@pytest.mark.parametrize("changed", [{"model": "other"}, {"threshold": 0.90001}, {"code": "abd"}, {"extra": None}])
def test_nothing_is_reused_when_anything_that_the_answers_depend_on_has_changed(tmp_path, changed):
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"a": "one"}, COST)
    with AnswerStore(tmp_path, IDENTITY | changed) as other:
        assert len(other) == 0
        assert other.cost == Cost()
    with AnswerStore(tmp_path, dict(reversed(IDENTITY.items()))) as same:
        assert len(same) == 1


def test_a_requests_key_depends_on_each_of_its_parts():
    keys = {request_key(*parts) for parts in [("a", ["b"], 1), ("a", ["b"], 2), ("a", ["c"], 1), ("ab", [], 1), ("a",)]}
    assert len(keys) == 5
    assert request_key("a", {"x": 1, "y": 2}) == request_key("a", {"y": 2, "x": 1})


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_that_batch_only(tmp_path, cut):
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"a": "one"}, COST)
        store.append({"b": "two"}, COST)
    file = files_of(store)[0]
    file.write_bytes(file.read_bytes()[:-cut])
    with AnswerStore(tmp_path, IDENTITY) as store:
        assert list(store) == ["a"]
        assert store.num_torn == 1
        store.append({"b": "again"}, COST)
    with AnswerStore(tmp_path, IDENTITY) as store:
        assert (store["a"], store["b"]) == ("one", "again")
        assert store.cost.new_tokens == 20


def test_a_full_disk_raises_and_leaves_no_half_line_behind(tmp_path, monkeypatch):
    store = AnswerStore(tmp_path, IDENTITY)
    store.append({"a": "one"}, COST)
    real_write = os.write

    def short_write(descriptor, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(OSError, match="No space"):
        store.append({"b": "two"}, COST)
    monkeypatch.undo()
    assert "b" not in store
    store.append({"c": "three"}, COST)
    store.close()
    with AnswerStore(tmp_path, IDENTITY) as store:
        assert sorted(store) == ["a", "c"]
        assert store.num_torn == 0


def test_processes_side_by_side_write_their_own_files_and_their_gpu_seconds_add_up(tmp_path):
    stores = [AnswerStore(tmp_path, IDENTITY, rank=rank) for rank in (0, 1)]
    for rank, store in enumerate(stores):
        store.append({f"question {rank}": "x"}, Cost(seconds_generating=1.0 + rank, new_tokens=10))
        store.close()
    found = stores[0].recount()
    assert len(found.answers) == 2
    assert found.cost == Cost(seconds_generating=3.0, new_tokens=20)
    assert len(found.segments) == 1
    assert found.wall_seconds == pytest.approx(2.0, abs=0.5), "they ran at once"


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_files_that_another_process_removed_at_the_end_do_not_change_what_was_done(tmp_path, left):
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"a": "one"}, COST)
    own, other = Ledger(), Ledger()
    own.add(BatchRecord.ending_now({"b": "two"}, COST))
    other.add(BatchRecord.ending_now({"c": "three"}, COST))
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"b": "two"}, COST)
        assert store.total([own]).cost.new_tokens == 20
        shutil.rmtree(store.folder)
        if left != "nothing":
            store.folder.mkdir()
        assert store.total([own]).answers == {"a": "one", "b": "two"}
        assert store.total([own]).cost.new_tokens == 20
        with pytest.raises(TakenOverError, match="another process has finished"):
            store.total([own, other])


def test_what_was_found_at_the_start_is_counted_when_another_process_removes_the_files(tmp_path):
    with AnswerStore(tmp_path, IDENTITY) as first:
        first.append({"a": "one"}, Cost(requests=1, new_tokens=10))
        second = AnswerStore(tmp_path, IDENTITY)
        first.discard()
    total = second.total([Ledger()])  # it has added nothing
    assert total.answers == {"a": "one"}
    assert total.cost.requests == 1


def test_an_answer_that_two_processes_gave_counts_once(tmp_path):
    stores = [AnswerStore(tmp_path, IDENTITY, shard=shard) for shard in ("0-of-2", "1-of-2")]
    own = {key: Cost(new_tokens=tokens) for key, tokens in (("a", 1), ("b", 10), ("c", 100))}
    stores[0].append({"a": "A", "b": "B"}, Cost(seconds_generating=2.0), own)
    stores[1].append({"b": "B", "c": "C"}, Cost(seconds_generating=4.0), own, batch_size=2)
    stores[1].append({"b": "B"}, Cost(seconds_generating=8.0), own)
    found = stores[0].recount()
    assert found.answers == {"a": "A", "b": "B", "c": "C"}
    assert found.cost == Cost(seconds_generating=4.0, new_tokens=111)
    assert found.batch_sizes == {2: 3}
    assert found.segments == {("0-of-2", 1), ("1-of-2", 1)}


def synced_content(path: Path, synced: dict[str, int]) -> bytes:
    """What a machine that lost its power would find of a file."""
    return path.read_bytes()[: synced.get(str(path), 0)]


def test_a_power_cut_loses_no_more_than_a_second_of_finished_answers(tmp_path, monkeypatch):
    """Power is lost at any moment: files end where their last fsync found them."""
    synced, syncs, real = {}, [], os.fsync

    def fsync(descriptor):
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.startswith(str(tmp_path)) and path.endswith(".jsonl"):
            syncs.append(time.monotonic())
            size = os.fstat(descriptor).st_size
            real(descriptor)
            synced[path] = size

    monkeypatch.setattr(os, "fsync", fsync)
    store, appended, cuts = AnswerStore(tmp_path, IDENTITY), {}, 0
    [file] = files_of(store)
    began, number = time.monotonic(), 0
    while time.monotonic() - began < 4:
        pause = 1.5 if number == 60 else 0.02  # one batch is long
        store.append({str(number): "x"}, COST)
        appended[number], number = time.monotonic(), number + 1
        kept = synced_content(file, synced)
        found = {int(key) for line in kept.splitlines() for key in json.loads(line)["answers"]}
        assert all(when - syncs[-1] < SYNC_SECONDS for key, when in appended.items() if key not in found)
        cuts += len(found) < len(appended)
        time.sleep(pause)
    assert cuts > 10, "everything was synced at once: nothing was ever dropped"
    assert len(syncs) <= 5
    assert min(later - sooner for sooner, later in pairwise(syncs)) >= SYNC_SECONDS
    store.append({"last": "x"}, COST)
    store.close()
    assert b'"last"' in synced_content(file, synced)


def test_a_disk_that_cannot_keep_an_answer_is_told(tmp_path, monkeypatch):
    store = AnswerStore(tmp_path, IDENTITY)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded")))
    with pytest.raises(OSError, match="quota"):
        store.append({"a": "one"}, COST)
    with pytest.raises(OSError, match="quota"):
        store.close()
    store.close()


def test_a_flipped_bit_anywhere_in_a_line_costs_that_batch_or_nothing(tmp_path):
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"a": "one two"}, COST, {"a": COST}, batch_size=7)
        store.append({"b": "three"}, COST)
    file = files_of(store)[0]
    whole = file.read_bytes()
    first, second = whole.splitlines(keepends=True)
    dice = random.Random(0)
    noticed = 0
    for _ in range(100):
        place = dice.randrange(len(first) - 1)
        damaged = bytearray(first)
        damaged[place] ^= 1 << dice.randrange(8)
        file.write_bytes(bytes(damaged) + second)
        with AnswerStore(tmp_path, IDENTITY) as store:
            assert store["b"] == "three" or b"\n" in damaged[:-1]
            assert store._ledger.answers.get("a", "one two") == "one two"
            noticed += "a" not in store
        for path in files_of(store)[1:]:
            path.unlink()
    assert noticed == 100


@pytest.mark.parametrize(
    "line",
    [
        b'{"answers": ' + b"[" * 200_000 + b"\n",
        b'{"answers": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}\n",
        b'{"answers": {"a": "' + b"x" * (65 * 2**20) + b'"}}\n',
        b'{"answers": {"a": "x"}, "counters": {"new_tokens": -1}}\n',
        b'{"answers": {"a": "x"}, "counters": {"new_tokens": ' + b"9" * 400 + b"}}\n",
        b'{"answers": {"a": "x"}, "batch_size": "many"}\n',
        b'{"answers": ["a"]}\n',
        b"\xff\xfe\n",
        b"\0" * 100 + b"\n",
    ],
    ids=[
        "deep",
        "nested",
        "huge",
        "negative",
        "400 digits",
        "text for a number",
        "no object",
        "no text",
        "zeros of a crashed disk",
    ],
)
def test_no_line_blocks_a_resume(tmp_path, line):
    """Neither without a checksum nor with one that fits."""
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.append({"b": "two"}, COST)
    checked = line[:-2] + f', "sha256": "{hashlib.sha256(line[:-2]).hexdigest()[:16]}"}}\n'.encode()
    (store.folder / "000.rank0.jsonl").write_bytes(line + checked + BatchRecord({"c": "one"}, COST).to_line())
    with AnswerStore(tmp_path, IDENTITY) as store:
        assert sorted(store) == ["b", "c"]
        assert store.num_torn == 2
    assert num_answers(tmp_path) == 2


def test_two_processes_of_one_rank_never_share_a_file(tmp_path):
    first, second = AnswerStore(tmp_path, IDENTITY), AnswerStore(tmp_path, IDENTITY)
    first.append({"a": "1"}, Cost())
    second.append({"b": "2"}, Cost())
    assert len(files_of(first)) == 2


def test_the_progress_file_says_how_far_the_whole_evaluation_is(tmp_path):
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.expect("abcd")
        store.append({"a": "one"}, COST)
    with AnswerStore(tmp_path, IDENTITY) as store:
        store.expect("abcd")
        store.append({"b": "two", "c": "three"}, COST)
    progress = json.loads((tmp_path / "progress.rank0.json").read_text())
    assert (progress["answered"], progress["total"], progress["segment_answered"]) == (3, 4, 2)
    assert (progress["new_tokens"], progress["seconds_generating"]) == (20, 1.0)
    assert progress["segment_seconds"] > 0


def test_who_was_taken_over_writes_nothing_more(tmp_path):
    claim = tmp_path / ".lock.0001"
    claim.mkdir()
    (claim / "owner").write_text("n1 1")
    first = AnswerStore(tmp_path, {"model": "tiny"}, claim=claim)
    first.append({"a": "1"}, Cost(requests=1))
    shutil.rmtree(claim)
    second = AnswerStore(tmp_path, {"model": "tiny"})
    for check in (first.check_claim, lambda: first.append({"b": "of the first"}, Cost(requests=1))):
        with pytest.raises(TakenOverError, match="another process has taken over"):
            check()
    second.append({"b": "of the second"}, Cost(requests=1))
    with AnswerStore(tmp_path, {"model": "tiny"}) as found:
        assert {key: found[key] for key in found} == {"a": "1", "b": "of the second"}


WRITER = """
import sys
from pathlib import Path
from fast_dllm.record.answers import AnswerStore
from fast_dllm.record.cost import Cost
with AnswerStore(Path(sys.argv[1]), {"model": "tiny"}) as store:
    print("ready", flush=True)
    for i in range(int(sys.argv[2])):
        if str(i) not in store:
            store.append({str(i): f"answer {i} " + "x" * 5000}, Cost(new_tokens=i + 1))
            print(i, flush=True)
"""


@pytest.mark.slow
def test_no_answer_that_was_reported_is_lost_over_fifty_kills(tmp_path):
    num_questions, dice, reported = 10**6, random.Random(0), set()  # never done, however fast the disk
    for _ in range(50):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(num_questions)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        lines = [process.stdout.readline() for _ in range(dice.randrange(40))]
        time.sleep(dice.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        reported |= {line for line in "".join([*lines, output]).split("\n")[:-1] if line}
    with AnswerStore(tmp_path, {"model": "tiny"}) as store:
        found = set(store)
        assert reported, "the writers were killed before they wrote anything"
        assert reported <= found
        assert all(store[key].startswith(f"answer {key} ") for key in found)
        # each answer was generated once: none was lost and asked again
        assert store.cost.new_tokens == sum(int(key) + 1 for key in found)
