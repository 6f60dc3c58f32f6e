"""Block-diffusion decoding with a block cache and layer reuse: the algorithm under development, in one file.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising
step runs the network on it and unmasks the positions it is sure of, sub-block by sub-block from left to right, until
the block is committed to the prefix cache and the next one starts.

    prefill    the prompt's whole blocks, once                                         -> prefix cache
    full       all rows of the current block; they see the prefix and the block        -> block cache, rebuilt
    sub        only the rows of the current sub-block, against prefix and block cache  -> those rows of the block cache
    reused     no forward: the sub-block's last logits are read again (see `decode_one`)
    commit     the finished block once more; its keys and values become prefix, and its last row gives the next
               block's first token

How to read it: `decode_one` is the algorithm for one sequence, written as a coroutine that asks for forwards.
`denoise` runs many of them at once: it gathers what they ask for, runs sequences that want the same kind of forward
together, and hands each its own answer. A sequence never learns who its neighbours are, so a batch returns what
each of its rows would get alone. `generate` is `denoise` without the events in between.

Every experiments/<name>/generation_functions.py is a whole copy of this file with its idea edited in; the contract
is the signature of `generate` and of `denoise`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.layer_reuse import check_reuse, is_reuse_step, subset_layers
from fast_dllm.sampling import predict, rows_to_unmask

FORWARD_KINDS = ("prefill", "full", "sub", "commit", "reused")


@dataclass(frozen=True)
class Generation:
    """One finished answer: its new tokens, through the first stop token, and the forwards it took, by kind."""

    tokens: list[int]
    forwards: dict[str, int]


@dataclass(frozen=True)
class DenoisingEvent:
    """What one forward (or one reuse) decided for one sequence.

    row: index into the prompts. kind: one of FORWARD_KINDS. start, end: the absolute positions it was about (0 = the
    first prompt token): the sub-block of a denoising step, else what was prefilled or committed. positions, tokens,
    confidences: what was just filled in, the confidence being a probability (fast_dllm.sampling).
    generation: set on a sequence's last event.
    """

    row: int
    kind: str
    start: int
    end: int
    positions: list[int]
    tokens: list[int]
    confidences: list[float]
    generation: Generation | None = None


@dataclass(frozen=True)
class Options:
    mask_id: int
    stop_token: int
    max_new_tokens: int
    block_size: int
    small_block_size: int
    threshold: float
    use_block_cache: bool
    reuse_k: int

    def check(self) -> None:
        if self.block_size < 1 or self.small_block_size < 1 or self.block_size % self.small_block_size:
            raise ValueError(f"small_block_size {self.small_block_size} must divide block_size {self.block_size}")
        if self.max_new_tokens < self.block_size:
            raise ValueError(
                f"max_new_tokens must be at least one block ({self.block_size}), not {self.max_new_tokens}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.mask_id == self.stop_token:
            raise ValueError(f"mask_id and stop_token are both {self.mask_id}")


@dataclass(frozen=True)
class Forward:
    """A forward that one sequence asks for: tokens at block rows [offset, offset + T), and which of the T to read."""

    kind: str
    token_ids: list[int]
    offset: int = 0
    read: tuple[int, ...] = ()


# What comes back for the rows read: candidate tokens and their confidences.
Prediction = tuple[list[int], list[float]]


def generate(
    model,
    prompts: list[list[int]],
    *,
    mask_id: int,
    stop_token: int,
    max_new_tokens: int = 2048,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    use_block_cache: bool = True,
    temperature: float = 0.0,
    top_p: float = 0.95,
    reuse_k: int = 1,
    layer_subset: str | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[Generation]:
    """Answer every prompt (lists of token ids, any lengths); one Generation each, in order.

    The answer runs up to its first stop token, at most through absolute block len(prompt) // block_size +
    max_new_tokens // block_size (exclusive). `threshold` unmasks every row that is more confident (1.0: one token a
    step). temperature 0 is greedy. Every row's random numbers come from a stream of its own: a single `generator`
    (default: torch's) gives each row the same seed, drawn once per call, so a row gets what it would get alone; a
    sequence of generators, one a prompt, makes equal prompts differ. Raises ValueError for arguments out of range.
    """
    generations: list[Generation | None] = [None] * len(prompts)
    for event in denoise(
        model,
        prompts,
        mask_id=mask_id,
        stop_token=stop_token,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        small_block_size=small_block_size,
        threshold=threshold,
        use_block_cache=use_block_cache,
        temperature=temperature,
        top_p=top_p,
        reuse_k=reuse_k,
        layer_subset=layer_subset,
        generator=generator,
    ):
        if event.generation is not None:
            generations[event.row] = event.generation
    return generations


def denoise(
    model,
    prompts: list[list[int]],
    *,
    mask_id: int,
    stop_token: int,
    max_new_tokens: int = 2048,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    use_block_cache: bool = True,
    temperature: float = 0.0,
    top_p: float = 0.95,
    reuse_k: int = 1,
    layer_subset: str | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[DenoisingEvent]:
    """The events of `generate` as they happen; closing the iterator stops the work at the next forward."""
    options = Options(
        mask_id, stop_token, max_new_tokens, block_size, small_block_size, threshold, use_block_cache, reuse_k
    )
    options.check()
    check_reuse(reuse_k, layer_subset)
    if layer_subset is not None:
        subset_layers(layer_subset, model.config.num_hidden_layers)  # raises where the model has too few layers
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must not be negative and top_p in (0, 1], not {temperature} and {top_p}")
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    return _denoise(model, prompts, options, temperature, top_p, _row_generators(generator, len(prompts), temperature))


def _row_generators(generator, num_rows: int, temperature: float) -> list[torch.Generator] | None:
    """One CPU random stream for each row, or None where nothing is drawn."""
    if temperature == 0:
        return None
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        return [torch.Generator().manual_seed(seed) for _ in range(num_rows)]
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} prompts")
    return list(generator)


class Answer:
    """A prompt and the answer growing behind it; positions are absolute, `limit` is the first one out of reach."""

    def __init__(self, row: int, prompt: list[int], options: Options):
        self.row, self.options = row, options
        self.tokens = list(prompt)
        self.num_prompt = self.num_settled = len(prompt)  # every position before num_settled is known
        self.limit = (len(prompt) // options.block_size + options.max_new_tokens // options.block_size) * (
            options.block_size
        )
        self.forwards = dict.fromkeys(FORWARD_KINDS, 0)
        self.generation: Generation | None = None

    def is_masked(self, position: int) -> bool:
        return position >= self.num_prompt and self.tokens[position] == self.options.mask_id

    def open_block(self, end: int) -> None:
        """Fill up to position `end` with masks."""
        self.tokens += [self.options.mask_id] * (end - len(self.tokens))

    def fill(self, kind: str, start: int, end: int, filled: dict[int, tuple[int, float]]) -> DenoisingEvent:
        """Put {position: (token, confidence)} in place; the answer ends here if it can."""
        self.forwards[kind] += 1
        for position, (token, _) in filled.items():
            self.tokens[position : position + 1] = [token]  # the first position of a next block is appended
        while self.generation is None and self.num_settled < len(self.tokens) and not self.is_masked(self.num_settled):
            self.num_settled += 1
            if self.tokens[self.num_settled - 1] == self.options.stop_token or self.num_settled == self.limit:
                self.generation = Generation(self.tokens[self.num_prompt : self.num_settled], dict(self.forwards))
        tokens, confidences = [token for token, _ in filled.values()], [sure for _, sure in filled.values()]
        return DenoisingEvent(self.row, kind, start, end, list(filled), tokens, confidences, self.generation)


def decode_one(answer: Answer, options: Options) -> Generator[Forward | DenoisingEvent, Prediction]:
    """Decode one sequence: yields the forwards it needs (each answered by `send`) and the events they lead to.

    The prediction for row j of a block is read at row j - 1 (token shift). The first row that is run has no row
    before it, and needs none: a block starts with a known token, and so does every sub forward.

    Layer reuse with stored outputs: on a sub step whose counter is no multiple of reuse_k, the layers of the subset
    would return what they returned when these rows were last computed. Everything above that contiguous range then
    receives what it received on that step, so the logits are that step's logits, whichever range it is. That is why
    a reuse step needs no forward here, and why first, middle and last give the same tokens.
    """
    block_size, sub_size = options.block_size, options.small_block_size
    prompt = list(answer.tokens)
    first_start = len(prompt) // block_size * block_size
    if first_start:
        starts_block = len(prompt) == first_start  # then the prefill gives the block's first token
        prediction = yield Forward("prefill", prompt[:first_start], read=(first_start - 1,) if starts_block else ())
        yield answer.fill("prefill", 0, first_start, _first_of_next_block(first_start, prediction))
        if answer.generation:
            return

    for block_start in range(first_start, answer.limit, block_size):
        block_end = block_start + block_size
        answer.open_block(block_end)
        counter = 0
        has_block_cache = False
        for start in range(block_start, block_end, sub_size):
            rows = range(start, start + sub_size)
            offset = start - block_start
            while any(answer.is_masked(row) for row in rows):
                if not options.use_block_cache or not has_block_cache or answer.is_masked(start):
                    read = tuple(max(offset + j - 1, 0) for j in range(sub_size))
                    forward = Forward("full", answer.tokens[block_start:block_end], 0, read)
                elif is_reuse_step(counter, options.reuse_k):
                    forward = Forward("reused", [], offset)
                else:
                    read = tuple(max(j - 1, 0) for j in range(sub_size))
                    forward = Forward("sub", answer.tokens[start : start + sub_size], offset, read)
                candidates, confidences = yield forward
                has_block_cache = True
                counter += 1
                chosen = rows_to_unmask(confidences, [answer.is_masked(row) for row in rows], options.threshold)
                filled = {start + j: (candidates[j], confidences[j]) for j in chosen}
                yield answer.fill(forward.kind, start, start + sub_size, filled)
                if answer.generation:
                    return
        prediction = yield Forward("commit", answer.tokens[block_start:block_end], 0, (block_size - 1,))
        yield answer.fill("commit", block_start, block_end, _first_of_next_block(block_end, prediction))
        if answer.generation:
            return


def _first_of_next_block(position: int, prediction: Prediction) -> dict[int, tuple[int, float]]:
    candidates, confidences = prediction
    return {position: (candidates[0], confidences[0])} if candidates else {}


class _Batch:
    """Sequences decoded side by side: one cache, and for each sequence the coroutine and what it waits for."""

    def __init__(self, model, prompts, options: Options, temperature: float, top_p: float, generators):
        self.model, self.options = model, options
        self.temperature, self.top_p, self.generators = temperature, top_p, generators
        answers = [Answer(row, prompt, options) for row, prompt in enumerate(prompts)]
        self.cache = model.new_cache(len(prompts), max(answer.limit for answer in answers), options.block_size)
        self.coroutines = [decode_one(answer, options) for answer in answers]
        self.waiting: dict[int, Forward] = {}
        self.last_logits: dict[int, Tensor] = {}  # (small_block_size, V) of each row's last denoising step

    def advance(self, row: int, prediction: Prediction | None) -> Iterator[DenoisingEvent]:
        """Hand a sequence its prediction; pass on its events until it asks for its next forward or ends."""
        item = self.coroutines[row].send(prediction)
        while isinstance(item, DenoisingEvent):
            yield item
            item = next(self.coroutines[row], None)
        if item is None:
            del self.waiting[row]
        else:
            self.waiting[row] = item

    def groups(self) -> list[list[int]]:
        """Rows that can share a forward now: a prefill runs alone, full and commit both run the whole block."""
        groups: dict[object, list[int]] = {}
        for row, forward in self.waiting.items():
            key = {"prefill": row, "full": "block", "commit": "block"}.get(forward.kind, forward.kind)
            groups.setdefault(key, []).append(row)
        return list(groups.values())

    @torch.inference_mode()
    def run(self, rows: list[int]) -> list[Prediction]:
        """Run one group's forward; a prediction for each of its rows."""
        forwards = [self.waiting[row] for row in rows]
        kind = forwards[0].kind
        if kind == "prefill":
            logits = self.model.prefill(self.cache, rows[0], forwards[0].token_ids, read_last=bool(forwards[0].read))
            if logits is None:
                return [([], [])]
            logits = logits[None, None]
        elif kind == "reused":
            logits = torch.stack([self.last_logits[row] for row in rows])
        else:
            most = max(len(forward.read) for forward in forwards)
            logits = self.model.run_block(
                self.cache,
                rows,
                [forward.token_ids for forward in forwards],
                [forward.offset for forward in forwards],
                [forward.read + forward.read[-1:] * (most - len(forward.read)) for forward in forwards],
            )
            for index, row in enumerate(rows):
                if forwards[index].kind == "commit":
                    self.model.commit(self.cache, row)
                elif self.options.reuse_k > 1:
                    self.last_logits[row] = logits[index]
        return self.predictions(rows, forwards, logits)

    def predictions(self, rows: list[int], forwards: list[Forward], logits: Tensor) -> list[Prediction]:
        """Logits (rows, R, V) to predictions; the first token of a block is greedy at any temperature."""
        candidates, confidences = predict(logits, self.options.mask_id)
        results = list(zip(candidates.tolist(), confidences.tolist(), strict=True))
        if self.temperature > 0:
            drawn = [i for i, forward in enumerate(forwards) if forward.kind in ("full", "sub", "reused")]
            if drawn:
                uniforms = torch.stack([torch.rand(logits.shape[1], generator=self.generators[rows[i]]) for i in drawn])
                candidates, confidences = predict(
                    logits[drawn], self.options.mask_id, self.temperature, self.top_p, uniforms.to(logits.device)
                )
                for i, *result in zip(drawn, candidates.tolist(), confidences.tolist(), strict=True):
                    results[i] = tuple(result)
        return results


def _denoise(model, prompts, options, temperature, top_p, generators) -> Iterator[DenoisingEvent]:
    if not prompts:
        return
    batch = _Batch(model, prompts, options, temperature, top_p, generators)
    for row in range(len(prompts)):
        yield from batch.advance(row, None)
    while batch.waiting:
        for rows in batch.groups():
            for row, prediction in zip(rows, batch.run(rows), strict=True):
                yield from batch.advance(row, prediction)
