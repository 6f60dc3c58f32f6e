"""Runs one policy for many prompts.

Each prompt has a coroutine of its own (fast_dllm.decoding). The engine gathers the forwards that they ask for, runs
together those that can share one, and sends each its own prediction. A sequence never learns of the others, so that
every prompt is answered as it would be alone. grouping.py decides what runs together, decoding_run.py does it, and an
executor of the model (fast_dllm.network.executor) runs the forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fast_dllm.decode.decoding_run import DecodingRun, Prompt
from fast_dllm.decode.sequences import RunSettings
from fast_dllm.decoding import Answer, DecodeOne, DenoisingEvent, Options
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import open_executor


class Engine:
    """Decodes prompts with one model, one policy and one set of options, `num_rows` side by side. Holds no state of a
    run: two runs may go on at the same time.

    temperature 0 is greedy; else tokens are drawn from the `top_p` nucleus. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: FastDLLMForCausalLM,
        decode_one: DecodeOne,
        options: Options,
        *,
        num_rows: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
    ):
        num_layers = model.config.num_hidden_layers
        options.check(num_layers)
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must not be negative and top_p in (0, 1], not {temperature} and {top_p}")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, not {num_rows}")
        self.model, self.options, self.num_rows = model, options, num_rows
        mlp_share = model.layer(0).mlp_share
        self._settings = RunSettings(decode_one, options, temperature, top_p, num_layers, mlp_share)

    def run(self, prompts: Sequence[Prompt]) -> Iterator[DenoisingEvent]:
        """The events of all prompts as they happen; `row` is the prompt's index. Raises ValueError for an empty
        prompt, NonFiniteError for logits that are not finite. Closing the iterator stops at the next forward."""
        if not all(prompt.token_ids for prompt in prompts):
            raise ValueError("every prompt needs at least one token")
        return self._events(list(prompts))

    def _events(self, prompts: list[Prompt]) -> Iterator[DenoisingEvent]:
        if not prompts:
            return
        num_rows = min(self.num_rows or len(prompts), len(prompts))
        answers = (Answer(0, prompt.token_ids, self.options, self._settings.num_layers) for prompt in prompts)
        max_length = max(answer.limit for answer in answers)
        with open_executor(self.model, num_rows, max_length, self.options.block_size) as executor:
            yield from DecodingRun(executor, self._settings, prompts, num_rows).events()


def row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int, temperature: float
) -> Sequence[torch.Generator | None]:
    """One CPU random stream for each of a call's prompts, or None where nothing is drawn.

    A single `generator` (default: torch's) gives each row the same seed, drawn once per call, so that a row gets what
    it would get alone; a sequence of generators, one a prompt, makes equal prompts differ. Raises ValueError for a
    wrong number of them.
    """
    if temperature == 0:
        return [None] * num_rows
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        return [torch.Generator().manual_seed(seed) for _ in range(num_rows)]
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} prompts")
    return list(generator)
