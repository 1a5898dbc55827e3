"""Run what a study has not run yet: setting by setting, the points of one after the other, settings in parallel.

A policy with a plus is kept to the nodes that `lemix` (balanced) used in the same setting, so that runs first.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Final

from lemix_studies.experiments.journal import Journal, Row
from lemix_studies.experiments.matrix import Plan
from lemix_studies.experiments.runners import IN_PARALLEL, Runner, runner_for
from lemix_studies.experiments.settings import ON_AS_MANY_NODES, OURS, Point, Setting, Variant, setting_of
from lemix_studies.experiments.workloads import Sources

_PR_SET_PDEATHSIG: Final = 1
LIKE: Final = Variant(policy=OURS, prefer="balanced")
"""Whose number of nodes the policies with a plus get."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is left of a plan, and the number of nodes that `lemix` used, if that has been run."""

    plan: Plan
    nodes_of_ours: int | None


def tasks_of(plans: Sequence[Plan], done: Mapping[str, Row]) -> list[Task]:
    """What has no row yet."""
    used = {setting_of(row): int(row["nodes_used"]) for row in done.values() if _is_like(row)}
    tasks = []
    for plan in plans:
        left = tuple(one for one in plan.variants if Point(plan.setting, one).key not in done)
        if left:
            tasks.append(Task(replace(plan, variants=left), used.get(plan.setting)))
    return tasks


def run_task(task: Task, runner: Runner) -> Iterator[Row]:
    """The rows of a task, one after the other."""
    setting, nodes_of_ours = task.plan.setting, task.nodes_of_ours
    for variant in sorted(task.plan.variants, key=lambda one: one != LIKE):
        kept_to = variant
        if variant.policy in ON_AS_MANY_NODES and variant.use_nodes is None:
            if nodes_of_ours is None:
                nodes_of_ours = int(runner.run(Point(setting, LIKE))["nodes_used"])
            kept_to = replace(variant, use_nodes=nodes_of_ours)
        row = {**runner.run(Point(setting, kept_to)), **Point(setting, variant).values}
        if variant == LIKE:
            nodes_of_ours = int(row["nodes_used"])
        yield row


def run_tasks(
    tasks: Sequence[Task],
    journal: Journal,
    *,
    where: str,
    sources: Sources,
    processes: int = 1,
    told: Callable[[Row], None] = lambda _row: None,
) -> Iterator[Row]:
    """Run tasks, each row written to the journal before it is told of."""
    runner = runner_for(where, sources)
    if processes > 1 and where in IN_PARALLEL and len(tasks) > 1:
        batches: Iterator[list[Row]] = _in_parallel(tasks, where, sources, processes)
    else:
        batches = ([row] for task in tasks for row in run_task(task, runner))
    for measured in batches:
        rows = [{**row, "on": where} for row in measured]
        journal.add(rows)
        for row in rows:
            told(row)
            yield row


def _in_parallel(tasks: Sequence[Task], where: str, sources: Sources, processes: int) -> Iterator[list[Row]]:
    """A task's rows as soon as it is through, in whatever order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _set_up, (where, sources)) as pool:
        futures: list[Future[list[Row]]] = [pool.submit(_rows_of, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


_runner: dict[str, Runner] = {}


def _set_up(where: str, sources: Sources) -> None:
    """In a process of the pool, which ends with its parent, and leaves interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _runner["own"] = runner_for(where, sources)


def _rows_of(task: Task) -> list[Row]:
    return list(run_task(task, _runner["own"]))


def _is_like(row: Mapping[str, Any]) -> bool:
    whole = all(row[name] for name in ("uses_profile", "prioritises", "checks_memory"))
    return whole and (row["policy"], row["prefer"], row["use_nodes"]) == (LIKE.policy, LIKE.prefer, None)


def settings_in(rows: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The settings of rows, in their order."""
    return list(dict.fromkeys(map(setting_of, rows)))
