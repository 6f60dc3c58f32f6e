"""lm-evaluation-harness's view of a Fast-dLLM v2 model: the `LM` registered as `fast_dllm_v2`.

The adapter has four parts: a loaded model (decode/loaded.py), a generator of texts (generation.py), a scorer of
continuations (scoring.py), and the run's answers (run_answers.py). It says what the run is: its identity, its device.
"""

from __future__ import annotations

import copy
import logging
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from transformers import PreTrainedTokenizerBase

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decode.batching import AUTO, rows_that_fit
from fast_dllm.decode.experiments import Experiment
from fast_dllm.decode.loaded import LoadedModel
from fast_dllm.evaluate.generation import TextGenerator
from fast_dllm.evaluate.processes import Processes
from fast_dllm.evaluate.run_answers import RunAnswers
from fast_dllm.evaluate.scoring import Scorer
from fast_dllm.network.loading import model_source
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import render
from fast_dllm.record.cost import Cost
from fast_dllm.record.provenance import model_revision
from fast_dllm.record.shards import Shard
from fast_dllm.spec.hashes import decoding_sha256
from fast_dllm.spec.tasks import ROOT

logger = logging.getLogger(__name__)


@register_model("fast_dllm_v2")
class FastDLLM(TemplateLM):
    """Fast-dLLM v2 with an experiment's policy, under one set of model arguments."""

    def __init__(self, arguments: ModelArguments, *, chat_template: bool = False):
        """Load the model and join the processes of this evaluation.

        chat_template: whether prompts will be put into the tokenizer's chat template. Raises UsageError.
        """
        super().__init__()
        self.arguments = arguments
        # Computed when the code is loaded, because a file may be edited during a long run.
        self.decoding_sha256, self.scoring_sha256 = (decoding_sha256(ROOT, scored) for scored in (False, True))
        self.processes = Processes(arguments.device)
        self._rank, self._world_size = self.processes.rank, self.processes.count
        self.loaded = LoadedModel.load(
            arguments.model_path,
            self.processes.device,
            arguments.dtype,
            graphs=arguments.graphs,
            block_size=arguments.bd_size,
            several=arguments.batch_size != 1,
            chat_template=chat_template,
        )
        self._device = self.model.device
        self._has_templated = False  # whether lm_eval has asked for a prompt in the chat template
        self.model_revision = model_revision(model_source(arguments.model_path))
        self._begin_run()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> FastDLLM:
        """For lm_eval, where it makes the model itself: `simple_evaluate(model="fast_dllm_v2", model_args={...})`."""
        arguments = {**arg_dict, **(additional_config or {})}
        arguments.pop("max_batch_size", None)  # lm_eval always passes it; fast_dllm.decode.batching has its own bounds
        return cls(ModelArguments.parse(**arguments))

    def configured(self, arguments: ModelArguments) -> FastDLLM:
        """The same loaded model with other arguments of decoding, without answers and costs.

        Raises UsageError where they do not fit the model.
        """
        other = copy.copy(self)
        other.arguments = arguments
        other._begin_run()
        return other

    def _begin_run(self) -> None:
        arguments = self.arguments
        self.answers = RunAnswers(self.processes)
        self.generator = TextGenerator(self.loaded, arguments, self.answers, self.rows_of)
        self.scorer = Scorer(
            self.loaded,
            self.answers,
            mode=arguments.loglikelihood_mode,
            code_sha256=self.scoring_sha256,
            rows_of=self.rows_of,
        )
        self.generator.check()

    @property
    def model(self) -> FastDLLMForCausalLM:
        """The network."""
        return self.loaded.network

    @property
    def experiment(self) -> Experiment:
        return self.arguments.experiment

    @property
    def cost(self) -> Cost:
        """What this process's answers cost."""
        return self.answers.ledger.cost

    def rows_of(self, longest: int) -> int:
        """The batch size; with `auto`, sequences of `longest` positions that fit the device's memory."""
        if self.arguments.batch_size != AUTO:
            return int(self.arguments.batch_size)
        rows = rows_that_fit(self.model, longest, self.loaded.block_size)
        logger.warning("batch_size auto: %d sequences of up to %d positions at a time", rows, longest)
        return rows

    # ---- text and tokens, as lm_eval asks for them ------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.loaded.ids.stop

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.start_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._has_templated = True
        return render(self.tokenizer, chat_history, add_generation_prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, split where the text is split if a token boundary is there.

        lm_eval moves a context's trailing white space into the continuation. A chat prompt ends in a newline of its own
        token; moved, it would be the one masked token of reference mode, with the answer's letter visible behind it.
        """
        text_ids, context_ids = self.tok_encode(context + continuation), self.tok_encode(context)
        if text_ids[: len(context_ids)] == context_ids:
            return context_ids, text_ids[len(context_ids) :]
        return super()._encode_pair(context, continuation)

    # ---- answers ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of every request, in order."""
        if self.tokenizer.chat_template and not self._has_templated and self.rank == 0:
            logger.warning(
                "the tokenizer has a chat template, but the prompts do not use it: an instruct model may score about "
                "0; --apply_chat_template uses it"
            )
        texts = self.generator.texts(requests, quiet=disable_tqdm or self.rank != 0)
        self.answers.call_is_answered("generate_until")
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of every continuation, in order.

        lm_eval pads the lists of some processes with copies. They are neither scored nor counted again.
        """
        distinct = {id(instance): instance for instance in requests}
        scores = super().loglikelihood(list(distinct.values()), disable_tqdm=disable_tqdm)
        self.answers.call_is_answered("loglikelihood")
        by_id = dict(zip(distinct, scores, strict=True))
        return [by_id[id(instance)] for instance in requests]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """For lm_eval: scores of (texts, context ids, continuation ids) triples."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.scorer.of_continuations(pairs, quiet=disable_tqdm or self.rank != 0)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in order."""
        texts = [self.tok_encode(instance.args[0]) for instance in requests]
        totals = self.scorer.of_texts(texts, quiet=disable_tqdm or self.rank != 0)
        self.answers.call_is_answered("loglikelihood_rolling")
        return totals

    def keep_answers(
        self, folder: Path, claim: Path | None = None, shard: Shard | None = None, with_traces: bool = False
    ) -> None:
        """Keep every further answer in a folder: see RunAnswers.open_store."""
        self.answers.open_store(folder, self.identity(), claim, shard, with_traces)

    # ---- processes, as lm_eval asks for them -------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.processes.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        return self.processes.gather_object(obj, dst)

    def barrier(self) -> None:
        self.processes.barrier()

    # ---- what the run is ---------------------------------------------------------------------------------------

    def identity(self) -> dict[str, object]:
        """Everything that changes an answer."""
        arguments = self.arguments.as_dict()
        del arguments["show_speed"]
        return {
            **arguments,
            "model_revision": self.model_revision,
            "dtype": str(self.model.dtype),
            "device": self.device.type,
            "generation_code_sha256": self.experiment.policy_sha256,
            "decoding_sha256": self.decoding_sha256,
        }

    def code_hashes(self, scored: bool) -> dict[str, str]:
        """The hashes of the code that was loaded: what a token or, with `scored`, a log-likelihood depends on."""
        return {
            "generation_code_sha256": self.experiment.policy_sha256,
            "decoding_sha256": self.scoring_sha256 if scored else self.decoding_sha256,
        }

    def device_report(self) -> Mapping[str, Any]:
        """The device, graphs, the host's threads, and this process's peak memory: of the GPU or resident."""
        if self.device.type == "cuda":
            gpu, peak = torch.cuda.get_device_name(self.device), torch.cuda.max_memory_allocated(self.device)
        else:
            gpu, peak = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        graphs = self.arguments.graphs if self.model.execution else "off"
        about = {"gpu": gpu, "graphs": graphs, "num_threads": self.loaded.num_threads, "peak_memory_bytes": peak}
        return {"device": str(self.device), **about}
