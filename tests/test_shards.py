"""Shares of one evaluation: balanced, laid down once, and together exactly the evaluation in one piece."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from fast_dllm.decode import batching
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.record.cost import Cost
from fast_dllm.record.shards import Plan, Shard, ShardAnswered, balanced, check_nobody_at_work, claim_shard, discard

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
QUESTIONS = 5


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "1/0", "a/2", "1/2/3", "\u0661/2"])
def test_a_share_that_is_none_is_named_in_a_line(text):
    with pytest.raises(UsageError, match=r"--shard must be i/N with i from 0 to N - 1"):
        Shard.parse(text, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 200])
def test_shares_have_every_key_once_and_nearly_equal_sums(count):
    dice = random.Random(count)
    costs = {str(key): dice.uniform(1, 10) for key in range(100)}
    shards = balanced(costs, count)
    assert sorted(itertools.chain(*shards)) == sorted(costs)
    sums = [sum(costs[key] for key in shard) for shard in shards]
    best = max(sum(costs.values()) / count, *costs.values())
    assert max(sums) <= 4 / 3 * best
    assert balanced(dict(reversed(costs.items())), count) == shards


def test_what_is_answered_already_does_not_pile_up_in_one_share():
    sizes = [len(shard) for shard in balanced({str(key): 0.0 for key in range(12)}, 4)]
    assert sizes == [3, 3, 3, 3]


def test_of_several_that_lay_a_plan_down_at_once_all_follow_one(tmp_path):
    costs = {f"{key:016x}": float(key) for key in range(20)}
    first = Plan.of(tmp_path, tmp_path, Shard(0, 2))
    second = Plan.of(tmp_path, tmp_path, Shard(1, 2))
    own = first.keys_of_shard(costs)
    # by the time of the second one, answers are there and weigh nothing: the plan stays
    assert own | second.keys_of_shard(dict.fromkeys(costs, 0.0)) == set(costs)
    assert not own & second.keys_of_shard(costs)
    assert [path.name for path in tmp_path.glob("plan.*")] == ["plan.0001"]


def test_another_number_of_shares_is_refused_while_one_is_at_work_and_taken_afterwards(tmp_path):
    claim = claim_shard(tmp_path / "shards" / "0-of-2")
    Plan.of(tmp_path, tmp_path, Shard(0, 2))
    for other in (Shard(0, 3), Shard(0, 2, processes=2)):
        with pytest.raises(UsageError, match=rf"in 2 shards \(0-of-2 at work\), not in {other.sharding}"):
            Plan.of(tmp_path, tmp_path, other)
    with pytest.raises(UsageError, match=r"shard 0-of-2 of .* is being answered by process"):
        check_nobody_at_work(tmp_path)
    with pytest.raises(UsageError, match="shard 0-of-2 is being answered by process"):
        claim_shard(tmp_path / "shards" / "0-of-2")
    claim.release()
    check_nobody_at_work(tmp_path)
    assert Plan.of(tmp_path, tmp_path, Shard(0, 3)).path.name == "plan.0002"
    assert Plan.of(tmp_path, tmp_path, Shard(2, 3)).path.name == "plan.0002"
    claim = claim_shard(tmp_path / "shards" / Shard(0, 2, processes=2).name)
    with pytest.raises(UsageError, match=r"shard 0-of-2x2 of .* is being answered by process"):
        check_nobody_at_work(tmp_path)
    claim.release()


# -- the adapter -------------------------------------------------------------------------------------------------------
def generated(texts):
    return [Instance("generate_until", {}, (text, {"until": ["\n\n"]}), doc_id) for doc_id, text in enumerate(texts)]


def scored():
    return [Instance("loglikelihood", {}, (f"{text}:", letter), 0) for text in ("one", "two", "six") for letter in "AB"]


def counts(ledger) -> dict:
    return {name: value for name, value in ledger.cost.as_json().items() if not name.startswith("seconds")}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("count", "mode"), [(1, "reference"), (2, "chain"), (3, "reference"), (7, "reference"), (20, "chain")]
)
def test_shares_and_one_that_finishes_are_the_evaluation_in_one_piece(short_random, tmp_path, count, mode):
    texts = [f"{'word ' * (7 * index % 5)}{index}" for index in range(7)]
    texts.append(texts[0])  # equal requests have one answer
    arguments = {"model_path": str(short_random), "max_new_tokens": 32, "batch_size": 2, "device": "cpu"}
    arguments["loglikelihood_mode"] = mode

    def ask(lm):
        return lm.generate_until(generated(texts), disable_tqdm=True), [
            tuple(score) for score in lm.loglikelihood(scored(), disable_tqdm=True)
        ]

    whole = FastDLLM(ModelArguments.parse(**arguments))
    expected = ask(whole)
    given = 0
    for index in reversed(range(count)):
        lm = whole.configured(whole.arguments)
        lm.keep_answers(tmp_path, shard=Shard(index, count))
        lm.answers.end_after({"generate_until", "loglikelihood"})
        with pytest.raises(ShardAnswered):
            ask(lm)
        given += int(lm.cost.requests + lm.cost.scored_requests)
        lm.answers.store.close()
        progress = json.loads((tmp_path / "shards" / f"{index}-of-{count}" / "progress.rank0.json").read_text())
        assert progress["answered"] == progress["total"] == progress["segment_answered"]
    assert given == 7 + 6, "somebody answered what another one had, or not everything was answered"
    last = whole.configured(whole.arguments)
    last.keep_answers(tmp_path)
    texts_again, scores = ask(last)
    assert texts_again == expected[0]
    # sums in batches of another size round otherwise
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected[1]], abs=1e-5)
    assert last.cost == Cost(), "something was left over"
    assert counts(last.answers.total()) == counts(whole.answers.total())
    assert last.answers.total().num_segments == 1, "nothing was interrupted"
    last.answers.store.discard()
    discard(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_does_not_fit_goes_on_in_half_as_many_rows_and_loses_no_answer(short_random, tmp_path, monkeypatch):
    arguments = {"model_path": str(short_random), "max_new_tokens": 32, "batch_size": 4, "device": "cpu"}
    texts = [f"{index}" for index in range(6)]
    expected = FastDLLM(ModelArguments.parse(**arguments)).generate_until(generated(texts), disable_tqdm=True)
    lm = FastDLLM(ModelArguments.parse(**arguments))
    lm.keep_answers(tmp_path)
    original, asked = lm.generator.denoise, []
    said: list[str] = []
    monkeypatch.setattr(batching.logger, "warning", lambda text, *values: said.append(text % values))

    def denoise(requests, num_rows):
        asked.append((len(requests), num_rows))
        for event in original(requests, num_rows):
            yield event
            if event.generation is not None and num_rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lm.generator, "denoise", denoise)
    assert lm.generate_until(generated(texts), disable_tqdm=True) == expected
    assert asked == [(6, 4), (5, 2)], "the answer that was complete is not asked for again"
    assert lm.answers.total().batch_sizes == {4: 1, 2: 5}
    assert said == ["4 rows do not fit the GPU's memory; going on with 2"]


def test_a_request_that_does_not_fit_alone_is_an_error(short_random, monkeypatch):
    lm = FastDLLM(ModelArguments.parse(model_path=str(short_random), max_new_tokens=32, batch_size=2, device="cpu"))

    def denoise(requests, num_rows):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(lm.generator, "denoise", denoise)
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate_until(generated(["a", "b"]), disable_tqdm=True)


# -- eval.py -----------------------------------------------------------------------------------------------------------
def command(folder, *more, processes=1, limit=QUESTIONS):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    device = "device=cpu," if processes == 1 else ""  # several find out themselves that there is no GPU
    model_args = f"model_path=tiny,{device}threshold=1,experiment_name=00_baseline,reuse_k=2,layer_subset=middle"
    words = ["--tasks", "toy_math,toy_choice", "--limit", str(limit), "--batch_size", "1", "--num_fewshot", "0"]
    words += ["--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn", "--model_args", model_args]
    return [sys.executable, *launch, str(ROOT / "eval.py"), *words, "--output_path", f"{folder}/", *more]


def evaluate(folder, *more, **how):
    return subprocess.run(command(folder, *more, **how), env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def result_of(folder):
    """Answers, metrics, tokens and forwards."""
    summary, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "results"))
    names = ("requests", "new_tokens", "forwards", "layer_forwards", "scored_requests", "scored_tokens")
    speed = {name: summary["throughput"][name] for name in names}
    return speed, found["results"], summary["num_samples"], found["samples_sha256"]


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = evaluate(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return result_of(folder)


@pytest.mark.slow
def test_two_shares_of_which_one_is_killed_and_an_end(in_one_piece, tmp_path):
    """About 40 s on one core."""
    folder = tmp_path / "run"
    process = subprocess.Popen(command(folder, "--shard", "1/2"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not any(file.stat().st_size for file in folder.glob("answers/*/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it is at work, and does not end
    refused = evaluate(folder, "--shard", "0/3")
    assert refused.returncode == 2
    assert "in 2 shards (1-of-2 at work), not in 3" in refused.stderr.splitlines()[-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = evaluate(folder, "--shard", "0/2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "shards" / "0-of-2" / "done.json").exists()
    assert not (folder / "summary.json").exists()
    done = evaluate(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result_of(folder) == in_one_piece
    assert not (folder / "answers").exists()
    assert not (folder / "shards").exists()


@pytest.mark.slow
def test_two_shares_of_two_processes_each_that_start_at_different_times(in_one_piece, tmp_path):
    """About 60 s on one core."""
    folder = tmp_path / "run"
    for index in (1, 0):
        done = evaluate(folder, "--shard", f"{index}/2", processes=2)
        assert done.returncode == 0, done.stderr[-2000:]
    files = {path.name for path in folder.glob("answers/*/*.jsonl")}
    assert files == {f"001.shard{index}-of-2x2.rank{rank}.jsonl" for index in (0, 1) for rank in (0, 1)}
    done = evaluate(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result_of(folder) == in_one_piece


@pytest.mark.slow
def test_four_processes_are_the_evaluation_in_one_piece(in_one_piece, tmp_path):
    """One has fewer questions than the others. About 60 s on one core."""
    folder = tmp_path / "run"
    done = evaluate(folder, processes=4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result_of(folder) == in_one_piece
    assert json.loads((folder / "summary.json").read_text())["num_processes"] == 4
