"""Evaluate a Fast-dLLM v2 model: register `fast_dllm_v2`, run lm-evaluation-harness's command line, write the summary.

    accelerate launch --quiet eval.py --model fast_dllm_v2 --tasks gsm8k --num_fewshot 0 --batch_size 1 \
        --apply_chat_template --fewshot_as_multiturn --model_args "model_path=tiny,threshold=0.9" \
        --output_path results/mine/

The options are lm_eval's own (`python eval.py run --help`), and three more: `--configurations k1_first,k2_last`
evaluates these one after the other with one loaded model, each into a folder of its own in --output_path; the first
that fails ends it. `--shard i/N` (i from 0) answers that shard of the questions into the run's answer store and ends
without a summary; as many such processes as wanted, on as many machines as see the folder, and the same command without
--shard afterwards answers what is missing and writes the summary. `--traces` also writes traces.jsonl.gz, what each
denoising step saw and did (docs/traces.md). Exit status: 0 with results.json and summary.json in --output_path (where
one is given; of a shard, done.json in shards/i-of-N/); 2 after one line for bad input, with nothing evaluated; anything
else is a failure. accelerate ends with 1 instead; without its --quiet it prints a traceback of its own after eval.py's
line.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    from fast_dllm.evaluate.harness import FastDLLM
    from fast_dllm.record.shards import Shard

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.disable()  # until the first question: looking for garbage among what is being imported takes a fifth of the start


def evaluate(config: EvaluatorConfig, task_manager: TaskManager, lm: FastDLLM) -> dict[str, Any] | None:
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


def claim_on(folder: Path) -> Path | None:
    """The claim that the calling script holds on `folder` (spec/locks.py); None where no script called."""
    claims = map(Path, filter(None, os.environ.get("FAST_DLLM_CLAIMS", "").split(":")))
    return {claim.parent: claim for claim in claims}.get(folder)


def run(
    name: str,
    config: EvaluatorConfig,
    task_manager: TaskManager,
    lm: FastDLLM,
    folder: Path | None,
    began: float,
    loaded: float,
    with_traces: bool = False,
) -> None:
    """One evaluation, called `name`, from the first question to its files in `folder`.

    began, loaded: Unix times of the start and of the model being ready. with_traces: keep each answer's steps.
    """
    from lm_eval.utils import make_table

    from fast_dllm.evaluate.outcome import summary_of, write_results, write_traces
    from fast_dllm.record.shards import check_nobody_at_work, discard

    if folder:
        check_nobody_at_work(folder)
        lm.keep_answers(folder, claim=claim_on(folder), with_traces=with_traces)
    results = evaluate(config, task_manager, lm)
    store = lm.answers.store
    if store:
        store.check_claim()
    total = lm.answers.total()
    if lm.rank != 0 or total is None:
        return
    if results is None:
        sys.exit("eval.py: lm_eval returned no results")
    samples = results.pop("samples")
    summary = summary_of(name, results, samples, config, lm, total, began, loaded)
    if folder and store:  # written before anything is shown: whatever happens to the terminal, the result is there
        write_traces(folder, name, summary, lm)
        costs = lm.answers.question_costs(total)
        write_results(folder, results, samples, summary, lm.experiment.text, config.log_samples, costs)
        store.discard()
        discard(folder)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if folder:
        print(f"wrote {folder / 'summary.json'}", flush=True)


def run_shard(
    shard: Shard,
    config: EvaluatorConfig,
    task_manager: TaskManager,
    lm: FastDLLM,
    run_folder: Path,
    with_traces: bool = False,
) -> None:
    """Answer one shard of a run: its answers are in the run's store afterwards, and done.json says so."""
    from fast_dllm.errors import UsageError
    from fast_dllm.record.shards import ShardAnswered, check_run_is_free, claim_shard, request_kinds
    from fast_dllm.spec.files import write_json
    from fast_dllm.spec.shard_names import DONE_FILE, shard_folder

    check_run_is_free(run_folder)
    folder = shard_folder(run_folder, shard.name)
    claim, claim_of_this_process = claim_on(folder), None
    if claim is None and lm.rank == 0:
        claim_of_this_process = claim_shard(folder)
        claim = claim_of_this_process.path
    lm.barrier()  # the claim is there before any process looks who is at work
    lm.keep_answers(run_folder, claim=claim, shard=shard, with_traces=with_traces)
    load_tasks = task_manager.load

    def load_and_note_kinds(names):
        loaded = load_tasks(names)
        lm.answers.end_after(request_kinds(task.OUTPUT_TYPE for task in loaded["tasks"].values()))
        return loaded

    task_manager.load = load_and_note_kinds
    try:
        evaluate(config, task_manager, lm)
        raise UsageError("--shard: the tasks asked for no answers")
    except ShardAnswered:
        pass
    finally:
        task_manager.load = load_tasks
    store = lm.answers.store
    assert store is not None, "keep_answers opened it"
    store.check_claim()
    store.close()
    lm.barrier()  # the others' answers are on disk too
    if lm.rank == 0:
        model = {"model_path": lm.arguments.model_path, "answers": store.key}
        write_json(folder / DONE_FILE, {"schema_version": 1, **model, **lm.code_hashes(scored=False)})
        print(f"shard {shard.name} is answered; the same command without --shard finishes the run", flush=True)
    if claim_of_this_process:
        claim_of_this_process.release()


def main() -> None:
    from lm_eval.utils import setup_logging

    from fast_dllm.evaluate.hub import use_cache_without_network
    from fast_dllm.evaluate.options import load_and_check_tasks, read_command_line, runs_of

    began = time.time()
    logging.disable(logging.WARNING)  # a mistake is told in its line and nothing else
    options = read_command_line(sys.argv[1:])
    is_offline = use_cache_without_network()
    task_manager, plain = load_and_check_tasks(options)  # imports torch
    runs = runs_of(options, plain)
    logging.disable(logging.NOTSET)
    setup_logging()
    if is_offline:
        logging.getLogger("eval").warning("the hub cannot be reached; what is in its local cache is used")
    from fast_dllm.evaluate.harness import FastDLLM
    from fast_dllm.evaluate.outcome import check_no_other_result

    config = options.config
    lm = FastDLLM(runs[0][1], chat_template=bool(config.apply_chat_template))
    models = [lm.configured(arguments) for _, arguments in runs]  # all are checked before the first one answers
    loaded = time.time()
    gc.freeze()
    gc.enable()
    output = Path(config.output_path) if config.output_path else None
    folders = [output / name if output and options.configurations else output for name, _ in runs]
    for folder, model in zip(folders, models, strict=True):
        if folder and lm.rank == 0:
            check_no_other_result(folder, config, model)
    for number, ((name, _), model, folder) in enumerate(zip(runs, models, folders, strict=True), 1):
        if options.configurations and lm.rank == 0:
            print(f"== {name} ({number} of {len(runs)})", flush=True)
        if number > 1:
            began = loaded = time.time()
        if options.shard and folder:  # a shard without a folder was refused
            run_shard(options.shard, config, task_manager, model, folder, options.traces)
        else:
            run(name, config, task_manager, model, folder, began, loaded, options.traces)
    lm.processes.leave()


if __name__ == "__main__":
    from fast_dllm.guard import one_line

    with one_line():
        main()
