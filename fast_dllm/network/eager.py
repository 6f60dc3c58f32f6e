"""Forwards that run module by module. The other executors replace segments of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.cache import Attend, KVCache, block_causal_mask, mask_for_heads
from fast_dllm.network.executor import Choice, Executor
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.packing import BlockInputs, BlockRows, pack_block

PREFILL_ROWS = 1024  # rows that one forward of a prefill runs at once; it bounds the mask and the activations


class EagerExecutor(Executor):
    """Runs forwards module by module, so that hooks on the modules see each forward."""

    def __init__(self, model: FastDLLMForCausalLM, cache: KVCache):
        super().__init__(cache, hidden_like=model.model.hidden_like())
        self.model = model
        self.pays_by_row = model.device.type == "cpu"

    def prefill(
        self, cache_rows: Sequence[int], token_ids: Sequence[Sequence[int]], read: Sequence[int] | None = None
    ) -> Tensor | None:
        cache = self.cache
        counts = [len(ids) for ids in token_ids]
        for count in counts:
            if not count or count % cache.block_size:
                raise ValueError(f"prefill takes whole blocks of {cache.block_size} tokens, not {count} tokens")
        if len({cache.lengths[cache_row] for cache_row in cache_rows}) > 1:
            raise ValueError("sequences that are prefilled together must be equally long")
        length_before, longest = cache.lengths[cache_rows[0]], max(counts)
        hidden_rows: dict[int, Tensor] = {}  # index of the sequence -> hidden row (C,)
        start = 0
        while start < longest:
            # Sequences whose tokens have all run take no part in the further forwards.
            running = [index for index, count in enumerate(counts) if count > start]
            blocks_at_once = max(PREFILL_ROWS // (cache.block_size * len(running)), 1)
            stop = min(start + blocks_at_once * cache.block_size, longest)
            padded = [[*token_ids[index][start:stop], *[0] * (stop - counts[index])] for index in running]
            hidden = self._prefill_rows([cache_rows[index] for index in running], padded, length_before + start)
            for batch_index, index in enumerate(running):
                cache.lengths[cache_rows[index]] = length_before + min(stop, counts[index])
                if read is not None and start <= read[index] < stop:
                    hidden_rows[index] = hidden[batch_index, read[index] - start]
            start = stop
        if read is None:
            return None
        return self.model.lm_head(torch.stack([hidden_rows[index] for index in range(len(counts))]))

    def _prefill_rows(self, cache_rows: list[int], token_ids: list[list[int]], begin: int) -> Tensor:
        """Final hidden states (B, T, C) of token ids (B, T) at positions [begin, begin + T)."""
        cache, device = self.cache, self.model.device
        ids, row_idx = torch.tensor(token_ids, device=device), torch.tensor(cache_rows, device=device)
        end = begin + ids.shape[1]
        mask = None  # a single block sees every position up to its own end
        if ids.shape[1] > cache.block_size:
            causal = block_causal_mask(ids.shape[1], end, cache.block_size, device)
            mask = mask_for_heads(causal, self.model.config)
        positions = torch.arange(begin, end, device=device)
        flat_positions = (row_idx[:, None] * cache.max_length + positions).flatten()
        first_rows = cache_rows == list(range(len(cache_rows)))
        attend = Attend(
            cache.cos[begin:end, None],  # (T, 1, D)
            cache.sin[begin:end, None],
            mask,
            cache,
            flat_positions,
            None if first_rows else row_idx,
            end,
        )
        return self.run_network(ids, attend)

    def run_block(self, block: BlockRows, *, store: LayerStore | None = None, choose: Choice | None = None) -> Tensor:
        inputs = pack_block(self.cache, block)
        if store is None:
            return self.logits_of(self.run_network(inputs.ids, inputs.attend), inputs)
        assert choose is not None, "a store is written or read as `choose` says"
        return self.logits_of(self._run_reusing(inputs, store, choose), inputs)

    def _run_reusing(self, inputs: BlockInputs, store: LayerStore, choose: Choice) -> Tensor:
        """Run a forward in three segments: before, in and after the layers of `store`. Returns hidden states (B, T, C).

        Sequences for which `choose` decides differently run apart in the middle segment.
        """
        x = self.run_before(inputs, store.layers)
        reads = list(choose(x, inputs.cache_rows, inputs.block_rows))
        if len(set(reads)) == 1:
            x = self.run_range(x, inputs.attend, inputs.cache_rows, inputs.block_rows, store, reads[0])
            return self.run_after(x, inputs, store.layers)
        merged = torch.empty_like(x)
        for read in (False, True):
            members = [index for index, reads_store in enumerate(reads) if reads_store == read]
            picked = torch.tensor(members).to(x.device, non_blocking=True)
            cache_rows = inputs.cache_rows[picked]
            attend = inputs.attend.select(picked, cache_rows[:, 0])
            merged[picked] = self.run_range(x[picked], attend, cache_rows, inputs.block_rows[picked], store, read)
        return self.run_after(merged, inputs, store.layers)

    # -- segments of a forward: GraphExecutor records them, CompiledExecutor replaces two ------------------------------
    def run_network(self, ids: Tensor, attend: Attend) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C)."""
        return self.model.model(ids, attend)

    def run_layers(self, x: Tensor, attend: Attend, layers: range) -> Tensor:
        """Hidden rows (B, T, C) through some layers."""
        return self.model.model.run_layers(x, attend, layers)

    def run_before(self, inputs: BlockInputs, layers: range) -> Tensor:
        """Hidden rows (B, T, C) that enter `layers`."""
        return self.run_layers(self.model.model.embed(inputs.ids), inputs.attend, range(layers.start))

    def run_range(
        self, x: Tensor, attend: Attend, cache_rows: Tensor, block_rows: Tensor, store: LayerStore, read: bool
    ) -> Tensor:
        """Pass hidden rows (B, T, C) through the layers of `store`.

        read: the stored values replace the layers; else the layers run and their output is stored. cache_rows (B, 1),
        block_rows (B, T).
        """
        if store.part == "mlp":
            return self._run_range_of_mlps(x, attend, cache_rows, block_rows, store, read)
        if read:
            return store.output(x, cache_rows, block_rows)
        output = self.run_layers(x, attend, store.layers)
        store.write(x, output, cache_rows, block_rows)
        return output

    def _run_range_of_mlps(
        self, x: Tensor, attend: Attend, cache_rows: Tensor, block_rows: Tensor, store: LayerStore, read: bool
    ) -> Tensor:
        """`run_range` for a store of MLP outputs: the attention of every layer runs in any case."""
        if not read:
            store.write(x, x, cache_rows, block_rows)
        for index in store.layers:
            layer = self.model.layer(index)
            x = layer.attention(x, attend)
            if read:
                added = store.mlp(index, cache_rows, block_rows)
            else:
                added = layer.mlp(layer.post_attention_layernorm(x)).to(x.dtype)
                store.write_mlp(index, added, cache_rows, block_rows)
            x = x + added
        return x

    def run_after(self, x: Tensor, inputs: BlockInputs, layers: range) -> Tensor:
        """Hidden rows (B, T, C) that leave `layers` -> final hidden states (B, T, C)."""
        network = self.model.model
        return network.norm(self.run_layers(x, inputs.attend, range(layers.stop, len(network.layers))))

    def logits_of(self, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Final hidden states (B, T, C) -> logits (B, R, V) of the rows to be read."""
        picked = inputs.read.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.model.lm_head(hidden.gather(1, picked))
