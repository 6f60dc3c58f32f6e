"""The recipe of models/tiny: masks and batches are what decoding meets, growth keeps what was learnt, and it learns."""

import random

import pytest
import torch

from fast_dllm.network.model import FastDLLMForCausalLM
from training import knockout, train
from training.data import (
    COPIES,
    autoregressive_batches,
    diffusion_batches,
    diffusion_mask,
    make_examples,
    noisy_example,
)
from training.recipe import AHEAD_WEIGHT, Stage, tiny_config
from training.tokenizer import INSTRUCTION, MASK, START, STOP, build_tokenizer

BLOCK = 32
SHORT = (  # two objectives, one growth
    Stage("ar", "ar", 2, steps=4, batch=8, lr=1e-2, warmup=2, decay=0.5, final_lr=0.5),
    Stage("bd", "bd", 4, steps=3, batch=4, lr=3e-3, warmup=2, decay=0.5, final_lr=0.0),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(2048)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return make_examples(tokenizer, random.Random(0), 60, choice_share=0.3)


def small_model(tokenizer, layers=3, seed=0):
    model = FastDLLMForCausalLM(tiny_config(tokenizer, layers)).eval()
    train.initialise(model, seed)
    return model


# Tokenizer


def test_digits_are_single_tokens_and_the_instruction_is_one(tokenizer):
    assert tokenizer.tokenize("12 + 345 = 357") == ["1", "2", "Ġ+Ġ", "3", "4", "5", "Ġ=Ġ", "3", "5", "7"]
    assert len(tokenizer.tokenize("\n" + INSTRUCTION)) == 1
    assert len({tokenizer.convert_tokens_to_ids(token) for token in (START, STOP, MASK)}) == 3
    assert len(tokenizer) < 512


# Batches


def test_noisy_rows_predict_what_decoding_that_block_would(tokenizer, examples):
    """Noisy rows of the one-sequence form give the logits of a plain block-causal forward of the noisy block."""
    model = small_model(tokenizer)
    batch = next(iter(diffusion_batches(examples, tokenizer, random.Random(1), BLOCK, 8, 0.3, AHEAD_WEIGHT)))
    length = int(batch.positions.max()) + 1
    clean_rows = length - BLOCK
    start = int(batch.positions[clean_rows])
    logits = model(batch.ids, batch.mask, batch.positions).logits
    for copy in range(COPIES):
        first = clean_rows + copy * (length - start)
        for block in range(start, length, BLOCK):
            noisy = batch.ids[:, first + block - start : first + block - start + BLOCK]
            alone = model(torch.cat((batch.ids[:, :block], noisy), dim=1)).logits[:, block:]  # the prefix is clean
            rows = slice(first + block - start, first + block - start + BLOCK)
            torch.testing.assert_close(logits[:, rows], alone, atol=1e-4, rtol=1e-4)
    assert batch.ids.shape[1] == clean_rows + COPIES * (length - start)


def test_diffusion_mask_without_the_offset_would_leak_the_answer():
    mask = diffusion_mask(num_blocks=3, first_noisy=1, block_size=4)  # rows: clean 0, 1 | noisy 1, 2 | noisy 1, 2
    assert mask.shape == (24, 24)
    assert not mask[:8, 8:].any()  # clean rows see no noise
    assert not mask[8:12, 4:8].any()  # a noisy block never sees its own clean copy
    assert mask[12:16, :8].all()  # the block after it does
    assert not mask[8:16, 16:24].any()  # the copies do not see each other


def test_only_answer_rows_are_masked_and_never_a_block_start(tokenizer, examples):
    mask_id = tokenizer.mask_token_id
    for example in examples:
        length = -(-(len(example.prompt) + len(example.answer)) // BLOCK) * BLOCK
        clean = (example.prompt + example.answer + [tokenizer.eos_token_id] * length)[:length]
        clean_rows, start = length - BLOCK, len(example.prompt) // BLOCK * BLOCK
        ids, reads = noisy_example(example, tokenizer, random.Random(2), length, BLOCK, 8, 0.3, AHEAD_WEIGHT)
        assert mask_id not in ids[:clean_rows]
        read = {row: token for row, token, _ in reads}
        for row in range(clean_rows, len(ids)):
            position = start + (row - clean_rows) % (length - start)
            if ids[row] == mask_id:
                assert position >= len(example.prompt)
                assert position % BLOCK
                assert read[row - 1] == clean[position]
            else:
                assert ids[row] == clean[position]


def test_autoregressive_rows_predict_the_next_token(tokenizer, examples):
    for batch in autoregressive_batches(examples, tokenizer.eos_token_id):
        following = batch.ids.gather(1, batch.rows + 1)
        counted = batch.weights > 0
        assert torch.equal(following[counted], batch.targets[counted])


# Growth and training


def test_growth_leaves_every_logit_as_it_was(tokenizer):
    shallow = small_model(tokenizer, layers=3)
    deep = FastDLLMForCausalLM(tiny_config(tokenizer, 12)).eval()
    train.grow(shallow.state_dict(), 3, deep, seed=5)
    ids = torch.randint(0, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(shallow(ids).logits, deep(ids).logits)
    deep.model.layers[3].mlp.down_proj.weight.data.normal_()
    assert not torch.equal(shallow(ids).logits, deep(ids).logits)


def test_a_split_layer_becomes_equal_parts_that_write_their_share(tokenizer):
    shallow, deep = small_model(tokenizer, layers=3), FastDLLMForCausalLM(tiny_config(tokenizer, 6)).eval()
    train.split(shallow.state_dict(), 3, deep)
    for layer in range(6):
        part, whole = deep.model.layers[layer], shallow.model.layers[layer // 2]
        assert torch.equal(part.mlp.up_proj.weight, whole.mlp.up_proj.weight)
        assert torch.equal(part.self_attn.o_proj.weight * 2, whole.self_attn.o_proj.weight)
        assert torch.equal(part.mlp.down_proj.weight * 2, whole.mlp.down_proj.weight)
    with pytest.raises(ValueError, match="7 layers are no multiple of 3"):
        train.split(shallow.state_dict(), 3, FastDLLMForCausalLM(tiny_config(tokenizer, 7)))


@pytest.mark.slow
def test_a_run_may_start_from_the_trained_layers_of_a_finished_model(tmp_path, tokenizer):
    """Words that both know keep their rows, whatever their numbers are; new ones begin among them."""
    shallow, finished, start = small_model(tokenizer, layers=2), small_model(tokenizer, layers=6), tmp_path / "finished"
    train.grow(shallow.state_dict(), 2, finished, seed=5)
    finished.save_pretrained(start)
    tokenizer.save_pretrained(start)
    wide = build_tokenizer(2048, wide=True)
    weights = train.read_start(start, wide, 2, seed=3)
    rows, known = weights["model.embed_tokens.weight"], shallow.model.embed_tokens.weight
    for word, index in tokenizer.get_vocab().items():
        assert torch.equal(rows[wide.get_vocab()[word]], known[index])
    assert len(tokenizer) < rows.shape[0] == len(wide)
    assert 0 < float(rows.norm(dim=1).min()) <= float(rows.norm(dim=1).max()) < 3 * float(known.norm(dim=1).max())
    stages = (Stage("wide", "bd", 2, steps=2, batch=4, lr=1e-3, warmup=1, decay=0.5, final_lr=0, wide_share=1.0),
              Stage("split", "bd", 4, steps=1, batch=4, lr=0.0, warmup=1, decay=0.5, final_lr=0, growth="split"),
              )  # fmt: skip
    trainer = train.Trainer(tmp_path / "run", stages, 3, "cpu", "muon", 2048, start)
    assert torch.equal(trainer.model.model.layers[1].mlp.down_proj.weight, shallow.model.layers[1].mlp.down_proj.weight)
    trainer.run()
    parts = [layer.mlp.down_proj.weight for layer in trainer.model.model.layers]
    assert torch.equal(parts[2], parts[3])
    assert not torch.equal(parts[1], parts[2])


# Knock-out


def test_a_layer_that_is_taken_out_gives_what_it_got_and_comes_back(tokenizer):
    model = small_model(tokenizer, layers=3)
    ids = torch.randint(0, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    shorter = small_model(tokenizer, layers=3)
    del shorter.model.layers[1]
    with knockout.without(model, [1]):
        assert torch.equal(model(ids).logits, shorter(ids).logits)
    assert torch.equal(model(ids).logits, whole)


def run(out, stages, seed=3):
    trainer = train.Trainer(out, stages, seed, "cpu", "muon", 2048)
    trainer.run()
    return trainer


def test_twenty_steps_lower_the_loss(tmp_path):
    stage = Stage("ar", "ar", 2, steps=20, batch=16, lr=1e-2, warmup=2, decay=0.5, final_lr=0.5)
    trainer = train.Trainer(tmp_path, (stage,), 3, "cpu", "muon", 2048)
    losses = [trainer.train_step()[0] for _ in range(20)]
    assert losses[0] > 5.5  # log(vocabulary) = 6.1: nothing is known
    assert sum(losses[-3:]) / 3 < losses[0] - 2.5


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(train, "tokenizer_of", lambda *_: tokenizer)
    whole = run(tmp_path / "whole", SHORT)
    stopped = train.Trainer(tmp_path / "stopped", SHORT, 3, "cpu", "muon", 2048)
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    resumed = run(tmp_path / "stopped", SHORT)
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    other = run(tmp_path / "other", SHORT, seed=4)
    assert not torch.equal(whole.average["model.norm.weight"], other.average["model.norm.weight"])


@pytest.mark.parametrize(
    "options", [["--threads", "0"], ["--scale", "0"], ["--export", "x"], ["--start", "x", "--recipe", "early"]]
)
def test_bad_options_are_one_line_and_exit_2(tmp_path, capsys, options):
    assert train.main(["--out", str(tmp_path), *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
