"""Loads an experiment by its name: its policy, knobs and text. An unknown name is an error, never a fallback."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fast_dllm import decoding
from fast_dllm.decode.decoding_run import Prompt
from fast_dllm.decode.engine import Engine, row_generators
from fast_dllm.decode.loaded import LoadedModel
from fast_dllm.decoding import DecodeOne, DenoisingEvent, Generation, Options
from fast_dllm.errors import UsageError
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.spec.matrix import GENERATION_FILE, NAME

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERIMENTS = ROOT / "experiments"
REQUIRED = ("mask_id", "stop_token")  # options that come from the tokenizer


@dataclass(frozen=True)
class Experiment:
    """A loaded policy.

    name: of the experiment, None for the active file. text: the file's content when it was loaded. subset_layers: the
    policy's rule (layer_subset, num_layers) -> layers, None if it has none.
    """

    name: str | None
    path: Path
    options_type: type[Options]
    decode_one: DecodeOne = field(repr=False)
    text: bytes = field(repr=False)
    subset_layers: Callable[[str, int], range] | None = field(default=None, repr=False)

    @property
    def policy_sha256(self) -> str:
        return sha256(self.text).hexdigest()

    @property
    def knobs(self) -> dict[str, object]:
        """Every option that a model argument may set, with its default."""
        return {each.name: each.default for each in fields(self.options_type) if each.name not in REQUIRED}

    @property
    def model_arguments(self) -> dict[str, object]:
        """The knobs that a model argument of the same name sets. The block's size is the argument bd_size."""
        return {name: default for name, default in self.knobs.items() if name != "block_size"}

    def subset(self, knobs: Mapping[str, Any], num_layers: int) -> range:
        """The layers that the knob `layer_subset` names by the policy's rule. Raises ValueError as the rule does.

        They are none if the policy has no rule or the knob is not set.
        """
        name = knobs.get("layer_subset")
        return range(0) if name is None or self.subset_layers is None else self.subset_layers(name, num_layers)

    def check(self, knobs: Mapping[str, Any]) -> None:
        """Raise UsageError for values that no model can decode with. The model's depth is checked later."""
        try:
            self.options_type(mask_id=-1, stop_token=-2, **knobs).check()
        except ValueError as error:
            raise UsageError(str(error)) from None

    def denoise(
        self,
        model: FastDLLMForCausalLM | LoadedModel,
        prompts: Sequence[list[int] | str],
        *,
        temperature: float = 0.0,
        top_p: float = 0.95,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_rows: int | None = None,
        **options: Any,
    ) -> Iterator[DenoisingEvent]:
        """The events of `generate` as they happen; closing the iterator stops the work at the next forward."""
        network = model.network if isinstance(model, LoadedModel) else model
        if isinstance(model, LoadedModel):
            sizes = {"mask_id": model.ids.mask, "stop_token": model.ids.stop, "block_size": model.block_size}
            options = sizes | options
        token_ids = [_token_ids(prompt, model) for prompt in prompts]
        engine = Engine(
            network, self.decode_one, self._options(options), num_rows=num_rows, temperature=temperature, top_p=top_p
        )
        generators = row_generators(generator, len(prompts), temperature)
        return engine.run([Prompt(*each) for each in zip(token_ids, generators, strict=True)])

    def generate(
        self, model: FastDLLMForCausalLM | LoadedModel, prompts: Sequence[list[int] | str], **settings: Any
    ) -> list[Generation]:
        """Answer every prompt; one Generation each, in order. Knobs that are not given have their defaults.

        model: a LoadedModel, or a network alone with mask_id and stop_token. prompts: lists of token ids of any
        lengths, or texts, which are put into the chat template of a LoadedModel. settings: what `denoise` takes, and
        the experiment's knobs. The answer runs up to its first stop token, at most through absolute block len(prompt)
        // block_size + max_new_tokens // block_size (exclusive). temperature 0 is greedy; generator: see
        engine.row_generators. num_rows: sequences decoded side by side (default: all); the others are admitted as rows
        become free. Raises ValueError for arguments out of range, NonFiniteError for logits that are no numbers.
        """
        events = self.denoise(model, prompts, **settings)
        finished = {event.row: event.generation for event in events if event.generation is not None}
        return [finished[row] for row in range(len(prompts))]

    def _options(self, values: Mapping[str, Any]) -> Options:
        """Options with these values by name, and defaults for the others. Raises UsageError."""
        for name in values:
            if name not in self.knobs and name not in REQUIRED:
                raise UsageError(f"{short_name(self.path)} takes no {name!r}; it takes: {', '.join(self.knobs)}")
        for name in REQUIRED:
            if name not in values:
                raise UsageError(f"a network without its tokenizer needs {name}; fast_dllm.load_model gives both")
        return self.options_type(**values)


def _token_ids(prompt: list[int] | str, model: FastDLLMForCausalLM | LoadedModel) -> list[int]:
    """Token ids of a prompt. A text needs a LoadedModel, which has the tokenizer; else raises UsageError."""
    if not isinstance(prompt, str):
        return prompt
    if not isinstance(model, LoadedModel):
        raise UsageError("a text needs a model with its tokenizer, which fast_dllm.load_model gives")
    return model.encode_message(prompt)


def available() -> list[str]:
    """Names under experiments/ that have generation code."""
    names = (path.parent.name for path in EXPERIMENTS.glob(f"*/{GENERATION_FILE}"))
    return sorted(name for name in names if NAME.fullmatch(name))


def generation_file(name: str | None) -> Path:
    """The file of an experiment, or the active top-level one for None. Raises UsageError listing those that exist."""
    if name is None:
        return ROOT / GENERATION_FILE
    choices = ", ".join(available()) or "none"
    if not NAME.fullmatch(str(name)) or not (EXPERIMENTS / str(name)).is_dir():
        raise UsageError(f"unknown experiment {name!r}; there are: {choices}")
    path = EXPERIMENTS / name / GENERATION_FILE
    if not path.is_file():
        raise UsageError(f"experiment {name!r} has no {GENERATION_FILE}; experiments that have: {choices}")
    return path


def short_name(path: Path) -> str:
    """The short name of a policy's file in messages."""
    return path.name if path.parent == ROOT else f"{path.parent.name}/{path.name}"


def load(name: str | None) -> Experiment:
    """Import experiments/<name>/generation_functions.py (None: the active file) and check that it keeps the contract.

    Raises UsageError for an unknown name, a missing file, or a file without an `Options` of the right kind or a
    `decode_one(answer, options)`. An exception of the code itself passes through.
    """
    path = generation_file(name)
    text = path.read_bytes()
    module_name = "fast_dllm_generation_" + ("active" if name is None else re.sub(r"\W", "_", name))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    exec(compile(text, str(path), "exec"), module.__dict__)  # the text that is hashed, even if the file is edited now
    options_type, decode_one = getattr(module, "Options", None), getattr(module, "decode_one", None)
    if not (isinstance(options_type, type) and issubclass(options_type, decoding.Options)):
        raise UsageError(f"{short_name(path)} has no class Options(decoding.Options) with the experiment's knobs")
    unset = [each.name for each in fields(options_type) if each.default is MISSING and each.name not in REQUIRED]
    if unset:
        raise UsageError(f"Options in {short_name(path)} gives {', '.join(unset)} no default")
    if not inspect.isgeneratorfunction(decode_one):
        raise UsageError(f"{short_name(path)} has no generator function decode_one(answer, options)")
    if list(inspect.signature(decode_one).parameters) != ["answer", "options"]:
        raise UsageError(f"decode_one in {short_name(path)} must take (answer, options), as fast_dllm.decoding says")
    return Experiment(name, path, options_type, decode_one, text, getattr(module, "subset_layers", None))
