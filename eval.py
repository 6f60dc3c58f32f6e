"""Evaluate a Fast-dLLM v2 model: register `fast_dllm_v2`, run lm-evaluation-harness's command line, write the summary.

    accelerate launch --quiet eval.py --model fast_dllm_v2 --tasks gsm8k --num_fewshot 0 --batch_size 1 \
        --apply_chat_template --fewshot_as_multiturn --model_args "model_path=tiny,threshold=0.9" \
        --output_path results/mine/

The options are lm_eval's own (`python eval.py run --help`), and one more: `--configurations k1_first,k2_last` evaluates
these one after the other with one loaded model, each into a folder of its own in --output_path; the first that fails
ends it. `--shard i/N` (i from 0) answers that share of the questions into the run's answer store and ends without a
summary; as many such processes as wanted, on as many machines as see the folder, and the same command without --shard
afterwards answers what is missing and writes the summary. Exit status: 0 with results.json and summary.json in
--output_path (where one is given; of a share, done.json in shards/i-of-N/); 2 after one line for bad input, with
nothing evaluated; anything else is a failure. accelerate ends with 1 instead; without its --quiet it prints a traceback
of its own after eval.py's line.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.disable()  # until the first question: looking for garbage among what is being imported takes a fifth of the start

# lm_eval options that would write or send results by another way than results.json and summary.json.
UNSUPPORTED = ("wandb_args", "trackio_args", "hf_hub_log_args", "use_cache", "cache_requests", "predict_only")

NO_MATTER = ("show_speed", "batch_size", "device", "graphs")  # change no answer


def take_own_options(words: list[str], num_processes: int):
    """(the names of --configurations, the Shard of --shard or None, the words for lm_eval). Raises UsageError."""
    from fast_dllm.record.shards import Shard

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--configurations", metavar="C[,C]")
    parser.add_argument("--shard", metavar="i/N")
    given, rest = parser.parse_known_args(words)
    share = None if given.shard is None else Shard.parse(given.shard, num_processes)
    names = given.configurations.split(",") if given.configurations is not None else []
    return list(dict.fromkeys(names)), share, rest


def refuse(message: str) -> NoReturn:
    from fast_dllm.errors import UsageError

    raise UsageError(f"{message}; `python eval.py run --help` tells the options")


def read_options():
    """(lm_eval's EvaluatorConfig, the model arguments given), as far as they can be checked without the tasks.

    Ends the program where another command than `run` is asked for, as lm_eval does. Raises UsageError.
    """
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from fast_dllm.errors import UsageError, line_of
    from fast_dllm.guard import check_folder

    cli = HarnessCLI()
    for parser in (cli._parser, *cli._subparsers.choices.values()):
        parser.error = refuse  # a line of eval.py's, without lm_eval's usage before it
    namespace = cli.parse_args()
    if getattr(namespace, "command", None) != "run":
        cli.execute(namespace)
        sys.exit(0)
    for name in UNSUPPORTED:
        if getattr(namespace, name, None):
            raise UsageError(f"eval.py does not support --{name}; it writes results.json and summary.json itself")
    explicit_device = getattr(namespace, "device", None)
    try:
        config = EvaluatorConfig.from_cli(namespace)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(line_of(error)) from error
    if config.model != "fast_dllm_v2":
        raise UsageError(f"unknown model {config.model!r}; eval.py evaluates --model fast_dllm_v2")
    if config.output_path and Path(config.output_path).suffix in (".json", ".jsonl"):
        raise UsageError(f"--output_path must be a folder, not {config.output_path!r}")
    if namespace.output_path == "":
        raise UsageError("--output_path is empty; it names the folder for the results")
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise UsageError(f"--num_fewshot must be at least 0, not {config.num_fewshot}")
    if config.limit is not None and not 0 < config.limit < math.inf:
        raise UsageError(f"--limit must be above 0, not {config.limit:g}")
    given = {"batch_size": config.batch_size, "device": explicit_device, **config.model_args}
    given.pop("trust_remote_code", None)  # lm_eval's option concerns data sets; the model has no remote code
    if config.output_path:
        check_folder("--output_path", Path(config.output_path))
    return config, given


def load_and_check_tasks(config, given: dict, num_processes: int):
    """(TaskManager, the model arguments given as a ModelArguments). `config` gets the tasks' resolved names.

    The tasks and their data are loaded here: what is wrong with them is said before the model is loaded. Raises
    UsageError, and DataError for a task whose data cannot be had.
    """
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.errors import UsageError
    from fast_dllm.evaluate import task_checks
    from fast_dllm.evaluate.task_loading import find_tasks, load_tasks, prepare
    from fast_dllm.spec.tasks import TASKS

    parsed = ModelArguments.parse(**given)  # before the tasks are looked for, which takes longer

    known = f"{', '.join(TASKS)} (docs/experiments.md, Tasks) or another of lm_eval's"
    if not any(config.tasks):
        raise UsageError(f"no task given; --tasks takes {known}")
    try:
        task_manager = find_tasks(config)
    except ValueError as error:
        raise UsageError(f"{error}; --tasks takes {known}") from None
    task_manager = prepare(
        task_manager, config.tasks, confirm_run_unsafe_code=config.confirm_run_unsafe_code, seed=config.seed[0]
    )
    tasks = load_tasks(task_manager, config.tasks)
    if config.num_fewshot:
        task_checks.check_examples(tasks, config.num_fewshot)
    if config.samples:
        config.samples = task_checks.check_samples(tasks, config.samples)
    task_checks.check_generation(tasks, config.gen_kwargs or {}, parsed.knobs["max_new_tokens"])
    if num_processes > 1:
        task_checks.check_processes(tasks, num_processes, config.limit, config.samples)
    return task_manager, parsed


def variants(names: list[str], given: dict, plain, config):
    """(name of the run, its ModelArguments) for each of --configurations: what is given beats the configuration, and
    stands in the name, which may say so itself (`k2_middle+threshold=0.8`). Without any, the one that the arguments
    make, `plain`. Raises UsageError."""
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.spec.matrix import arguments_of, defaults_of, folder_name, matrix_of, parse_folder
    from fast_dllm.spec.tasks import TASKS

    if not names:
        return [(plain.config_name, plain)]
    experiment = plain.experiment_name
    matrix, defaults = matrix_of(experiment, ROOT), defaults_of(experiment, ROOT)
    task = TASKS.get(str(config.tasks[0])) if len(config.tasks) == 1 else None
    changed = {name: plain.as_dict()[name] for name in given if name in defaults and given[name] is not None}
    if task is not None and config.num_fewshot is not None:
        defaults["num_fewshot"], changed["num_fewshot"] = task.num_fewshot, config.num_fewshot
    own = {key: value for key, value in given.items() if value is not None}
    runs = []
    for folder in names:
        name, changes = parse_folder(folder)
        num_fewshot = {key: changes.pop(key) for key in ("num_fewshot",) if key in changes}  # lm_eval's own option
        arguments = ModelArguments.parse(plain.experiment, **arguments_of(matrix, name, defaults) | own | changes)
        runs.append((folder_name(matrix, name, {**num_fewshot, **changed, **changes}, defaults), arguments))
    return runs


def evaluate(config, task_manager, lm) -> dict | None:
    """lm_eval's results with samples on the first process, None on the others."""
    from lm_eval import simple_evaluate

    return simple_evaluate(
        model=lm,
        model_args=config.model_args,
        tasks=config.tasks,
        num_fewshot=config.num_fewshot,
        batch_size=lm.arguments.batch_size,
        device=str(lm.device),
        limit=config.limit,
        samples=config.samples,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=True,  # kept in memory: the summary counts them
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=config.gen_kwargs,
        task_manager=task_manager,
        random_seed=config.seed[0],
        numpy_random_seed=config.seed[1],
        torch_random_seed=config.seed[2],
        fewshot_random_seed=config.seed[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )


def given_to_lm_eval(config, lm) -> dict:
    """Everything that can change an answer or a score of a run, by the names that a Summary gives it."""
    from fast_dllm.record.summary import AS_THE_SCRIPTS_RUN

    limit = None if config.limit is None else int(config.limit) if config.limit == int(config.limit) else config.limit
    given = {
        "experiment": lm.arguments.experiment_name or "active",
        "task": ",".join(task_names(config)),
        "limit": limit,
        "model_args": lm.arguments.as_dict(),
        "num_fewshot": config.num_fewshot,
        "chat_template": bool(config.apply_chat_template),
        "fewshot_as_multiturn": bool(config.fewshot_as_multiturn),
        "system_instruction": config.system_instruction or None,
        "gen_kwargs": config.gen_kwargs or None,
        "samples": config.samples or None,
        "seeds": config.seed,
        "model_revision": lm.model_revision,
        "generation_code_sha256": lm.experiment.policy_sha256,
    }
    assert given.keys() >= AS_THE_SCRIPTS_RUN.keys()
    return given


def task_names(config) -> list[str]:
    """The tasks' own names, also of one that was given by the path of its YAML file."""
    names = []
    for task in config.tasks:
        if isinstance(task, dict):
            task = task["task"] if isinstance(task.get("task"), str) else task.get("group")
        names.append(str(task))
    return names


def summary_of(name: str, found: dict, samples: dict, config, lm, total, began: float, loaded: float):
    """The Summary of a finished run. total: the answers.Ledger of all that answered it."""
    from fast_dllm.record import provenance
    from fast_dllm.record.scores import scores
    from fast_dllm.record.summary import Summary
    from fast_dllm.record.throughput import throughput

    samples_scored = {task: len({sample["doc_id"] for sample in rows}) for task, rows in samples.items()}
    expected = sum(int(count["effective"]) for task, count in found["n-samples"].items() if task in samples_scored)
    given = given_to_lm_eval(config, lm)
    by_name = scores(found, samples_scored)
    whole = by_name.pop(given["task"], None)  # None for several tasks at once: they have no accuracy together
    return Summary(
        config=name,
        num_samples=sum(samples_scored.values()),
        num_samples_expected=expected,
        accuracy=whole.accuracy if whole else None,
        accuracy_stderr=whole.stderr if whole else None,
        metric=whole.metric if whole else None,
        subtasks=by_name,
        throughput=throughput(total.cost, total.wall_seconds, total.batch_sizes),
        num_processes=lm.world_size,
        num_shares=total.num_shards,
        num_segments=total.num_segments,
        num_layers=lm.model.config.num_hidden_layers,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        seconds_loading=loaded - began,
        start_time=provenance.timestamp(began),
        end_time=provenance.timestamp(time.time()),
        **given | lm.code_hashes(scored=bool(total.cost.scored_requests)),
        **lm.device_report(),
        **provenance.code_state(),
        **provenance.environment(),
    )


def write_results(folder: Path, found: dict, samples: dict, summary, policy: bytes, log_samples: bool) -> None:
    """results.json, the policy's text, the samples where asked for, and last of all summary.json, which marks the run
    complete."""
    import json

    from lm_eval.utils import handle_non_serializable

    from fast_dllm.record import questions
    from fast_dllm.spec.files import write_json, write_whole
    from fast_dllm.spec.matrix import GENERATION_FILE

    found["samples_sha256"] = questions.write(folder, *questions.collect(samples, found))
    write_json(folder / "results.json", found, default=handle_non_serializable)
    write_whole(folder / GENERATION_FILE, policy)
    if log_samples:
        for task, rows in samples.items():
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            write_whole(folder / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    summary.write(folder)


def check_result_there(folder: Path, config, lm) -> None:
    """Raises UsageError where `folder` has a result of something else, which this run would write over."""
    from fast_dllm.errors import UsageError
    from fast_dllm.record.summary import SUMMARY_FILE, SummaryError, read_summary

    try:
        summary = read_summary(folder / SUMMARY_FILE)
    except SummaryError as error:
        raise UsageError(
            f"--output_path: {str(folder)!r} holds a summary.json that cannot be read ({error}); name another folder "
            "or move it"
        ) from None
    if summary is None:
        return
    given = given_to_lm_eval(config, lm)
    del given["experiment"]  # the model arguments name it
    changed = summary.other_identity(given, NO_MATTER)
    if changed:
        raise UsageError(
            f"--output_path: {str(folder)!r} holds a result of another run ({', '.join(changed)}); name another folder "
            "or move it"
        )


def claim_on(folder: Path) -> Path | None:
    """The claim that the calling script holds on `folder` (spec/locks.py); None where no script called."""
    claims = map(Path, filter(None, os.environ.get("FAST_DLLM_CLAIMS", "").split(":")))
    return {claim.parent: claim for claim in claims}.get(folder)


def run(name: str, config, task_manager, lm, folder: Path | None, began: float, loaded: float) -> None:
    """One evaluation, called `name`, from the first question to its files in `folder`."""
    from lm_eval.utils import make_table

    from fast_dllm.record.shards import check_nobody_at_work, discard

    if folder:
        check_nobody_at_work(folder)
        lm.keep_answers(folder, claim=claim_on(folder))
    found = evaluate(config, task_manager, lm)
    if folder:
        lm.answers.store.check_claim()
    total = lm.answers.total()
    if lm.rank != 0:
        return
    if found is None:
        sys.exit("eval.py: lm_eval returned no results")
    samples = found.pop("samples")
    summary = summary_of(name, found, samples, config, lm, total, began, loaded)
    if folder:  # written before anything is shown: whatever happens to the terminal, the result is there
        write_results(folder, found, samples, summary, lm.experiment.text, config.log_samples)
        lm.answers.store.discard()
        discard(folder)
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    if folder:
        print(f"wrote {folder / 'summary.json'}", flush=True)


def run_share(share, config, task_manager, lm, folder: Path) -> None:
    """Answer one share of a run: its answers are in the store afterwards, and done.json says so."""
    from fast_dllm.errors import UsageError
    from fast_dllm.record.shards import ShardAnswered, check_run_is_free, claim_shard, request_kinds
    from fast_dllm.spec.files import write_json
    from fast_dllm.spec.shares import DONE_FILE, share_folder

    check_run_is_free(folder)
    own = share_folder(folder, share.name)
    given, made = claim_on(own), None
    if given is None and lm.rank == 0:
        made = claim_shard(own)
        given = made.path
    lm.barrier()  # the claim is there before any process looks who is at work
    lm.keep_answers(folder, claim=given, share=share)
    original = task_manager.load

    def load(tasks):
        loaded = original(tasks)
        lm.answers.end_after(request_kinds(task.OUTPUT_TYPE for task in loaded["tasks"].values()))
        return loaded

    task_manager.load = load
    try:
        evaluate(config, task_manager, lm)
        raise UsageError("--shard: the tasks asked for no answers")
    except ShardAnswered:
        pass
    finally:
        task_manager.load = original
    lm.answers.store.check_claim()
    lm.answers.store.close()
    lm.barrier()  # the others' answers are on disk too
    if lm.rank == 0:
        model = {"model_path": lm.arguments.model_path, "answers": lm.answers.store.key}
        write_json(own / DONE_FILE, {"schema_version": 1, **model, **lm.code_hashes(scored=False)})
        print(f"share {share.name} is answered; the same command without --shard finishes the run", flush=True)
    if made:
        made.release()


def main() -> None:
    from lm_eval.utils import setup_logging

    from fast_dllm.errors import UsageError
    from fast_dllm.evaluate.hub import use_cache_without_network
    from fast_dllm.spec.launch import launched_processes

    began = time.time()
    logging.disable(logging.WARNING)  # of a mistake nothing but its line is told
    num_processes = launched_processes()
    configurations, share, sys.argv[1:] = take_own_options(sys.argv[1:], num_processes)
    config, given = read_options()
    is_offline = use_cache_without_network()
    task_manager, parsed = load_and_check_tasks(config, given, num_processes)  # imports torch
    runs = variants(configurations, given, parsed, config)
    if share and not config.output_path:
        raise UsageError("--shard needs --output_path: the answers are kept there")
    logging.disable(logging.NOTSET)
    setup_logging()
    if is_offline:
        logging.getLogger("eval").warning("the hub cannot be reached; what is in its local cache is used")
    from fast_dllm.evaluate.harness import FastDLLM

    lm = FastDLLM(runs[0][1], chat_template=bool(config.apply_chat_template))
    models = [lm.configured(arguments) for _, arguments in runs]  # all are checked before the first one answers
    loaded = time.time()
    gc.freeze()
    gc.enable()
    output = Path(config.output_path) if config.output_path else None
    folders = [output / name if output and configurations else output for name, _ in runs]
    for folder, model in zip(folders, models, strict=True):
        if folder and lm.rank == 0:
            check_result_there(folder, config, model)
    for number, ((name, _), model) in enumerate(zip(runs, models, strict=True), 1):
        if configurations and lm.rank == 0:
            print(f"== {name} ({number} of {len(runs)})", flush=True)
        if number > 1:
            began = loaded = time.time()
        folder = folders[number - 1]
        if share and folder:  # a share without a folder was refused above
            run_share(share, config, task_manager, model, folder)
        else:
            run(name, config, task_manager, model, folder, began, loaded)
    lm.processes.leave()


if __name__ == "__main__":
    from fast_dllm.guard import one_line

    with one_line():
        main()
