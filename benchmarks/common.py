"""What several benchmarks share: checks of options, models, questions for the embedded model, and measures."""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fast_dllm.decoding import Generation
from fast_dllm.errors import UsageError
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.devices import default_dtype, pick_device, pick_dtype
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import load_tokenizer, render, special_ids
from fast_dllm.spec.values import check_value


def check_options(options: argparse.Namespace, *counts: str) -> None:
    """Raise UsageError for one of `counts` that is set and below 1, and for an unknown --dtype."""
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    check_value("dtype", options.dtype, "auto", where="--")


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> FastDLLMForCausalLM:
    """A model of random weights, made on the device in its dtype: LAYERSxHIDDEN, or `7b`, the published one's shape.

    Raises UsageError for another shape.
    """
    layers, _, hidden = shape.partition("x")
    if shape == "7b":
        config = FastDLLMConfig(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    elif layers.isdecimal() and hidden.isdecimal() and int(layers) and int(hidden) and int(hidden) % 64 == 0:
        heads = max(int(hidden) // 64, 4)
        config = FastDLLMConfig(
            vocab_size=512,
            hidden_size=int(hidden),
            intermediate_size=int(hidden) * 5 // 2,
            num_hidden_layers=int(layers),
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            tie_word_embeddings=True,
        )
    else:
        raise UsageError(
            f"--random_weights takes 7b or LAYERSxHIDDEN with HIDDEN a multiple of 64, like 36x512, not {shape!r}"
        )
    torch.manual_seed(0)
    with device, default_dtype(dtype):
        return FastDLLMForCausalLM(config).eval().requires_grad_(False)


def model_of(arguments: argparse.Namespace) -> FastDLLMForCausalLM:
    """What --random_weights or --model names, on --device in --dtype. Raises UsageError."""
    try:
        if arguments.random_weights:
            device = pick_device(arguments.device)
            return random_model(arguments.random_weights, device, pick_dtype(arguments.dtype, device))
        return load_model(arguments.model, arguments.device, arguments.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error


def median_seconds(work: Callable[[], object], runs: int, device: torch.device) -> float:
    """Median wall-clock seconds of `work`, after two runs that do not count."""
    seconds = []
    for run in range(runs + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if run >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s read by a large copy: what a pass over the weights can reach."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return source.numel() * 4 * 2 / median_seconds(lambda: target.copy_(source), 5, device)


def full_depth_forwards(model: FastDLLMForCausalLM, answers: list[Generation]) -> float:
    """The layers that all answers ran, prefills and commits included, over those of the model."""
    return sum(sum(answer.layer_forwards.values()) for answer in answers) / model.config.num_hidden_layers


def toy_prompts(count: int) -> list[list[int]]:
    """Token ids of the first `count` questions of toy_math's test split, in the model's chat template."""
    task, tokenizer = importlib.import_module("tasks.toy.problems"), load_tokenizer("tiny")
    questions = [task.math_prompt(problem) for problem in task.math_questions("test", count)]
    texts = [render(tokenizer, [{"role": "user", "content": question}], True) for question in questions]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def tiny_settings() -> dict[str, Any]:
    """The special ids of the embedded model, and limits for its answers."""
    ids = special_ids(load_tokenizer("tiny"))
    return {"mask_id": ids.mask, "stop_token": ids.stop, "threshold": 0.9, "max_new_tokens": 128}
