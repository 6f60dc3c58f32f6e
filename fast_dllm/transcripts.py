"""What an experiment's frozen policy answers on the golden models, written once and replayed with today's engine.

    python -m fast_dllm.transcripts                   replay all (or those named), enter it in experiments/replays.json
    python -m fast_dllm.transcripts --write 09_mine   write experiments/09_mine/transcript.json, when it is frozen

A transcript holds the policy's SHA-256, some prompts, and for each configuration of the experiment's matrix its
decoding options and, for each golden model (tests/golden: the reference implementation's, 28 and 36 layers), every
prompt's tokens and forwards by kind. It speaks for greedy decoding in float32 on the CPU. So that it holds on every
CPU, the prompts are such that another rounding (float64) gives the same tokens. The record lists, by `decoding_sha256`,
which experiments' transcripts the code has given; `run.sh --status` reads it, which cannot replay.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_dllm.guard import one_line

# isort: split
import torch
from safetensors.torch import load_file

from fast_dllm.decode import experiments
from fast_dllm.errors import UsageError
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.spec.files import read_json, write_json, write_whole
from fast_dllm.spec.hashes import REPLAYS_FILE, decoding_sha256, replays
from fast_dllm.spec.matrix import defaults_of, effective_arguments, matrix_of

SCHEMA_VERSION = 1
TRANSCRIPT_FILE = "transcript.json"
GOLDEN = experiments.ROOT / "tests" / "golden"
GOLDEN_MODELS = ("tiny28", "tiny36")
SETTINGS = {"mask_id": 319, "stop_token": 2}  # of both
NEW_TOKENS = 64  # two blocks: a commit, and a block behind it
THRESHOLD = 0.6  # where a configuration names none: the golden models are seldom sure enough for 0.9
PROMPT_LENGTHS = (30, 60)  # the rest of a block, its commit, and a whole block; without a prefill and with one
MOST_DRAWS = 50
COMMAND = "python -m fast_dllm.transcripts"

Answers = list[dict[str, Any]]  # one a prompt: tokens, and the forwards of each kind that there were


def golden_model(name: str, **config_changes: Any) -> FastDLLMForCausalLM:
    """A golden model in float32 on the CPU. Raises UsageError where its files are not there."""
    try:
        config = json.loads((GOLDEN / f"{name}.config.json").read_text())
        weights = load_file(GOLDEN / f"{name}.safetensors")
    except OSError as error:
        raise UsageError(f"no golden model {name} in {GOLDEN}, where the repository has it: {error}") from None
    model = FastDLLMForCausalLM(FastDLLMConfig(**config | config_changes))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise UsageError(f"{GOLDEN / name}.safetensors is not the model of its configuration")
    return model.eval()


def configurations(experiment: experiments.Experiment) -> dict[str, dict[str, Any]]:
    """Configuration of the experiment's matrix -> its decoding options, with NEW_TOKENS and THRESHOLD as above."""
    root = experiments.EXPERIMENTS.parent
    matrix, defaults = matrix_of(experiment.name, root), defaults_of(experiment.name, root)
    by_name = {}
    for name in matrix.names:
        overrides = {} if "threshold" in matrix.configurations[name] else {"threshold": THRESHOLD}
        arguments: dict[str, Any] = effective_arguments(matrix, name, overrides, defaults)
        options = {key: value for key, value in arguments.items() if key in experiment.knobs}
        options["max_new_tokens"] = min(arguments["max_new_tokens"], NEW_TOKENS)
        if arguments["bd_size"] is not None:
            options["block_size"] = arguments["bd_size"]
        by_name[name] = options
    return by_name


def answers(
    experiment: experiments.Experiment,
    model: FastDLLMForCausalLM,
    prompts: Sequence[list[int]],
    options: Mapping[str, Any],
) -> Answers:
    return [
        {"tokens": each.tokens, "forwards": {kind: count for kind, count in each.forwards.items() if count}}
        for each in experiment.generate(model, prompts, **SETTINGS, **options)
    ]


def _draw_prompts(
    experiment: experiments.Experiment, models: Mapping[str, FastDLLMForCausalLM], options: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Prompts whose tokens do not hang on how a sum is rounded, in any configuration and on any of the models."""
    doubled = {name: golden_model(name).double() for name in models}
    prompts = []
    for length in PROMPT_LENGTHS:
        for seed in range(MOST_DRAWS):
            rng = random.Random(f"{length} {seed}")
            prompt = [rng.randrange(3, 318) for _ in range(length)]
            if all(
                answers(experiment, models[name], [prompt], each) == answers(experiment, doubled[name], [prompt], each)
                for each in options
                for name in models
            ):
                prompts.append(prompt)
                break
        else:
            raise UsageError(f"{experiment.name}: none of {MOST_DRAWS} prompts has the same answers in float64")
    return prompts


def transcript_of(experiment: experiments.Experiment, golden_parity: bool) -> dict[str, Any]:
    """What today's engine answers. golden_parity: the experiment claims the golden cases (tests/test_golden.py)."""
    by_name = configurations(experiment)
    models = {name: golden_model(name) for name in GOLDEN_MODELS}
    distinct = list({json.dumps(options, sort_keys=True): options for options in by_name.values()}.values())
    prompts = _draw_prompts(experiment, models, distinct)
    return {
        "schema_version": SCHEMA_VERSION,
        "policy_sha256": experiment.policy_sha256,
        "golden_parity": golden_parity,
        "prompts": prompts,
        "configurations": {
            name: {
                "options": options,
                "answers": {which: answers(experiment, model, prompts, options) for which, model in models.items()},
            }
            for name, options in by_name.items()
        },
    }


def read_transcript(name: str) -> dict[str, Any]:
    """An experiment's transcript. Raises UsageError, with the command that writes it where it is missing."""
    where = f"experiments/{name}/{TRANSCRIPT_FILE}"
    content, fault = read_json(experiments.EXPERIMENTS / name / TRANSCRIPT_FILE)
    if fault:
        raise UsageError(f"{where} is not valid JSON, {fault}")
    if content is None:
        raise UsageError(f"{where} is missing; {COMMAND} --write {name} writes it, once the experiment is frozen")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{where} has schema version {content.get('schema_version')!r}, not {SCHEMA_VERSION}")
    return content


def claims_golden_parity(name: str) -> bool:
    return (experiments.EXPERIMENTS / name / TRANSCRIPT_FILE).exists() and bool(read_transcript(name)["golden_parity"])


def check_frozen(experiment: experiments.Experiment, transcript: Mapping[str, Any]) -> None:
    """Raises UsageError where the policy or the matrix is no longer what the transcript was written of."""
    again = f"put it back, or, where it is another experiment now: {COMMAND} --write {experiment.name}"
    if transcript["policy_sha256"] != experiment.policy_sha256:
        raise UsageError(f"experiments/{experiment.name}: its text is not the one of its transcript; {again}")
    if {name: each["options"] for name, each in transcript["configurations"].items()} != configurations(experiment):
        raise UsageError(f"experiments/{experiment.name}: its matrix is not the one of its transcript; {again}")


def differences(
    experiment: experiments.Experiment,
    transcript: Mapping[str, Any],
    models: Mapping[str, FastDLLMForCausalLM],
    chosen: Collection[str] | None = None,
) -> list[str]:
    """One line for each answer that today's engine gives otherwise, of the configurations `chosen` (default: all)."""
    lines = []
    for name in transcript["configurations"] if chosen is None else chosen:
        written = transcript["configurations"][name]
        for which, model in models.items():
            expected = written["answers"][which]
            answered = answers(experiment, model, transcript["prompts"], written["options"])
            for index, (now, was) in enumerate(zip(answered, expected, strict=True)):
                what = [key for key in ("tokens", "forwards") if now[key] != was[key]]
                if what:
                    change = f"{what[0]} {now[what[0]]}, were {was[what[0]]}"
                    lines.append(f"{experiment.name}, {name} on {which}, prompt {index}: {change}")
    return lines


def replay(names: Sequence[str]) -> list[str]:
    """Replay transcripts; the differences, none where all are given again. Raises UsageError (see `check_frozen`)."""
    models = {name: golden_model(name) for name in GOLDEN_MODELS}
    lines = []
    for name in names:
        experiment, transcript = experiments.load(name), read_transcript(name)
        check_frozen(experiment, transcript)
        lines += differences(experiment, transcript, models)
    return lines


def record(names: Sequence[str], *, anew: bool = False) -> None:
    """Enter the experiments under today's decoding hash; anew: the transcripts are new, earlier entries are void."""
    root = experiments.EXPERIMENTS.parent
    replayed = {
        sha256: [name for name in listed if not (anew and name in names)] for sha256, listed in replays(root).items()
    }
    today = decoding_sha256(experiments.ROOT)
    replayed[today] = sorted({*replayed.get(today, ()), *names})
    content = {"schema_version": 1, "replayed": {sha256: listed for sha256, listed in replayed.items() if listed}}
    write_json(root / REPLAYS_FILE, content)


def write(name: str, golden_parity: bool, force: bool) -> Path:
    """Write an experiment's transcript and record it. Raises UsageError where one of this text is there already."""
    experiment = experiments.load(name)
    path = experiments.EXPERIMENTS / name / TRANSCRIPT_FILE
    if path.exists() and not force and read_transcript(name)["policy_sha256"] == experiment.policy_sha256:
        raise UsageError(f"experiments/{name} has its transcript; --force writes what today's engine answers instead")
    text = json.dumps(transcript_of(experiment, golden_parity), indent=1)
    numbers = re.compile(r"\[[\d,\s]+\]|\{[^{}\[\]]+\}")  # lists and plain objects: a line each
    text = numbers.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    write_whole(path, (text + "\n").encode())
    record([name], anew=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="*", help="those to replay; default: all")
    parser.add_argument("--write", metavar="EXPERIMENT", help="write its transcript instead")
    parser.add_argument("--golden_parity", action="store_true", help="with --write: it claims the golden cases")
    parser.add_argument("--force", action="store_true", help="with --write: over a transcript of this very text")
    options = parser.parse_args()
    try:
        if options.write:
            if options.experiment:
                raise UsageError("--write takes one experiment, and none is replayed beside it")
            print(f"wrote {write(options.write, options.golden_parity, options.force)}")
            return 0
        names = options.experiment or experiments.available()
        lines = replay(names)
        if lines:
            print("\n".join(lines))
            print(f"{len(lines)} answers differ; nothing is recorded", file=sys.stderr)
            return 1
        record(names)
        print(f"replayed {', '.join(names)}; recorded in {REPLAYS_FILE}")
        return 0
    except UsageError as error:
        print(f"transcripts: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with one_line():
        sys.exit(main())
