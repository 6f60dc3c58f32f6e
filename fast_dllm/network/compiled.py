"""A decoder layer as one native library: torch's AOTInductor compiles what model.DecoderLayer does for this CPU.

As written a layer of a small model is some thirty operations of a few microseconds each, and calling them takes longer
than what they compute. Compiled it is one call. All layers of a model share the library, since their weights are inputs
of it, and so do all models of one shape: it is compiled once, in some ten seconds, and kept on the disk.

Its values are those of the layer as written but for float32's rounding, as with another kind of CPU.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor, nn

from fast_dllm.errors import UsageError
from fast_dllm.network.cache import Attend
from fast_dllm.network.config import FastDLLMConfig

logger = logging.getLogger(__name__)

MOST = 2**20  # rows, positions, sequences: a bound that the compiler is told, beyond any use


class Variant(NamedTuple):
    """What of a call is fixed in a library. The numbers of rows, keys and positions are not, nor those of sequences and
    cache rows where there are several.

    several: more than one sequence. roomy: the cache has more than one row. mask: whether it differs from sequence to
    sequence and from row to row, or None. apart: the sequences stand at different positions. picked: they are not those
    of the cache's first rows.
    """

    several: bool
    roomy: bool
    mask: tuple[bool, bool] | None
    apart: bool
    picked: bool
    num_threads: int


class Layer(nn.Module):
    """What model.DecoderLayer does over a cache, as a function of tensors alone that compiles well: no Python number of
    a forward, no index that is computed in an inner loop, and the cache written in place (which the compiler does for
    an input itself, not for a view of it)."""

    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps

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
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        cos, sin (B or 1, T, 1, D); keys, values (R, P, K, D) of this layer, written at cache_rows (B, T) and
        positions (B, T) and read up to seen's size (S, D), in the first B rows or those of picked (B,); mask bool (B or
        1, 1, T or 1, S), True = may attend; weights by their names in model.DecoderLayer.
        """
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
            held = buffer.narrow(1, 0, seen.shape[0])
            read.append((held.narrow(0, 0, B) if picked is None else held.index_select(0, picked)).transpose(1, 2))
        # T outside of G: what an index is divided by is then no number of the forward
        queries = queries.view(B, T, K, G, D).permute(0, 2, 1, 3, 4).reshape(B, K, T * G, D)
        if mask is not None and mask.shape[2] != 1:
            mask = mask.unsqueeze(3).expand(-1, -1, -1, G, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(queries, read[0], read[1], mask)
        out = out.view(B, K, T, G, D).permute(0, 2, 1, 3, 4).reshape(B, T, H * D)
        x = x + linear(out, "self_attn.o_proj")
        normed = norm(x, "post_attention_layernorm")
        return x + linear(F.silu(linear(normed, "mlp.gate_proj")) * linear(normed, "mlp.up_proj"), "mlp.down_proj")


class CompiledLayers:
    """Runs a model's decoder layers by their compiled library. A forward without a cache, of one row a sequence, in
    another dtype than float32 or where gradients are wanted is for the layers as written: `takes` says no."""

    def __init__(self, config: FastDLLMConfig, layers: Iterable[nn.Module], folder: Path | None = None):
        """`folder`: where libraries are kept (default: `library_folder`)."""
        self._config, self._layers = config, list(layers)
        self._folder = library_folder() if folder is None else folder
        # where a layer's weights stand: what stands there is read at each call
        self._places = [[_place(layer, name) for name, _ in layer.named_parameters()] for layer in self._layers]
        self._libraries: dict[Variant, Any] = {}
        self._lock, self._running = threading.Lock(), threading.Lock()

    def takes(self, x: Tensor, attend: Attend) -> bool:
        return attend.cache is not None and x.shape[1] > 1 and x.dtype == torch.float32 and not torch.is_grad_enabled()

    def __call__(self, x: Tensor, attend: Attend, layers: range) -> Tensor:
        """Hidden rows (B, T, C) through `layers`, whose keys and values are written to the cache.

        Raises UsageError where a library that is wanted cannot be compiled.
        """
        cache, mask = attend.cache, attend.mask
        assert cache is not None, "`takes` was asked"
        assert attend.slots is not None, "a forward over a cache says where its rows go"
        B, T, _ = x.shape
        cos, sin = (each if each.dim() == 4 else each.unsqueeze(0) for each in (attend.cos, attend.sin))
        if mask is not None:
            mask = mask[:, :, :T]  # the rest repeats it for the other heads
        variant = Variant(
            B > 1,
            cache.batch_size > 1,
            None if mask is None else (mask.shape[0] > 1, mask.shape[2] > 1),
            cos.shape[0] > 1,
            attend.rows is not None,
            torch.get_num_threads(),
        )
        library = self._libraries.get(variant) or self._library(variant)
        # The library trusts that what it is given is contiguous, in this order. What is None is no input of it.
        slots = attend.slots.view(B, T)
        rows = None if attend.rows is None else attend.rows.clone(memory_format=torch.contiguous_format)
        x, *before = (each.contiguous() for each in (x, cos, sin, mask) if each is not None)
        at = slots // cache.max_length, slots % cache.max_length
        after = [each for each in (*at, rows, cache.cos[: attend.num_keys]) if each is not None]
        with self._running:  # a lock of the library's own comes to a standstill with the interpreter's
            for index in layers:
                weights = [held[name] for held, name in self._places[index]]
                x = library.boxed_run([x, *before, cache.keys[index], cache.values[index], *after, *weights])[0]
        return x

    def prepare(self, several: bool = False) -> None:
        """Have the libraries that decoding needs for one sequence at a time, or also for `several` side by side:
        compiling is no part of an answer's time. Raises UsageError where one cannot be compiled."""
        wanted = decoding_variants(several)
        missing = sum(not self._path(variant).exists() for variant in wanted)
        if missing:
            logger.warning(
                "compiling the layers for this CPU, once: %d libraries of some ten seconds each, kept in %s",
                missing,
                self._folder,
            )
        for variant in wanted:
            self._library(variant)

    def _library(self, variant: Variant) -> Any:
        with self._lock:
            if variant not in self._libraries:
                path = self._path(variant)
                if not path.exists():
                    self._compile(variant, path)
                try:
                    self._libraries[variant] = _load(path)
                except RuntimeError:  # a file that was cut short, or is no library
                    self._compile(variant, path)
                    self._libraries[variant] = _load(path)
        return self._libraries[variant]

    def _path(self, variant: Variant) -> Path:
        return self._folder / f"{self._name(variant)}.pt2"

    def _name(self, variant: Variant) -> str:
        """A hash of all that a library depends on: this file, the layer's shape, torch, the CPU and the variant."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self._layers[0].named_parameters()]
        about = (shapes, self._config.num_attention_heads, self._config.rms_norm_eps, torch.__version__, _cpu())
        return hashlib.sha256(repr((_this_file(), *about, *variant)).encode()).hexdigest()[:32]

    def _compile(self, variant: Variant, path: Path) -> None:
        """Trace the layer, compile what was traced, and put it at `path` in one step. Raises UsageError."""
        logger.info("compiling the layers for %s into %s", variant, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = Path(folder) / path.name
                with torch.inference_mode(False), torch.no_grad():
                    inputs, sizes = self._example(variant)
                    traced = torch.export.export(Layer(self._config), inputs, dynamic_shapes=sizes)
                    # compiled headers are 140 MB of a cache that nobody empties, and save nothing here
                    settings = {"aot_inductor.precompile_headers": False}
                    torch._inductor.aoti_compile_and_package(traced, package_path=str(made), inductor_configs=settings)
                made.replace(path)
        except Exception as error:  # no compiler, no room on the disk, a torch that cannot
            first_line = str(error).strip().split("\n")[0]
            raise UsageError(
                "graphs=compiled: the layers cannot be compiled here, which takes a C++ compiler such as g++ and room "
                f"in {path.parent} ({type(error).__name__}: {first_line}); graphs=auto takes neither"
            ) from error

    def _example(self, variant: Variant) -> tuple[tuple, tuple]:
        """Inputs of `Layer` as this variant has them, and names of their sizes that are not fixed."""
        config, Dim = self._config, torch.export.Dim
        T, S, P = (Dim(name, min=2, max=MOST) for name in ("rows", "keys", "positions"))
        B: Any = Dim("sequences", min=2, max=MOST) if variant.several else 1
        R: Any = Dim("cache_rows", min=2, max=MOST) if variant.roomy else 1
        size = {T: 8, S: 160, P: 352, B: 3 if variant.several else 1, R: 5 if variant.roomy else 1}
        heads, D = config.num_key_value_heads, config.head_dim

        def given(*sizes: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[int, Any]]:
            """A tensor of these sizes, and those of them that have names."""
            named = {axis: each for axis, each in enumerate(sizes) if not isinstance(each, int)}
            return torch.zeros([size.get(each, each) for each in sizes], dtype=dtype), named

        angles = given(B if variant.apart else 1, T, 1, D)
        held, indices = given(R, P, heads, D), given(B, T, dtype=torch.long)
        mask: tuple[Any, Any] = (None, None)
        rows = mask
        if variant.mask is not None:
            by_sequence, by_row = variant.mask
            mask = given(B if by_sequence else 1, 1, T if by_row else 1, S, dtype=torch.bool)
        if variant.picked:
            rows = given(B, dtype=torch.long)
        weights = {name: parameter.detach() for name, parameter in self._layers[0].named_parameters()}
        pairs = (given(B, T, config.hidden_size), angles, angles, mask, held, held, indices, indices, rows, given(S, D))
        # a copy of each, since two inputs that are one tensor are traced as one
        inputs = tuple(None if tensor is None else tensor.clone() for tensor, _ in pairs)
        return (*inputs, weights), (*(sizes for _, sizes in pairs), {name: {} for name in weights})


def decoding_variants(several: bool) -> list[Variant]:
    """What forwards of decoding are, for the threads that are set: prefills, which stand at the same positions and have
    a mask by rows from their second block on, and block rows, which have one where sequences are unlike."""
    num_threads = torch.get_num_threads()
    found = [Variant(False, False, mask, False, False, num_threads) for mask in (None, (False, True))]
    if several:
        kinds = [(each.several, each.mask, each.apart) for each in found]
        kinds += [(True, None, False), (True, (False, True), False), (True, None, True), (True, (True, False), True)]
        found += [
            Variant(of_several, True, mask, apart, picked, num_threads)
            for of_several, mask, apart in kinds
            for picked in (False, True)
        ]
        # one that parts from others in mid-forward keeps what their mask says of it
        found.append(Variant(False, True, (False, False), False, True, num_threads))
    return found


def library_folder() -> Path:
    """Where libraries are kept: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_dllm" / "layers"


def _load(path: Path) -> Any:
    """A library, for one thread at a time. Raises RuntimeError for a file that is none."""
    # the loader itself: torch._inductor.aoti_load_package takes two seconds to import
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def _place(layer: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds a parameter, and its name there."""
    module, _, last = name.rpartition(".")
    return layer.get_submodule(module)._parameters, last


@functools.cache
def _this_file() -> str:
    return Path(__file__).read_text()


@functools.cache
def _cpu() -> tuple[str, ...]:
    """What machine code for this CPU may use."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), flags
