"""The recipe of models/tiny: masks and batches are what decoding meets, growth keeps what was learnt, and it learns."""

import random

import pytest
import torch

from fast_dllm.network.model import FastDLLMForCausalLM
from training import train
from training.data import COPIES, diffusion_batches, make_examples, noisy_example
from training.recipe import AHEAD_WEIGHT, Stage, tiny_config
from training.tokenizer import build_tokenizer

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


# Knock-out


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
