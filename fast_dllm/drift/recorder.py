"""Watches a model decode and adds up how far each layer drifts between steps. Changes nothing of what is decoded."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor, nn

from fast_dllm.drift.sums import CLASSES, CYCLE, DISTANCES, LAGS, PARTS, QUANTITIES, DriftSums
from fast_dllm.network.cache import Attend
from fast_dllm.network.layers import DecoderLayer
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import as_written

NO_BLOCK = (-1, -1)


class Recorder:
    """Records the denoising steps of plain decoding (`refresh=block`), one sequence at a time, while it is entered.

    Held on the device: what the layers gave on the last step and the hidden rows of the last two, for the block in work
    (7B in 16 bits: 28 layers x 32 rows x 2 bytes x (4 x 3584 + 2 x 512), 28 MB), and the sums in float64.
    Raises ValueError for a step of several sequences or of a window of the block.
    """

    def __init__(self, model: FastDLLMForCausalLM, sums: DriftSums, mask_id: int):
        self.model, self.sums, self.mask_id = model, sums, mask_id
        self.size = sums.by_class.shape[3]
        device = model.lm_head.weight.device
        self._by_class, self._by_distance, self._ranges, self._leaving = (
            torch.zeros(each.shape, dtype=torch.float64, device=device)
            for each in (sums.by_class, sums.by_distance, sums.ranges, sums.leaving)
        )
        self._handles: list[Any] = []
        self._exits = ExitStack()
        self._outputs: dict[str, list[Tensor]] = {"hidden": [], "attention": [], "mlp": []}
        self._past: deque[dict[str, Tensor]] = deque(maxlen=len(LAGS))  # the latest first
        self._tokens: list[int] = []
        self._place = NO_BLOCK  # cache row and end of the block in work
        self._question = -1  # number of the question in work
        self._step = self._steps = 0

    def __enter__(self) -> Recorder:
        self._exits.enter_context(as_written(self.model))  # a forward that is replayed or compiled calls no hook
        network = self.model.model
        self._handles.append(network.register_forward_pre_hook(self._begin))
        for layer in network.layers:
            assert isinstance(layer, DecoderLayer), "ModuleList does not say what it holds"
            self._handles.append(layer.register_forward_hook(self._keep_hidden))
            self._handles.append(layer.self_attn.register_forward_hook(self._keeper("attention")))
            self._handles.append(layer.mlp.register_forward_hook(self._keeper("mlp")))
        self._handles.append(network.register_forward_hook(self._end))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off; what was recorded is added to `sums`."""
        for handle in self._handles:
            handle.remove()
        self._exits.close()
        for total, device in (
            (self.sums.by_class, self._by_class),
            (self.sums.by_distance, self._by_distance),
            (self.sums.ranges, self._ranges),
            (self.sums.leaving, self._leaving),
        ):
            total += device.cpu().numpy()
        self.sums.steps += self._steps

    # -- hooks ---------------------------------------------------------------------------------------------------------
    def _begin(self, network: nn.Module, args: tuple[Tensor, Attend]) -> None:
        for tensors in self._outputs.values():
            tensors.clear()

    def _keep_hidden(self, layer: nn.Module, args: tuple[Tensor, Attend], output: Tensor) -> None:
        hidden = self._outputs["hidden"]
        if not hidden:
            hidden.append(args[0])
        hidden.append(output)

    def _keeper(self, name: str):
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[name].append(output)

        return keep

    def _end(self, network: nn.Module, args: tuple[Tensor, Attend], output: Tensor) -> None:
        ids, attend = args
        tokens = ids[0].tolist()
        if attend.cache is None or (ids.shape[1] > self.size and self.mask_id in tokens):
            return  # scoring
        row = 0 if attend.cache_rows is None else int(attend.cache_rows[0])
        place = (row, attend.num_keys)
        if self.mask_id not in tokens:
            is_commit = place == self._place and ids.shape[1] == self.size and self._has_become(tokens)
            if not is_commit:  # a prefill, with which another question begins
                self._place = NO_BLOCK
            return
        if ids.shape != (1, self.size):
            raise ValueError(f"drift is recorded for one whole block at a time, not for ids of {tuple(ids.shape)}")
        if place not in (self._place, (self._place[0], self._place[1] + self.size)):
            self._question += 1
        unmasked = [token for token in self._tokens if token != self.mask_id]
        goes_on = place == self._place and len(unmasked) < self.size - tokens.count(self.mask_id)
        if not goes_on or not self._has_become(tokens):
            self._past.clear()
            self._step = 0
        now = self._of_this_step(attend, row)
        if self._past:
            self._compare(now, tokens)
        self._past.appendleft(now)
        if len(self._past) == len(LAGS):
            self._past[-1] = {"hidden": self._past[-1]["hidden"]}  # further back only they are looked at
        self._tokens, self._place = tokens, place
        self._step += 1

    def _has_become(self, tokens: list[int]) -> bool:
        """Whether the last step's block is `tokens` with some of them masked."""
        return all(last in (token, self.mask_id) for last, token in zip(self._tokens, tokens, strict=True))

    def _of_this_step(self, attend: Attend, row: int) -> dict[str, Tensor]:
        assert attend.cache is not None
        block = slice(attend.num_keys - self.size, attend.num_keys)
        now = {
            name: torch.stack([each[0] for each in tensors]) for name, tensors in self._outputs.items()
        }  # (L or L + 1, T, C)
        for name, buffer in (("keys", attend.cache.keys), ("values", attend.cache.values)):
            now[name] = buffer[:, row, block].flatten(-2).clone()  # written in place on the next step
        return now

    def _compare(self, now: dict[str, Tensor], tokens: list[int]) -> None:
        """Add what this step says against the last one, and its hidden rows against those further back."""
        device = now["hidden"].device
        self._steps += 1
        classes, distances = _indicators(self._tokens, tokens, self.mask_id)
        classes, distances = classes.to(device), distances.to(device)
        before = self._past[0]
        for index, quantity in enumerate(QUANTITIES):
            step_sums = _sums(_quantity(now, quantity), _quantity(before, quantity))  # (S, L, T)
            self._by_class[index, :, :, self._step] += step_sums @ classes
            self._by_distance[index] += step_sums @ distances
        read = self._rows_read(tokens)
        hidden = now["hidden"][:, read].float()
        part = self._question % PARTS
        for lag, past in enumerate(self._past):
            changed = (hidden - past["hidden"][:, read].float()).transpose(0, 1)  # (R, L + 1, C)
            step = self._step % CYCLE
            self._ranges[part, lag, step] += torch.cdist(changed, changed, p=1).sum(dim=0)
            self._leaving[part, lag, step] += hidden.abs().sum(dim=(1, 2))

    def _rows_read(self, tokens: list[int]) -> list[int]:
        """The rows whose predictions the step in work wants: one before each of the sub-block's (token shift)."""
        sub = self.sums.small_block_size
        start = tokens.index(self.mask_id) // sub * sub
        return [max(row - 1, 0) for row in range(start, start + sub)]


def _quantity(outputs: dict[str, Tensor], quantity: str) -> Tensor:
    """(L, T, C) in float32."""
    if quantity == "output":
        return outputs["hidden"][1:].float()
    if quantity == "residual":
        return outputs["hidden"][1:].float() - outputs["hidden"][:-1].float()
    return outputs[quantity].float()


def _sums(now: Tensor, before: Tensor) -> Tensor:
    """(S, L, T) in float64, in the order of SUMS."""
    cosine = F.cosine_similarity(now, before, dim=-1)
    sums = ((now - before).abs().sum(dim=-1), before.abs().sum(dim=-1), cosine, torch.ones_like(cosine))
    return torch.stack(sums).double()


def _indicators(before: list[int], now: list[int], mask_id: int) -> tuple[Tensor, Tensor]:
    """(T, CLASSES) and (T, DISTANCES), 1 where a row is of a class, or so far from the nearest one just unmasked."""
    new = [row for row, (old, token) in enumerate(zip(before, now, strict=True)) if old != token]
    classes = torch.zeros(len(now), len(CLASSES), dtype=torch.float64)
    distances = torch.zeros(len(now), len(DISTANCES), dtype=torch.float64)
    for row, token in enumerate(now):
        away = min(abs(row - unmasked_row) for unmasked_row in new)
        classes[row, 0 if not away else 1 if token == mask_id else 2] = 1
        for index, (least, most) in enumerate(DISTANCES):
            distances[row, index] = least <= away <= most
    return classes, distances
