"""Loads a checkpoint into a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from fast_dllm.errors import DataError, UsageError, line_of
from fast_dllm.network.config import FastDLLMConfig, read_config
from fast_dllm.network.devices import default_dtype, pick_device, pick_dtype
from fast_dllm.network.memory import check_fits
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.spec.checkpoint import INDEX_FILE, read_object, weight_files

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")  # safetensors' names; other kinds need more than a conversion
TINY_MODEL = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"


def model_source(path_or_hub_id: str) -> str:
    """The folder of the embedded model for `tiny`; any other name is returned unchanged."""
    return str(TINY_MODEL) if path_or_hub_id == "tiny" else path_or_hub_id


def loading_error(part: str, path_or_hub_id: str, error: BaseException) -> DataError | UsageError:
    """The error to raise when a part of a checkpoint cannot be loaded: DataError if only a network is missing.

    part: "model" or "the tokenizer of". error: why. A hub that does not answer says nothing about the user's input.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return DataError(
                f"cannot load {part} {path_or_hub_id!r}: the hub does not answer, and the local cache does not have "
                f"it; where there is a network: bash sbatch/prefetch.sh --model {path_or_hub_id}"
            )
        cause = cause.__cause__
    return UsageError(f"cannot load {part} {path_or_hub_id!r}: {line_of(error)}")


def load_model(path_or_hub_id: str, device: str = "auto", dtype: str = "auto") -> FastDLLMForCausalLM:
    """Load a checkpoint by its tensor names, tensor by tensor to the device.

    `path_or_hub_id`: a folder, a hub id, or `tiny` (the embedded model). Raises UsageError where there is no such
    checkpoint, it is of another model type or damaged, its weights do not fit into the device's free memory, or a
    tensor is missing, extra or of the wrong shape, and DataError where the hub does not answer. Weights are downloaded
    only once the configuration says that they fit. Memory for them is taken only once the configuration and the headers
    of the weight files agree.
    """
    source = model_source(path_or_hub_id)
    target = pick_device(device)
    try:
        config = read_config(source)
        number_format = pick_dtype(dtype, target)
        with torch.device("meta"):
            shape = FastDLLMForCausalLM(config, randomise=False)
        check_fits(shape, target, number_format)
        files = _weight_files(source)
        faults = _weight_faults(shape, files)
        if faults:
            more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
            raise UsageError(f"it {faults[0]}{more}")
        with target, default_dtype(number_format):
            model = FastDLLMForCausalLM(config, randomise=False)
        model.requires_grad_(False)
        _read_weights(model, files)
    except (OSError, SafetensorError, ValueError) as error:
        raise loading_error("model", path_or_hub_id, error) from error
    model.eval()
    return model.fuse() if target.type == "cuda" else model  # slower for wide layers on a CPU (docs/performance.md)


def _weight_faults(model: FastDLLMForCausalLM, files: Sequence[str]) -> list[str]:
    """Compare the tensors of these files with the model, by their headers alone. Returns a phrase for each fault.

    Raises OSError, SafetensorError.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unexpected, unfit, seen = set(expected) - model.tied_names, [], [], set()
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
                if name in model.tied_names:
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
    except OSError:  # there is no index
        return [_file_of(source, "model.safetensors")]
    assert index is not None, "an absent file is an OSError"
    return [_file_of(source, name) for name in weight_files(read_object(Path(index)))]


def _file_of(source: str, name: str) -> str:
    path = cached_file(source, name)
    assert path is not None, "an absent file is an OSError"
    return path


AutoConfig.register(FastDLLMConfig.model_type, FastDLLMConfig)
