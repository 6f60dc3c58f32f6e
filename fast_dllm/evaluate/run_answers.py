"""The answers of one evaluation: those of earlier processes, those of this one, and which requests it answers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fast_dllm.evaluate.processes import Processes
from fast_dllm.record.answers import AnswerStore
from fast_dllm.record.batches import BatchRecord, Ledger, combined
from fast_dllm.record.cost import Cost
from fast_dllm.record.shards import Plan, Shard, ShardAnswered
from fast_dllm.record.traces import TraceWriter
from fast_dllm.spec.shard_names import shard_folder

logger = logging.getLogger(__name__)


class RunAnswers:
    """Answers by request key. In memory, and after `open_store` also in a folder, where they outlive the process.

    ledger: what this process answered, and its cost without loading the model. store: None without a folder. plan:
    which requests belong to this process's shard; None if it answers the whole run. question_keys: (task, number of
    the question) -> the key of its request; after `total`, those of all processes. traces: writes the steps of each new
    answer; None if they are not kept.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.ledger = Ledger()
        self.store: AnswerStore | None = None
        self.plan: Plan | None = None
        self.question_keys: dict[tuple[str, int], str] = {}
        self.traces: TraceWriter | None = None
        self._kinds_left: set[str] = set()

    def open_store(
        self,
        folder: Path,
        identity: Mapping[str, object],
        claim: Path | None = None,
        shard: Shard | None = None,
        with_traces: bool = False,
    ) -> None:
        """Keep every further answer in `folder`, and use those that a run of the same identity has kept there.

        identity: everything that can change an answer. claim: see AnswerStore; once it is gone, `keep` raises
        TakenOverError. shard: the part of each call's requests that this process answers. with_traces: keep the steps
        of each answer beside it.
        """
        name = None if shard is None else shard.name
        records = shard_folder(folder, name)
        rank = self.processes.rank
        self.store = AnswerStore(folder, identity, rank=rank, claim=claim, shard=name, records=records)
        if shard is not None:
            self.plan = Plan.of(self.store.folder, folder, shard)
        if with_traces:
            self.traces = TraceWriter(self.store)
        if self.store.num_recovered:
            logger.warning("continuing: %d answers of an interrupted run found", self.store.num_recovered)

    def is_answered(self, key: str) -> bool:
        return self.store is not None and key in self.store

    def known(self, keys: Iterable[str], of_run: int | None = None) -> dict[str, Any]:
        """The answers to `keys` that an earlier process has kept.

        of_run: the number of requests of the whole run in this call; a shard's progress is shown against it.
        """
        if self.store is None:
            return {}
        keys = list(keys)
        self.store.expect(keys, None if self.plan is None else of_run)
        return {key: self.store[key] for key in keys if key in self.store}

    def of_this_shard(self, costs: Mapping[str, float]) -> Collection[str]:
        """The keys that this process answers, of those of one call. costs: of each key, in any unit."""
        return costs.keys() if self.plan is None else self.plan.keys_of_shard(costs)

    def keep(
        self,
        new: Mapping[str, Any],
        cost: Cost,
        costs: Mapping[str, Cost] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Add a batch's answers. With a store they outlive the process when this returns.

        cost: of the batch as a whole. costs: of single answers. batch_size: by default the number of answers. Raises
        TakenOverError, and OSError where the disk takes no more.
        """
        if self.store is not None:
            self.store.append(new, cost, costs, batch_size)
        self.ledger.add(BatchRecord.ending_now(new, cost, costs, batch_size))

    def end_after(self, kinds: Iterable[str]) -> None:
        """For a shard: raise ShardAnswered once lm_eval has asked for all these kinds of requests.

        After them lm_eval scores, which needs the answers of every shard.
        """
        self._kinds_left = set(kinds)

    def call_is_answered(self, kind: str) -> None:
        """Note that all requests of one call of lm_eval are answered. Raises ShardAnswered as `end_after` says."""
        if self._kinds_left:
            self._kinds_left.discard(kind)
            if not self._kinds_left:
                raise ShardAnswered

    def question_costs(self, total: Ledger) -> dict[tuple[str, int], Cost]:
        """(task, number of the question) -> what its answer cost, where that was recorded."""
        return {place: total.costs[key] for place, key in self.question_keys.items() if key in total.costs}

    def total(self) -> Ledger | None:
        """The answers and costs of all processes and all segments of the run, on the first process; None on the others.

        An answer that two processes gave counts once.
        """
        gathered_keys = self.processes.gather_object(self.question_keys)
        gathered = self.processes.gather_object(self.ledger)
        if gathered is None or gathered_keys is None:
            return None
        for keys in gathered_keys:
            self.question_keys.update(keys)
        return combined(gathered) if self.store is None else self.store.total(gathered)
