"""Compiles a decoder layer for this CPU: torch's AOTInductor makes one native library of layers.DecoderLayer.

A layer of a small model is about thirty operations of a few microseconds each, and calling them takes longer than what
they compute. A compiled layer is one call. All layers of a model share a library, since their weights are its inputs,
and so do all models of one shape. It is compiled once, in about ten seconds, and kept on the disk.

Its values equal those of the layer as written within float32's rounding, as on another kind of CPU.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor, nn

from fast_dllm.errors import UsageError
from fast_dllm.network.config import FastDLLMConfig

logger = logging.getLogger(__name__)
Library = Callable[..., Tensor]

MAX_SIZE = 2**20  # upper bound of rows, positions and sequences that the compiler assumes; far beyond any use


class Variant(NamedTuple):
    """What one library is compiled for.

    The numbers of rows, keys and positions may differ from call to call. So may those of sequences and cache rows, if
    they are more than one.

    several: more than one sequence. many_cache_rows: the cache has more than one row. mask: None without a mask; else
    whether it differs (from sequence to sequence, from row to row). apart: the sequences are at different positions.
    picked: they are not those of the cache's first rows.
    """

    several: bool
    many_cache_rows: bool
    mask: tuple[bool, bool] | None
    apart: bool
    picked: bool
    num_threads: int


class Layer(nn.Module):
    """Computes what layers.DecoderLayer computes over a cache, as a function of tensors alone that compiles well.

    It uses no Python number of a forward and computes no index in an inner loop. It writes the cache in place, which
    the compiler does for an input but not for a view of one.
    """

    def __init__(self, config: FastDLLMConfig, weight_names: Sequence[str]):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.weight_names = tuple(weight_names)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
        cache_rows: Tensor,
        positions: Tensor,
        picked: Tensor | None,
        seen: Tensor,
        layer_weights: list[Tensor],
    ) -> Tensor:
        """Hidden rows x (B, T, C) -> hidden rows (B, T, C). Writes new keys and values to the cache.

        cos, sin (B or 1, T, 1, D). keys, values (R, P, K, D) of this layer: written at cache_rows (B, T) and positions
        (B, T); read up to seen's size (S, D), in the first B rows or those of picked (B,). mask bool (B or 1, 1, T or
        1, S), True = may attend. layer_weights: in the order of `weight_names`, which are layers.DecoderLayer's.
        """
        weights = dict(zip(self.weight_names, layer_weights, strict=True))
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        G = H // K

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return weights[f"{name}.weight"] * F.rms_norm(x, (x.shape[-1],), eps=self.eps)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos_1 + second * sin_1, second * cos_2 + first * sin_2), -1)

        (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, -1), sin.chunk(2, -1)
        normed = norm(x, "input_layernorm")
        queries = rotate(linear(normed, "self_attn.q_proj").view(B, T, H, D))
        read = []
        for buffer, new in (
            (keys, rotate(linear(normed, "self_attn.k_proj").view(B, T, K, D))),
            (values, linear(normed, "self_attn.v_proj").view(B, T, K, D)),
        ):
            buffer.index_put_((cache_rows, positions), new)
            visible = buffer.narrow(1, 0, seen.shape[0])
            visible = visible.narrow(0, 0, B) if picked is None else visible.index_select(0, picked)
            read.append(visible.transpose(1, 2))
        # T is outside of G, so that indices are divided by G, which is known when the layer is compiled.
        queries = queries.view(B, T, K, G, D).permute(0, 2, 1, 3, 4).reshape(B, K, T * G, D)
        if mask is not None and mask.shape[2] != 1:
            mask = mask.unsqueeze(3).expand(-1, -1, -1, G, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(queries, read[0], read[1], mask)
        out = out.view(B, K, T, G, D).permute(0, 2, 1, 3, 4).reshape(B, T, H * D)
        x = x + linear(out, "self_attn.o_proj")
        normed = norm(x, "post_attention_layernorm")
        return x + linear(F.silu(linear(normed, "mlp.gate_proj")) * linear(normed, "mlp.up_proj"), "mlp.down_proj")


class LayerLibraries:
    """The libraries of one layer's shape. Each is compiled when it is first needed and kept in a folder."""

    def __init__(self, config: FastDLLMConfig, layer: nn.Module, folder: Path):
        self._config, self._layer, self._folder = config, layer, folder
        self.loaded: dict[Variant, Library] = {}
        self._loading = threading.Lock()
        # One thread at a time: a library's own lock blocks together with Python's interpreter lock.
        self.running = threading.Lock()

    def prepare(self, several: bool) -> None:
        """Compile all libraries that decoding needs, before the first answer. Raises UsageError if that is impossible.

        several: also those for sequences side by side.
        """
        variants = decoding_variants(several)
        missing = sum(not self._path(variant).exists() for variant in variants)
        if missing:
            logger.warning(
                "compiling the layers for this CPU, once: %d libraries of some ten seconds each, kept in %s",
                missing,
                self._folder,
            )
        for variant in variants:
            self.library(variant)

    def library(self, variant: Variant) -> Library:
        """The library of a variant; it takes what Layer.forward takes. Raises UsageError if it cannot be compiled."""
        if variant in self.loaded:
            return self.loaded[variant]
        with self._loading:
            if variant not in self.loaded:
                self.loaded[variant] = self._load(variant)
        return self.loaded[variant]

    def _load(self, variant: Variant) -> Library:
        path = self._path(variant)
        if not path.exists():
            self._compile(variant, path)
        try:
            return torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        except RuntimeError:  # the file was cut short, or is no library
            self._compile(variant, path)
            return torch._inductor.aoti_load_package(str(path), run_single_threaded=True)

    def _path(self, variant: Variant) -> Path:
        return self._folder / f"{self._name(variant)}.pt2"

    def _name(self, variant: Variant) -> str:
        """A hash of all that a library depends on: this file, torch, the CPU, the layer's shape and the variant."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self._layer.named_parameters()]
        constants = (shapes, self._config.num_attention_heads, self._config.rms_norm_eps)
        builder = (Path(__file__).read_text(), torch.__version__, _cpu())
        return hashlib.sha256(repr((builder, constants, variant)).encode()).hexdigest()[:32]

    def _compile(self, variant: Variant, path: Path) -> None:
        """Compile the library of a variant and move it to `path` in one step. Raises UsageError if that fails."""
        logger.info("compiling the layers for %s into %s", variant, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                package = Path(folder) / path.name
                names = [name for name, _ in self._layer.named_parameters()]
                with torch.inference_mode(False), torch.no_grad():
                    inputs, sizes = self._example(variant)
                    traced = torch.export.export(Layer(self._config, names), inputs, dynamic_shapes=sizes)
                    # Precompiled headers would leave 140 MB in a cache that nobody empties, and save nothing here.
                    settings = {"aot_inductor.precompile_headers": False}
                    torch._inductor.aoti_compile_and_package(
                        traced, package_path=str(package), inductor_configs=settings
                    )
                package.replace(path)
        except Exception as error:  # no compiler, a full disk, a torch that cannot compile the layer
            first_line = str(error).strip().split("\n")[0]
            raise UsageError(
                "graphs=compiled: the layers cannot be compiled here, which takes a C++ compiler such as g++ and room "
                f"in {path.parent} ({type(error).__name__}: {first_line}); graphs=auto takes neither"
            ) from error

    def _example(self, variant: Variant) -> tuple[tuple, tuple]:
        """Example inputs of `Layer` for this variant, and the names of the sizes that may differ from call to call."""
        config, Dim = self._config, torch.export.Dim
        T, S, P = (Dim(name, min=2, max=MAX_SIZE) for name in ("rows", "keys", "positions"))
        B: Any = Dim("sequences", min=2, max=MAX_SIZE) if variant.several else 1
        R: Any = Dim("cache_rows", min=2, max=MAX_SIZE) if variant.many_cache_rows else 1
        size = {T: 8, S: 160, P: 352, B: 3 if variant.several else 1, R: 5 if variant.many_cache_rows else 1}
        heads, D = config.num_key_value_heads, config.head_dim

        def example(*sizes: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[int, Any]]:
            """A tensor of these sizes, and the names of its variable sizes by axis."""
            names = {axis: dim for axis, dim in enumerate(sizes) if not isinstance(dim, int)}
            return torch.zeros([size.get(dim, dim) for dim in sizes], dtype=dtype), names

        angles = example(B if variant.apart else 1, T, 1, D)
        cache, indices = example(R, P, heads, D), example(B, T, dtype=torch.long)
        mask: tuple[Any, Any] = (None, None)
        rows = mask
        if variant.mask is not None:
            by_sequence, by_row = variant.mask
            mask = example(B if by_sequence else 1, 1, T if by_row else 1, S, dtype=torch.bool)
        if variant.picked:
            rows = example(B, dtype=torch.long)
        weights = [parameter.detach() for parameter in self._layer.parameters()]
        pairs = (
            example(B, T, config.hidden_size),
            angles,
            angles,
            mask,
            cache,
            cache,
            indices,
            indices,
            rows,
            example(S, D),
        )
        # A copy of each, because a tensor that occurs twice would be traced as one input.
        inputs = tuple(None if tensor is None else tensor.clone() for tensor, _ in pairs)
        return (*inputs, weights), (*(sizes for _, sizes in pairs), [{} for _ in weights])


def decoding_variants(several: bool) -> list[Variant]:
    """The variants of the forwards of decoding, for the number of threads that is set.

    Prefills have equal positions, and a mask by rows from their second block on. Block rows have a mask by sequences
    where the sequences have unlike lengths.
    """
    num_threads = torch.get_num_threads()
    variants = [Variant(False, False, mask, False, False, num_threads) for mask in (None, (False, True))]
    if several:
        kinds = [(variant.several, variant.mask, variant.apart) for variant in variants]
        kinds += [(True, None, False), (True, (False, True), False), (True, None, True), (True, (True, False), True)]
        variants += [
            Variant(of_several, True, mask, apart, picked, num_threads)
            for of_several, mask, apart in kinds
            for picked in (False, True)
        ]
        # A decision in mid-forward can separate one sequence from the others; its row of their mask stays in use.
        variants.append(Variant(False, True, (False, False), False, True, num_threads))
    return variants


def library_folder() -> Path:
    """Where libraries are kept: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_dllm" / "layers"


@functools.cache
def _cpu() -> tuple[str, ...]:
    """Names and features of this CPU, which decide what machine code it can run."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), flags
