"""Checks of the model: its files, here or on the hub, and the number of its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from fast_dllm.doctor.disks import existing
from fast_dllm.doctor.situation import GIB, Finding, Situation
from fast_dllm.errors import UsageError
from fast_dllm.spec.checkpoint import CONFIG_FILE, INDEX_FILE, config_fault, read_object, weight_files
from fast_dllm.spec.files import read_json

MODEL_SPACE = 20 * GIB  # what sbatch/prefetch.sh asks for: 15 GB of weights, and data sets


def missing_model_files(folder: Path) -> list[str]:
    """What a checkpoint's folder lacks: configuration, tokenizer, weights (of a sharded one every shard)."""
    index = folder / INDEX_FILE
    weights = []
    if index.is_file():
        try:
            weights = weight_files(read_object(index))
        except UsageError as error:
            return [f"a usable index of its weights ({error})"]
    names = [CONFIG_FILE, "tokenizer_config.json", *(weights or ["model.safetensors"])]
    missing = [name for name in names if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json or vocab.json")
    return missing


def damaged_model_files(folder: Path) -> list[str]:
    """The faults of the files that exist: invalid JSON, weights with fewer or more bytes than their header counts."""
    faults = []
    for name in (CONFIG_FILE, "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content, fault = read_json(path)
            faults += [f"{name} is not valid JSON: {fault}"] if content is None else []
    return faults + [
        f"{path.name} {fault}"
        for path in sorted(folder.glob("*.safetensors"))
        if path.is_file() and (fault := fault_of_weights(path))
    ]


def fault_of_weights(path: Path) -> str:
    """Why a safetensors file is damaged; "" if it is not.

    Its first eight bytes give the header's length. The header gives the end of each tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is cut off: {size:,} bytes, its header alone takes {8 + length:,}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return "has no readable header"
    expected = 8 + length + max(ends, default=0)
    if size == expected:
        return ""
    return f"is {'cut off' if size < expected else 'too long'}: {size:,} bytes of {expected:,}"


def check_model(situation: Situation) -> Iterator[Finding]:
    folder, model = situation.model_folder, situation.model
    missing = missing_model_files(folder)
    if damaged := damaged_model_files(folder):
        more = f" (and {len(damaged) - 1} more faults)" if len(damaged) > 1 else ""
        yield Finding("fail", f"model {model}: {damaged[0]}{more}, in {folder}; remove it and fetch it again")
        return
    config, _ = read_json(folder / CONFIG_FILE)
    if config and (fault := config_fault(config)):
        yield Finding("fail", f"model {model}: {CONFIG_FILE}: {fault}")
        return
    if not missing:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        yield Finding("ok", f"model {model}: whole, {size / 1e9:.2f} GB of weights in {folder}")
        return
    lacks = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    fetch = f"bash sbatch/prefetch.sh --model {model}"
    if not situation.is_hub_model:
        yield Finding("fail", f"model {model}: {folder} lacks {lacks}")
    elif situation.offline:
        yield Finding("fail", f"model {model}: {folder} lacks {lacks}; HF_HUB_OFFLINE is set; online: {fetch}")
    else:
        free = shutil.disk_usage(existing(situation.hub_cache)).free
        if free < MODEL_SPACE:
            need = f"{MODEL_SPACE // GIB} GiB are needed in {situation.hub_cache}, {free / GIB:.1f} are free"
            yield Finding("fail", f"model {model}: not in the cache yet; {need}; set HF_HOME to a larger disk")
        elif situation.reach:
            yield situation.reach("model", model)
        else:
            yield Finding("warn", f"model {model}: the first job downloads it; {fetch} does it now")


def weight_count(situation: Situation) -> int | None:
    """How many weights the model has, from its configuration alone; None if that is not known.

    Where the doctor may ask the hub, a configuration that is not in the cache yet is downloaded (2 kB).
    """
    import torch

    from fast_dllm.network.config import read_config
    from fast_dllm.network.memory import num_weights
    from fast_dllm.network.model import FastDLLMForCausalLM

    folder = situation.model_folder
    if (folder / CONFIG_FILE).is_file():
        source = str(folder)
    elif situation.is_hub_model and situation.reach:
        source = situation.model
    else:
        return None  # check_model says what is missing
    try:
        config = read_config(source)
    except (UsageError, OSError):
        return None  # check_model says what is wrong
    with torch.device("meta"):
        return num_weights(FastDLLMForCausalLM(config, randomise=False))
