"""The Fast-dLLM v2 network (arXiv 2509.26328): a Qwen2.5 decoder with block-causal attention and a static cache.

Tensor axes
    B batch, T query rows, S keys, H query heads, K key/value heads, G = H // K, D head size, C hidden, V vocabulary.

Two conventions set this network apart from a causal one:
    block-causal attention  a query in block i attends every key whose block is <= i: both ways inside a block of
                            `bd_size` absolute positions, causally between blocks.
    token shift             the logits at position p predict the token at p + 1, so the prediction for a masked
                            position p is read at p - 1.

Decoding runs it over a cache: fast_dllm.network.executor has the moves, and eager.py runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from fast_dllm.errors import UsageError, line_of
from fast_dllm.network.cache import Attend, KVCache, block_causal_mask, mask_for_heads, rope_tables
from fast_dllm.network.config import FastDLLMConfig, read_config
from fast_dllm.network.executor import Execution
from fast_dllm.network.kernels import gate, rms_norm, rotate
from fast_dllm.spec.checkpoint import INDEX_FILE, read_object, weight_files

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")  # safetensors' names; other kinds need more than a conversion
TINY_MODEL = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: random values are the whole network's (`_randomise`), and a checkpoint needs none."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing, as above."""


class Fused:
    """Several linear layers of one input as one product, their weights being views of the fused one.

    So there is no second copy, and the layers keep their names and can be run by themselves. Where one of them has got
    another weight since (it was moved or replaced), or gradients are wanted, `fits` says no.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        with torch.no_grad():
            self.weight = torch.cat([linear.weight for linear in linears])
            self.bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
            for linear, part in zip(linears, self.weight.split(self.sizes), strict=True):
                linear.weight.data = part
            if self.bias is not None:
                for linear, part in zip(linears, self.bias.split(self.sizes), strict=True):
                    linear.bias.data = part
        self.places = self._places()

    def _places(self) -> list[int]:
        tensors = [linear.weight for linear in self.linears]
        if self.bias is not None:
            tensors += [linear.bias for linear in self.linears]
        return [tensor.data_ptr() for tensor in tensors]

    def fits(self) -> bool:
        return not torch.is_grad_enabled() and self._places() == self.places

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: FastDLLMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim, bias=True)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.v_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.fused: Fused | None = None

    def fuse(self) -> None:
        self.fused = Fused((self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        if self.fused is not None and self.fused.fits():
            queries_keys, values = self.fused(x).view(B, T, H + 2 * K, D).split((H + K, K), dim=2)
        else:
            queries_keys = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, H + K, D)
            values = self.v_proj(x).view(B, T, K, D)
        queries, keys = rotate(queries_keys, attend.cos, attend.sin).split((H, K), dim=2)
        keys, values = attend.keys_and_values(self.layer, keys, values)
        # The G query heads that share a key head become more query rows, so keys and values are never repeated.
        queries = queries.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G * T, D)
        out = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attend.mask)
        out = out.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused: Fused | None = None

    def fuse(self) -> None:
        self.fused = Fused((self.gate_proj, self.up_proj))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None and self.fused.fits():
            gates, up = self.fused(x).chunk(2, dim=-1)
        else:
            gates, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate(gates, up))


class DecoderLayer(nn.Module):
    def __init__(self, config: FastDLLMConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def mlp_share(self) -> float:
        """The share of the layer's weights that its MLP has."""
        of_mlp, of_layer = (sum(each.numel() for each in module.parameters()) for module in (self.mlp, self))
        return of_mlp / of_layer

    def attention(self, x: Tensor, attend: Attend) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), attend)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.attention(x, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class FastDLLMModel(nn.Module):
    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attend: Attend) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C)."""
        return self.norm(self.run_layers(self.embed(input_ids), attend, range(len(self.layers))))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> hidden rows (B, T, C) that enter the first layer, in `hidden_dtype`."""
        return self.embed_tokens(input_ids).to(self.hidden_dtype)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """dtype of the hidden rows between layers, the sum of what all layers before have added.

        That of the weights, but float32 for float16 weights: a few channels of Qwen2-like models reach 2e4 and more,
        and float16 ends at 65504. Projections and keys and values stay in float16.
        """
        dtype = self.embed_tokens.weight.dtype
        return torch.float32 if dtype == torch.float16 else dtype

    def hidden_like(self) -> Tensor:
        """An empty tensor (0, C) with the dtype and device of hidden rows."""
        weight = self.embed_tokens.weight
        return weight.new_empty((0, weight.shape[1]), dtype=self.hidden_dtype)

    def run_layers(self, x: Tensor, attend: Attend, layers: range) -> Tensor:
        """Hidden rows (B, T, C) through some of the layers."""
        for index in layers:
            x = self.layers[index](x, attend)
        return x


class Logits(NamedTuple):
    """What a forward without a cache gives: logits (B, R, V)."""

    logits: Tensor


class FastDLLMForCausalLM(nn.Module):
    """The network with its language-model head, and the cached moves that block diffusion is made of.

    A new one has random weights, or with `randomise` False whatever stood in memory. It is no transformers model, whose
    base class takes four seconds to import; fast_dllm.pretrained has that form.
    """

    def __init__(self, config: FastDLLMConfig, *, randomise: bool = True):
        super().__init__()
        self.config = config
        self.execution: Execution | None = None  # how its forwards are run; None: module by module
        self.build(config)
        if randomise:
            self.apply(self._randomise)

    def build(self, config: FastDLLMConfig) -> None:
        """Make the modules, the head's weight being the embedding's where the configuration ties them."""
        self.model = FastDLLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _randomise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def fuse(self) -> FastDLLMForCausalLM:
        """Let each layer compute q, k and v in one product and gate and up in one, in the weights' own memory, a layer
        at a time. Values to within float32's rounding."""
        for module in self._fusible():
            module.fuse()
        return self

    def _fusible(self) -> Iterator[Attention | MLP]:
        return (module for module in self.modules() if isinstance(module, (Attention, MLP)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastDLLMForCausalLM:
        """As nn.Module's, for `.to` and the like. What depends on the weights' addresses is made anew."""
        was_fused = any(module.fused for module in self._fusible())
        for module in self._fusible():
            module.fused = None
        super()._apply(fn, recurse)
        if self.execution is not None:
            self.execution.forget()
        return self.fuse() if was_fused else self

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def save_pretrained(self, folder: str | Path, max_shard_size: str | int = "50GB") -> None:
        """Write config.json and the weights as `load_model` reads them, in shards of at most `max_shard_size`."""
        self.config.architectures = [FastDLLMForCausalLM.__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items() if name not in self._tied_names}
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)

    @property
    def _tied_names(self) -> set[str]:
        """Tensors that a checkpoint need not hold."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_size: int | None = None,
        rows: Tensor | None = None,
    ) -> Logits:
        """Logits without a cache.

        input_ids (B, T); position_ids (B, T) or (T,), default 0..T-1; attention_mask (T, T) or (B, T, T) bool,
        True = may attend, default block-causal with blocks of `block_size` (default `config.bd_size`); `rows` (B, R)
        picks the rows whose logits are wanted, default all. Returns logits (B, T or R, V).
        """
        B, T = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = torch.arange(T, device=device)
        if attention_mask is None:
            attention_mask = block_causal_mask(T, T, block_size or self.config.bd_size, device)
        mask = mask_for_heads(attention_mask, self.config)
        cos, sin = rope_tables(position_ids, self.config, self.dtype)
        hidden = self.model(input_ids, Attend(cos.unsqueeze(-2), sin.unsqueeze(-2), mask))
        if rows is not None:
            hidden = hidden[torch.arange(B, device=device)[:, None], rows]
        return Logits(self.lm_head(hidden))

    def new_cache(self, batch_size: int, max_length: int, block_size: int | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of at most `max_length` positions."""
        block_size = block_size or self.config.bd_size
        if max_length > self.config.max_position_embeddings:
            raise UsageError(
                f"prompt and answer need {max_length} positions, the model has {self.config.max_position_embeddings}"
            )
        return KVCache(self.config, batch_size, max_length, block_size, like=self.lm_head.weight)

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer, with its type (ModuleList does not say what it holds)."""
        layer = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first CUDA GPU where there is one, else the CPU. Raises UsageError for one that is not there."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; valid ones: auto, cpu, cuda, cuda:N") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} is not there; this machine has {torch.cuda.device_count()} CUDA GPUs")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 from compute capability 8.0, float16 on 7.x, float32 otherwise and on the CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32


def model_source(path_or_hub_id: str) -> str:
    """`tiny` is the embedded model's folder; anything else stays as it is."""
    return str(TINY_MODEL) if path_or_hub_id == "tiny" else path_or_hub_id


def load_model(path_or_hub_id: str, device: str = "auto", dtype: str = "auto") -> FastDLLMForCausalLM:
    """Load a checkpoint by its tensor names, tensor by tensor to the device.

    `path_or_hub_id`: a folder, a hub id, or `tiny` (the embedded model). Raises UsageError where there is no such
    checkpoint, it is of another model type or damaged, or a tensor is missing, extra or of the wrong shape. Memory for
    the weights is taken only once the configuration and the headers of the weight files agree.
    """
    source = model_source(path_or_hub_id)
    target = pick_device(device)
    try:
        config = read_config(source)
        files = _weight_files(source)
        with torch.device("meta"):
            faults = _weight_faults(FastDLLMForCausalLM(config, randomise=False), files)
        if faults:
            more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
            raise UsageError(f"it {faults[0]}{more}")
        with target, default_dtype(pick_dtype(dtype, target)):
            model = FastDLLMForCausalLM(config, randomise=False)
        model.requires_grad_(False)
        _read_weights(model, files)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"cannot load model {path_or_hub_id!r}: {line_of(error)}") from error
    model.eval()
    return model.fuse() if target.type == "cuda" else model  # on a CPU wide layers are slower so (docs/performance.md)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have `dtype` unless another is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _weight_faults(model: FastDLLMForCausalLM, files: Sequence[str]) -> list[str]:
    """What is wrong with the tensors that these files have for the model, a phrase each, from their headers alone.

    Raises OSError, SafetensorError.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unexpected, unfit, seen = set(expected) - model._tied_names, [], [], set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                header = file.get_slice(name)
                shape, dtype = header.get_shape(), header.get_dtype()
                missing.discard(name)
                if name not in expected:
                    unexpected.append(f"has an unexpected tensor {name}")
                elif shape != expected[name]:
                    unfit.append(f"has {name} of shape {shape} instead of {expected[name]}")
                elif dtype not in WEIGHT_DTYPES:
                    unfit.append(f"has {name} as {dtype}; weights must be one of {', '.join(WEIGHT_DTYPES)}")
                elif name in seen:
                    unfit.append(f"has {name} in two files")
                seen.add(name)
    return [f"lacks tensor {name}" for name in sorted(missing)] + sorted(unexpected) + sorted(unfit)


def _read_weights(model: FastDLLMForCausalLM, files: Sequence[str]) -> None:
    """Fill the model from files without faults. Raises UsageError where a tied head is not the embedding, OSError,
    SafetensorError."""
    tensors = model.state_dict()
    heads = []
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name in model._tied_names:
                    heads.append(file.get_tensor(name))
                else:
                    tensors[name].copy_(file.get_tensor(name))
    embedding = model.model.embed_tokens.weight
    for head in heads:
        if not torch.equal(head.to(embedding), embedding):
            raise UsageError("config.json: tie_word_embeddings is true, but lm_head.weight differs from the embedding")


def _weight_files(source: str) -> list[str]:
    """The safetensors files of a folder or hub id: one, or all that an index names. Raises OSError, UsageError."""
    try:
        index = cached_file(source, INDEX_FILE)
    except OSError:  # it has none
        return [_file_of(source, "model.safetensors")]
    assert index is not None, "an absent file is an OSError"
    return [_file_of(source, name) for name in weight_files(read_object(Path(index)))]


def _file_of(source: str, name: str) -> str:
    path = cached_file(source, name)
    assert path is not None, "what is not there is an OSError"
    return path


AutoConfig.register(FastDLLMConfig.model_type, FastDLLMConfig)
