"""lm_eval's real task definitions on made-up data, answered by a script instead of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

import eval as program
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decoding import DenoisingEvent, Generation
from fast_dllm.evaluate import options as options_module
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.evaluate.outcome import summary_of
from fast_dllm.record.cost import Cost


@dataclass
class Asked:
    """What reached the model: for a generated answer the prompt, for a scored one also the options, masks in ‹›."""

    prompt: str
    options: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.prompt + (" ".join(self.options) + "\n" if self.options else "")


class ScriptedLM(FastDLLM):
    """The adapter as it is, but `answer(prompt)` says what is generated, or which option is the likeliest."""

    def __init__(self, answer: Callable[[str], str], tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__(ModelArguments.parse(model_path="tiny", device="cpu"))
        self.answer = answer
        self.loaded.tokenizer = tokenizer or self.loaded.tokenizer
        planted = SimpleNamespace(denoise=self._planted, policy_sha256="0" * 64)
        self.arguments = self.generator.arguments = replace(self.arguments, experiment=planted)
        self.asked: dict[str, Asked] = {}

    def _planted(self, model, prompts: list[list[int]], **_) -> Iterator[DenoisingEvent]:
        del model
        for row, ids in enumerate(prompts):
            text = self.tokenizer.decode(ids)
            self.asked[text] = Asked(text)
            answer = Generation([*self.tok_encode(self.answer(text)), self.loaded.ids.stop], {"full": 1})
            yield DenoisingEvent(row, "full", 0, 0, [], [], [], generation=answer)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        del disable_tqdm
        scores = []
        for (_, option), context, continuation in requests:
            text, (masked, *seen) = self.tokenizer.decode(context), continuation
            asked = self.asked.setdefault(text, Asked(text))
            asked.options.append(f"‹{self.tokenizer.decode([masked])}›{self.tokenizer.decode(seen)}")
            scores.append((-1.0, True) if option == self.answer(text) else (-2.0, False))
        self.cost.add(Cost(scored_requests=len(requests), scored_tokens=len(requests), seconds_scoring=1.0))
        return scores


def run_planted(monkeypatch, lm: ScriptedLM, task: str, *options: str, num_fewshot: int = 0) -> tuple[dict, dict]:
    """(summary, samples by task) of eval.py's own path with this LM, in the settings that the scripts use."""
    given = ["--tasks", task, "--num_fewshot", str(num_fewshot), "--batch_size", "1", "--apply_chat_template"]
    given += ["--model", "fast_dllm_v2", "--fewshot_as_multiturn", "--model_args", "model_path=tiny,device=cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *given, *options])
    asked = options_module.read_command_line(sys.argv[1:])
    task_manager, _ = options_module.load_and_check_tasks(asked)
    results = program.evaluate(asked.config, task_manager, lm)
    samples = results.pop("samples")
    total = lm.answers.total()
    return asdict(summary_of("plain", results, samples, asked.config, lm, total, 0.0, 1.0)), samples
