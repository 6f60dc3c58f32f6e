"""What to run to score a continuation, what to read in it, and the part of lm_eval's model that asks for it.

Blocks that several inputs begin with are run once (`batches`, `SharedContext`): the examples of a few-shot task once
for a whole subject, a question's context once for all its continuations, and in chain mode for all their tokens.

Two modes (docs/design.md, "Scoring"). *reference* masks the first continuation token and leaves the rest visible; it is
what the published numbers were measured with, and exact for continuations of one token. *chain* is the chain rule: each
token in turn is masked together with all that follow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import NonFiniteError, UsageError
from fast_dllm.evaluate.processes import ProcessesLM
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import SpecialIds
from fast_dllm.record.answers import Cost, request_key


class MaskedInput(NamedTuple):
    """Token ids with masks, and the row (one before the masked token) whose logits tell about it."""

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
    """(input, target token) for each token that counts: the first one, or with `chain` every one.

    `stop_token` stands behind the continuation (None: nothing does), masks fill the block. A context that is too long
    loses its head. Raises UsageError for a continuation that cannot fit at all.
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
    """Inputs to run together, whose first `shared` tokens, whole blocks, are the same."""

    shared: int
    inputs: list[MaskedInput]


def batches(
    inputs: Iterable[MaskedInput], *, block_size: int, batch_size: int, done: Collection[MaskedInput] = ()
) -> Iterator[Batch]:
    """Every input but those `done`, in an order in which what inputs begin with is run once.

    The inputs are the leaves of a tree of blocks, walked in depth; those that part at the same place are batched, equal
    lengths side by side. An input's last block, which holds the row that is read, is never shared. What is `done`
    decides with the others what is shared, so that an interrupted run goes on as it began.
    """
    groups = [(0, sorted(inputs, key=lambda masked: masked.ids))]
    while groups:
        shared, group = groups.pop()

        def next_block(masked: MaskedInput, start: int) -> tuple[int, ...]:
            return masked.ids[start : start + block_size]

        most = min((len(masked.ids) for masked in group), default=0) - block_size
        while len(group) > 1 and shared < most and next_block(group[0], shared) == next_block(group[-1], shared):
            shared += block_size  # what the first and the last of a sorted list begin with, all do
        alone, deeper = [], []
        for _, run in groupby(group, key=lambda masked: next_block(masked, shared)):
            equal = list(run)
            longer = [masked for masked in equal if len(masked.ids) > shared + block_size]
            if len(longer) > 1:
                deeper.append((shared, longer))
                equal = [masked for masked in equal if len(masked.ids) == shared + block_size]
            alone += [masked for masked in equal if masked not in done]
        alone.sort(key=lambda masked: -len(masked.ids))
        for start in range(0, len(alone), batch_size):
            yield Batch(shared, alone[start : start + batch_size])
        groups += reversed(deeper)


class SharedContext:
    """Keys and values of the blocks that a batch's inputs begin with: computed in the first cache row, copied to the
    others, and kept as far as the next batch begins with the same."""

    def __init__(self, model: FastDLLMForCausalLM, num_rows: int, longest: int, block_size: int):
        """num_rows: of the largest batch. longest: the longest input's tokens."""
        self.model, self.cache = model, model.new_cache(num_rows, longest, block_size)
        self.tokens: tuple[int, ...] = ()
        self.copied = [0] * num_rows  # how many of `tokens` each row holds

    def hold(self, tokens: tuple[int, ...], num_rows: int) -> None:
        """Make the first `num_rows` cache rows hold `tokens`, whole blocks, and nothing behind them."""
        cache, end, size = self.cache, len(tokens), self.cache.block_size
        same = 0
        while same < min(end, len(self.tokens)) and tokens[same : same + size] == self.tokens[same : same + size]:
            same += size
        if same < end:
            cache.lengths[0] = same
            self.model.prefill(cache, [0], [tokens[same:]], read_last=False)
        self.tokens = tokens
        self.copied = [min(held, same) for held in self.copied]
        begin = min(self.copied[1:num_rows], default=end)
        if begin < end:
            for buffer in (cache.keys, cache.values):
                buffer[:, 1:num_rows, begin:end] = buffer[:, :1, begin:end]
            self.copied[1:num_rows] = [end] * (num_rows - 1)
        cache.lengths[:num_rows] = [end] * num_rows


@torch.inference_mode()
def target_scores(
    context: SharedContext, batch: Batch, targets: Sequence[Collection[int]], *, pad_id: int
) -> list[list[tuple[float, bool]]]:
    """(log-probability, is it the argmax) of every target of each input of the batch."""
    shared, inputs = batch
    context.hold(inputs[0].ids[:shared], len(inputs))
    longest = max(len(masked.ids) for masked in inputs)
    # Blocks never see later blocks, so padding at the end changes nothing.
    ids = [[*masked.ids[shared:], *[pad_id] * (longest - len(masked.ids))] for masked in inputs]
    read = [masked.row - shared for masked in inputs]
    logits = context.model.prefill(context.cache, range(len(inputs)), ids, read=read)
    assert logits is not None, "rows are read"
    log_probs = logits.float().log_softmax(dim=-1)
    if not log_probs.sum(dim=-1).isfinite().all():
        raise NonFiniteError("the model's logits are not finite in a forward that scores")
    best = log_probs.argmax(dim=-1).tolist()
    scores = []
    for place, wanted in enumerate(map(list, targets)):
        values = log_probs[place, wanted].tolist()
        scores.append([(value, best[place] == target) for target, value in zip(wanted, values, strict=True)])
    return scores


class ScoringLM(ProcessesLM):
    """The log-likelihood side of the harness's model. Its `_known_answers` and `_keep` make answers durable."""

    arguments: ModelArguments
    model: FastDLLMForCausalLM
    ids: SpecialIds
    block_size: int
    max_length: int
    scoring_sha256: str

    def _known_answers(self, keys: Iterable[str]) -> dict[str, Any]:
        raise NotImplementedError

    def _keep(self, answers: dict[str, Any], new: dict[str, Any], cost: Cost) -> None:
        raise NotImplementedError

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, split where the text is split if a token boundary is there.

        lm_eval moves a context's trailing white space into the continuation. A chat prompt ends in a newline of its own
        token; moved, it would be the one masked token of reference mode, with the answer's letter visible behind it.
        """
        whole, alone = self.tok_encode(context + continuation), self.tok_encode(context)
        if whole[: len(alone)] == alone:
            return alone, whole[len(alone) :]
        return super()._encode_pair(context, continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of every continuation, in order. The copies that lm_eval pads the shorter
        processes' lists with are not scored, nor counted, again."""
        distinct = {id(instance): instance for instance in requests}
        scores = super().loglikelihood(list(distinct.values()), disable_tqdm=disable_tqdm)
        by_id = dict(zip(distinct, scores, strict=True))
        return [by_id[id(instance)] for instance in requests]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Score (_, context ids, continuation ids) triples in this run's mode; (log-probability, greedy) each."""
        chain = self.arguments.loglikelihood_mode == "chain"
        parts = [self._masked_inputs(context, continuation, chain) for _, context, continuation in requests]
        scores = self._score(parts, disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text by the chain rule, each token given all the text before it.

        No stop token stands behind the text: the model is not told where it ends.
        """
        texts = [self.tok_encode(instance.args[0]) for instance in requests]
        windows, counts = [], []
        for ids in texts:
            rolling = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
                ),
            )
            own = [self._masked_inputs(context, continuation, True, end=False) for context, continuation in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(self._score(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for instance, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
        return totals

    def _masked_inputs(
        self, context: list[int], continuation: list[int], chain: bool, end: bool = True
    ) -> list[tuple[MaskedInput, int]]:
        return masked_inputs(
            context,
            continuation,
            chain=chain,
            mask_id=self.ids.mask,
            stop_token=self.ids.stop if end else None,
            block_size=self.block_size,
            max_length=self.max_length,
        )

    def _score(self, parts: list[list[tuple[MaskedInput, int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Sum the targets' log-probabilities of each part; greedy if every target was the argmax.

        Inputs that are the same get one forward.
        """
        wanted: dict[MaskedInput, dict[int, str]] = {}  # input -> target -> key of its answer
        num_uses: Counter[str] = Counter()  # key of an answer -> tokens of the requests that it scores
        num_ends: Counter[str] = Counter()  # key of an answer -> requests that it completes
        for part in parts:
            for masked, target in part:
                targets = wanted.setdefault(masked, {})
                if target not in targets:
                    targets[target] = request_key(
                        self.scoring_sha256, self.arguments.loglikelihood_mode, *masked, target
                    )
                num_uses[targets[target]] += 1
            if part:
                num_ends[targets[target]] += 1
        answers = self._known_answers(key for targets in wanted.values() for key in targets.values())
        done = {masked for masked, targets in wanted.items() if all(key in answers for key in targets.values())}
        left = [len(masked.ids) for masked in wanted if masked not in done]
        batch_size = min(self.rows_of(max(left)), len(left)) if left else 1
        context = None
        with tqdm(total=len(wanted), desc="scoring", unit="fwd", disable=disable_tqdm or self.rank != 0) as progress:
            progress.update(len(done))
            for batch in batches(wanted, block_size=self.block_size, batch_size=batch_size, done=done):
                if context is None:
                    longest = max(len(masked.ids) for masked in wanted if masked not in done)
                    context = SharedContext(self.model, batch_size, longest, self.block_size)
                began = time.perf_counter()
                new: dict[str, tuple[float, bool]] = {}
                found = self._target_scores(context, batch, [wanted[masked] for masked in batch.inputs])
                for masked, values in zip(batch.inputs, found, strict=True):
                    new |= dict(zip(wanted[masked].values(), values, strict=True))
                cost = Cost(
                    {
                        "seconds_scoring": time.perf_counter() - began,
                        "scored_tokens": sum(num_uses[key] for key in new),
                        "scored_requests": sum(num_ends[key] for key in new),
                        "forwards.score": len(batch.inputs),
                    }
                )
                self._keep(answers, new, cost)
                progress.update(len(batch.inputs))
        scores = []
        for part in parts:
            values = [answers[wanted[masked][target]] for masked, target in part]
            scores.append((sum(value for value, _ in values), all(greedy for _, greedy in values)))
        return scores

    def _target_scores(
        self, context: SharedContext, batch: Batch, targets: list[dict[int, str]]
    ) -> list[list[tuple[float, bool]]]:
        return target_scores(context, batch, targets, pad_id=self.ids.pad)
