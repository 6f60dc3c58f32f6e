"""What the files of a checkpoint must say before anything is loaded: its config.json and its index of weight files.

The network (fast_dllm/network) computes one thing: Qwen2.5's layers with full attention, plain rotary positions and
unquantised weights. A field of config.json that asks for something else is refused here and never ignored. What loads
a model and what submits jobs call the same functions. Nothing here changes what the network computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec.files import read_json

MODEL_TYPE = "Fast_dLLM_Qwen"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MOST_JSON_BYTES = 16 * 2**20  # config.json and the index of the published 7B have 2 kB and 30 kB

# field -> the largest whole number that is taken for a size; each is far above any published model's
MOST_OF = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
    "max_position_embeddings": 2**24,
    "bd_size": 2**16,
}
# Without one of these the weights do not say which network they are of.
REQUIRED = ("model_type", *(name for name in MOST_OF if name != "bd_size"), "rms_norm_eps", "tie_word_embeddings")

# field -> the values of it that the network computes; None is for a field that is null
ONLY: Mapping[str, tuple] = {
    "model_type": (MODEL_TYPE,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (True, False),
    "single_turn": (True, False),
    "use_sliding_window": (False, None),
    "attention_bias": (True, None),  # the query, key and value projections have biases
    "qkv_bias": (True, None),
    "mlp_bias": (False, None),
    "use_mrope": (False, None),
    "use_qk_norm": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None,),
    **dict.fromkeys(("dtype", "torch_dtype"), ("bfloat16", "float16", "float32", None)),
}
# Fields that change nothing here: labels, training, settings of generation, and those of attention that is not used.
WITHOUT_EFFECT = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "conplemenrary_mask", "eos_token_id",
    "initializer_range", "max_window_layers", "pad_token_id", "sliding_window", "transformers_version", "use_cache",
}  # fmt: skip
ROPE_FIELDS = ("rope_parameters", "rope_scaling")  # transformers 5's name, and the older one
CHECKED = {"head_dim", "layer_types", "rms_norm_eps", "rope_theta", *MOST_OF, *ONLY, *ROPE_FIELDS}


def read_object(path: Path) -> dict:
    """The JSON object in a checkpoint's file of at most MOST_JSON_BYTES. Raises UsageError."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path.name} is no file")
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise UsageError(f"{path.name} has {size:,} bytes; more than {MOST_JSON_BYTES:,} are not read")
    content, fault = read_json(path)
    if content is None:
        raise UsageError(f"{path.name} is not a JSON object: {fault}")
    return content


def config_fault(fields: Mapping[str, Any]) -> str:
    """Why the network does not compute what these fields of config.json describe; "" where it does.

    Absent fields are no fault here, see `missing_fields`.
    """
    faults = (
        *(_size_fault(name, fields[name], most) for name, most in MOST_OF.items() if name in fields),
        *(_choice_fault(name, fields[name], valid) for name, valid in ONLY.items() if name in fields),
        *(_number_fault(name, fields[name]) for name in ("rms_norm_eps", "rope_theta") if name in fields),
        *(_rope_fault(name, fields[name], fields.get("rope_theta")) for name in ROPE_FIELDS if name in fields),
    )
    return next(filter(None, faults), "") or _relation_fault(fields) or _layer_types_fault(fields)


def missing_fields(fields: Mapping[str, Any]) -> list:
    """Names of fields that a config.json must have and `fields` lacks, without which a default would be guessed."""
    missing = [name for name in REQUIRED if name not in fields]
    tables = [fields[name] for name in ROPE_FIELDS if isinstance(fields.get(name), dict)]
    if not any("rope_theta" in table for table in (fields, *tables)):
        missing.append("rope_theta (or rope_parameters with a rope_theta)")
    return missing


def weight_files(index: Mapping[str, Any]) -> list:
    """Names of the files that an index of weights lists, which must be files beside it. Raises UsageError."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{INDEX_FILE}: weight_map must be an object of tensor names and file names")
    for name in shards.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise UsageError(f"{INDEX_FILE}: {name!r:.80} is not the name of a .safetensors file in the same folder")
    return sorted(set(shards.values()))


def _size_fault(name: str, value: object, most: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return ""
    return f"{name} must be a whole number from 1 to {most}, not {value!r:.80}"


def _choice_fault(name: str, value: object, valid: tuple) -> str:
    if isinstance(value, (bool, int, float, str, type(None))) and value in valid:
        return ""
    choices = " or ".join("null" if each is None else repr(each) for each in valid)
    return f"{name} {value!r:.80} is not supported; the network has {choices}"


def _number_fault(name: str, value: object) -> str:
    least, most = (0, 1) if name == "rms_norm_eps" else (1, 1e15)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
        return ""
    return f"{name} must be a number from {least} to {most:g}, not {value!r:.80}"


def _rope_fault(name: str, table: object, theta: object) -> str:
    """What is wrong with the object of RoPE's parameters. The network uses its base (rope_theta) and scales nothing."""
    if table is None:
        return ""
    if not isinstance(table, dict):
        return f"{name} must be an object with rope_theta and rope_type, not {table!r:.80}"
    kind = table.get("rope_type", table.get("type", "default"))
    if kind != "default":
        return f"{name}: RoPE scaling of type {kind!r:.80} is not supported; the network has 'default'"
    unknown = sorted(set(table) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"})
    if unknown:
        return f"{name}: {unknown[0]!r:.80} is not supported; RoPE has rope_theta and the rope_type 'default'"
    if table.get("partial_rotary_factor", 1) != 1:
        return f"{name}: partial_rotary_factor must be 1, the network turns whole heads"
    if "rope_theta" not in table:
        return ""
    if fault := _number_fault("rope_theta", table["rope_theta"]):
        return f"{name}: {fault}"
    if theta is not None and theta != table["rope_theta"]:
        return f"rope_theta is {theta!r:.80} and {table['rope_theta']!r:.80} in {name}; they must be equal"
    return ""


def _relation_fault(fields: Mapping[str, Any]) -> str:
    """Which sizes do not fit together. The sizes in `fields` are whole numbers."""
    hidden, heads, kv_heads = (
        fields.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if hidden is None or heads is None or kv_heads is None:
        return ""
    if hidden % heads or heads % kv_heads:
        return (
            f"hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {kv_heads} must each divide "
            "the one before"
        )
    size = hidden // heads
    if size % 2:
        return f"hidden_size / num_attention_heads is {size}; RoPE turns pairs, so it must be even"
    if fields.get("head_dim") not in (None, size):
        return f"head_dim {fields['head_dim']!r:.80} is not supported; the network has hidden_size / heads, here {size}"
    return ""


def _layer_types_fault(fields: Mapping[str, Any]) -> str:
    kinds, depth = fields.get("layer_types"), fields.get("num_hidden_layers")
    if kinds is None:
        return ""
    if not isinstance(kinds, (list, tuple)) or any(kind != "full_attention" for kind in kinds):
        return "layer_types must be a list of 'full_attention', the only kind of attention that the network has"
    if depth is not None and len(kinds) != depth:
        return f"layer_types has {len(kinds)} entries for {depth} layers (num_hidden_layers)"
    return ""
