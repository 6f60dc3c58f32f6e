"""Log-likelihoods of continuations: the inputs to run, how they are batched, and the scorer of a run.

Blocks at the start that several inputs share are run once (`batches`, `SharedContext`): the examples of a few-shot task
once for a whole subject, and the context of a question once for all its continuations.

There are two modes (docs/design.md, "Scoring"). *reference* masks the first token of the continuation and leaves the
rest visible. The published numbers were measured this way; it is exact for continuations of one token. *chain* is the
chain rule: each token in turn is masked, with all tokens after it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fast_dllm.decode.loaded import LoadedModel
from fast_dllm.errors import UsageError, non_finite
from fast_dllm.evaluate.run_answers import RunAnswers
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import open_executor
from fast_dllm.record.answers import request_key
from fast_dllm.record.cost import Cost


class MaskedInput(NamedTuple):
    """The token ids of one forward, with masks. row: whose logits are read; it is one before the masked token."""

    row: int
    ids: tuple[int, ...]


def masked_inputs(
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    chain: bool,
    mask_id: int,
    stop_token: int | None,
    block_size: int,
    max_length: int,
) -> list[tuple[MaskedInput, int]]:
    """(input, target token) for each token that is scored: the first one, or with `chain` every one.

    `stop_token` follows the continuation (None: no token does), and masks fill the last block. A context that is too
    long loses its start. Raises UsageError if the continuation alone does not fit.
    """
    if not continuation:
        return []
    keep = max_length - len(continuation) - 1
    if keep < 1:
        raise UsageError(f"a continuation of {len(continuation)} tokens does not fit {max_length} positions")
    context = context[-keep:]
    tail = [] if stop_token is None else [stop_token]
    inputs = []
    for index in range(len(continuation) if chain else 1):
        visible = [] if chain else continuation[index + 1 :]
        hidden = [mask_id] * (len(continuation) - index - len(visible))
        position = len(context) + index
        ids = [*context, *continuation[:index], *hidden, *visible, *tail]
        ids += [mask_id] * (-len(ids) % block_size)
        # The prediction is read one row before the masked token; no row behind that row's block can change it.
        ids = ids[: ((position - 1) // block_size + 1) * block_size]
        inputs.append((MaskedInput(position - 1, tuple(ids)), continuation[index]))
    return inputs


class Batch(NamedTuple):
    """Inputs to run together. Their first `shared` tokens, a whole number of blocks, are the same."""

    shared: int
    inputs: list[MaskedInput]


def batches(
    inputs: Iterable[MaskedInput], *, block_size: int, batch_size: int, done: Collection[MaskedInput] = ()
) -> Iterator[Batch]:
    """Batches of all inputs except those in `done`, in an order in which each shared prefix is run once.

    The inputs are the leaves of a tree of blocks, which is walked in depth. Inputs that branch off at the same block
    are batched, the longest first. The last block of an input holds the row that is read and is never shared. Inputs in
    `done` still take part in choosing the shared prefixes, so that a resumed run batches as before.
    """
    groups = [(0, sorted(inputs, key=lambda masked: masked.ids))]
    while groups:
        shared, group = groups.pop()

        def next_block(masked: MaskedInput, start: int) -> tuple[int, ...]:
            return masked.ids[start : start + block_size]

        most = min((len(masked.ids) for masked in group), default=0) - block_size
        while len(group) > 1 and shared < most and next_block(group[0], shared) == next_block(group[-1], shared):
            shared += block_size  # the list is sorted: a prefix of its first and its last input is a prefix of all
        leaves, deeper = [], []  # inputs that share no further block with others; groups that do
        for _, run in groupby(group, key=lambda masked: next_block(masked, shared)):
            equal = list(run)
            longer = [masked for masked in equal if len(masked.ids) > shared + block_size]
            if len(longer) > 1:
                deeper.append((shared, longer))
                equal = [masked for masked in equal if len(masked.ids) == shared + block_size]
            leaves += [masked for masked in equal if masked not in done]
        leaves.sort(key=lambda masked: -len(masked.ids))
        for start in range(0, len(leaves), batch_size):
            yield Batch(shared, leaves[start : start + batch_size])
        groups += reversed(deeper)


class SharedContext:
    """The cached keys and values of a batch's shared prefix.

    They are computed in the first cache row and copied to the others. The part that the next batch shares too is kept.
    """

    def __init__(self, model: FastDLLMForCausalLM, num_rows: int, longest: int, block_size: int):
        """num_rows: of the largest batch. longest: the number of tokens of the longest input."""
        self.executor = open_executor(model, num_rows, longest, block_size, shared=False)
        self.tokens: tuple[int, ...] = ()
        self.num_copied = [0] * num_rows  # how many of `tokens` are in each cache row

    def set_prefix(self, tokens: tuple[int, ...], num_rows: int) -> None:
        """Make `tokens`, a whole number of blocks, the prefix of the first `num_rows` cache rows."""
        cache, end = self.executor.cache, len(tokens)
        size = cache.block_size
        same = 0
        while same < min(end, len(self.tokens)) and tokens[same : same + size] == self.tokens[same : same + size]:
            same += size
        if same < end:
            cache.lengths[0] = same
            self.executor.prefill([0], [tokens[same:]])
        self.tokens = tokens
        self.num_copied = [min(count, same) for count in self.num_copied]
        begin = min(self.num_copied[1:num_rows], default=end)
        if begin < end:
            for buffer in (cache.keys, cache.values):
                buffer[:, 1:num_rows, begin:end] = buffer[:, :1, begin:end]
            self.num_copied[1:num_rows] = [end] * (num_rows - 1)
        cache.lengths[:num_rows] = [end] * num_rows


@torch.inference_mode()
def target_scores(
    context: SharedContext, batch: Batch, targets: Sequence[Collection[int]], *, pad_id: int
) -> list[list[tuple[float, bool]]]:
    """(log-probability, is it the argmax) of every target of each input of the batch."""
    shared, inputs = batch
    context.set_prefix(inputs[0].ids[:shared], len(inputs))
    longest = max(len(masked.ids) for masked in inputs)
    # Blocks never see later blocks, so padding at the end changes nothing.
    ids = [[*masked.ids[shared:], *[pad_id] * (longest - len(masked.ids))] for masked in inputs]
    read = [masked.row - shared for masked in inputs]
    logits = context.executor.prefill(range(len(inputs)), ids, read=read)
    assert logits is not None, "rows are read"
    log_probs = logits.float().log_softmax(dim=-1)
    if not log_probs.sum(dim=-1).isfinite().all():
        raise non_finite("a forward that scores", logits.dtype)
    best = log_probs.argmax(dim=-1).tolist()
    scores = []
    for place, wanted in enumerate(map(list, targets)):
        values = log_probs[place, wanted].tolist()
        scores.append([(value, best[place] == target) for target, value in zip(wanted, values, strict=True)])
    return scores


@dataclass
class WantedScores:
    """The tokens to score in each input. Inputs and targets that several requests share are listed once.

    keys: input -> target token -> key of its answer. num_uses: key -> how many tokens of the requests it scores.
    num_ends: key -> how many requests have it as their last token.
    """

    keys: dict[MaskedInput, dict[int, str]]
    num_uses: Counter[str]
    num_ends: Counter[str]


class Scorer:
    """Log-likelihoods of continuations, by one loaded model in one mode (`reference` or `chain`).

    code_sha256: the hash of the code that scores; part of the key of an answer. rows_of: length of the longest input ->
    how many inputs a forward takes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        answers: RunAnswers,
        *,
        mode: str,
        code_sha256: str,
        rows_of: Callable[[int], int],
    ):
        self.loaded, self.answers, self.mode = loaded, answers, mode
        self.code_sha256, self.rows_of = code_sha256, rows_of

    def of_continuations(self, pairs: Iterable[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each (context ids, continuation ids), in order."""
        chain = self.mode == "chain"
        return self.score([self.masked_inputs(context, continuation, chain) for context, continuation in pairs], quiet)

    def of_texts(self, texts: Iterable[list[int]], quiet: bool) -> list[float]:
        """Log-probability of each whole text (token ids) by the chain rule, each token given all the text before it.

        No stop token follows the text.
        """
        windows, counts = [], []
        for ids in texts:
            rolling = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.loaded.start_id,
                max_seq_len=self.loaded.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in rolling]
            windows += [self.masked_inputs(context, continuation, True, end=False) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self.score(windows, quiet))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def masked_inputs(
        self, context: list[int], continuation: list[int], chain: bool, end: bool = True
    ) -> list[tuple[MaskedInput, int]]:
        """(input, target token) for each scored token of one continuation. end: whether a stop token follows it."""
        return masked_inputs(
            context,
            continuation,
            chain=chain,
            mask_id=self.loaded.ids.mask,
            stop_token=self.loaded.ids.stop if end else None,
            block_size=self.loaded.block_size,
            max_length=self.loaded.max_length,
        )

    def score(self, parts: list[list[tuple[MaskedInput, int]]], quiet: bool) -> list[tuple[float, bool]]:
        """(sum of the targets' log-probabilities, whether every target was the argmax) of each part, in order.

        Equal inputs share one forward. A part that another shard answers gets (0, True).
        """
        parts = self._of_this_shard(parts)
        wanted = self._wanted(parts)
        inputs = wanted.keys
        answers = self.answers.known(key for keys in inputs.values() for key in keys.values())
        done = {masked for masked, keys in inputs.items() if all(key in answers for key in keys.values())}
        lengths = [len(masked.ids) for masked in inputs if masked not in done]
        size = self.loaded.block_size
        batch_size = min(self.rows_of(max(lengths)), len(lengths)) if lengths else 1
        context = SharedContext(self.loaded.network, batch_size, max(lengths), size) if lengths else None
        with tqdm(total=len(inputs), desc="scoring", unit="fwd", disable=quiet) as progress:
            progress.update(len(done))
            for batch in batches(inputs, block_size=size, batch_size=batch_size, done=done):
                assert context is not None, "a batch has an input that is not done"
                began = time.perf_counter()
                targets = [inputs[masked] for masked in batch.inputs]
                scores = target_scores(context, batch, targets, pad_id=self.loaded.ids.pad)
                new: dict[str, tuple[float, bool]] = {}
                for masked, values in zip(batch.inputs, scores, strict=True):
                    new |= dict(zip(inputs[masked].values(), values, strict=True))
                self.answers.keep(new, self._cost(wanted, new, batch, began), batch_size=len(batch.inputs))
                answers |= new
                progress.update(len(batch.inputs))
        totals = []
        for part in parts:
            values = [answers[inputs[masked][target]] for masked, target in part]
            totals.append((sum(value for value, _ in values), all(greedy for _, greedy in values)))
        return totals

    def _of_this_shard(self, parts: list[list[tuple[MaskedInput, int]]]) -> list[list[tuple[MaskedInput, int]]]:
        """The parts, with those of other shards replaced by empty ones.

        Parts with the same first input, like the choices of one question, are in the same shard: they share forwards.
        """
        if self.answers.plan is None:
            return parts
        keys = [request_key("share", *part[0][0]) if part else "" for part in parts]
        costs: Counter[str] = Counter()
        for key, part in zip(keys, parts, strict=True):
            costs[key] += sum(len(masked.ids) for masked, _ in part)
        keys_of_shard = self.answers.of_this_shard(costs)
        return [part if key in keys_of_shard else [] for key, part in zip(keys, parts, strict=True)]

    def _wanted(self, parts: list[list[tuple[MaskedInput, int]]]) -> WantedScores:
        """The tokens to score for these parts, without repetitions."""
        wanted = WantedScores({}, Counter(), Counter())
        for part in parts:
            for masked, target in part:
                targets = wanted.keys.setdefault(masked, {})
                if target not in targets:
                    targets[target] = request_key(self.code_sha256, self.mode, *masked, target)
                wanted.num_uses[targets[target]] += 1
            if part:
                wanted.num_ends[targets[target]] += 1
        return wanted

    def _cost(self, wanted: WantedScores, new: Iterable[str], batch: Batch, began: float) -> Cost:
        """The cost of a batch that has just ended. new: the keys that it answered; began: its start."""
        new = list(new)
        return Cost(
            seconds_scoring=time.perf_counter() - began,
            scored_tokens=sum(wanted.num_uses[key] for key in new),
            scored_requests=sum(wanted.num_ends[key] for key in new),
            forwards={"score": len(batch.inputs)},
        )
