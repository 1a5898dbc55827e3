"""A point of a study on a cluster that runs: real services, on accelerators that are emulated or on this machine's.

What is asked is the point's workload. An item of several rows is as many requests (or examples of one step), since that
is what a cluster has. Training examples are there from the beginning; a step of them runs at a time (`s-pp`), on the
node that the policy chooses, or overlapping steps on all nodes (`a-pp`), which are the cluster's own rules.

Emulated accelerators may be slowed down: costs and arrivals are all longer by one factor, and what is measured is
divided by it. So what this machine's processor adds to each message, some tenths of a millisecond, stays small beside
the work of a fast accelerator.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, Literal

from lemix.connection import open_connection
from lemix.discovery import DEFAULT_CLUSTER, Address
from lemix.model_folder import open_model_folder
from lemix.running import running_cluster
from lemix_common.costs import Cost, Profile
from lemix_common.errors import BadInput
from lemix_common.profile_file import write_profile
from lemix_common.settings import EMULATED, ClusterSettings
from lemix_coordinator.scheduling.work import Work
from lemix_studies.accelerators import profile_of
from lemix_studies.experiments.live_measures import (
    in_its_time,
    inference_loss,
    measures_of_spans,
    trained_when_committed,
)
from lemix_studies.experiments.settings import Point, Setting, Variant
from lemix_studies.experiments.stand_in import write_stand_in
from lemix_studies.experiments.workloads import Sources, Workload, workload_of
from lemix_studies.replay import PATIENCE_S, Outcome, run_replay
from lemix_studies.report import HISTORY, summary_of, write_report
from lemix_studies.workload import PlannedArrival, WorkloadOptions

On = Literal["emulated", "real"]
CONTEXT_LENGTH: Final = 2048
"""Of the stand-in for a model whose accelerators are emulated."""
LEAST_STAGE_S: Final = 0.15
"""A request's time on a stage, on average, below which emulated accelerators are slowed down."""
LEAST_STEP_S: Final = 1.5
"""Likewise a training step's on all stages, forward and back: 25 ms go by between two steps."""
NEVER: Final = 1_000_000
"""Steps between two publications, or checkpoints: more than any point has."""
_PREFIX: Final = "study"


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """What is started and submitted."""

    settings: ClusterSettings
    arrivals: tuple[PlannedArrival, ...]
    slowdown: float
    profile: Profile | None


def run_live(
    point: Point,
    *,
    on: str,
    model: str | None,
    report: Path | None = None,
    sources: Sources | None = None,
    slowdown: float | None = None,
) -> dict[str, object]:
    """Start a cluster, replay the point's arrivals, stop it; the measures, and a report in a folder if one is given.

    ``model``: the folder of the model that computes; with emulated accelerators a stand-in is made if there is none.
    ``slowdown``: of emulated accelerators; None: as much as short requests and steps need. `BadInput` for what can't
    be run so.
    """
    with scratch_folder() as folder:
        plan = plan_live(point, on=on, model=model, folder=folder, sources=sources, slowdown=slowdown)
        directory = report or folder / "report"
        directory.mkdir(parents=True, exist_ok=True)
        outcome = trained_when_committed(_replay(plan, folder / "data", directory))
        options = WorkloadOptions(seed=point.setting.seed, time_scale=plan.slowdown)
        summary = summary_of(outcome, options, directory) | measures_of_spans(outcome)
        if on == "real":  # emulated accelerators learn nothing
            summary |= {"inference_loss": inference_loss(outcome), "computed_by": Path(str(model)).name}
        if report is not None:
            write_report(report, outcome, summary, command=f"lemix study {point.setting.study}")
    return in_its_time(summary, plan.slowdown)


def plan_live(
    point: Point,
    *,
    on: str,
    model: str | None,
    folder: Path,
    sources: Sources | None = None,
    slowdown: float | None = None,
) -> LivePlan:
    """The cluster and its arrivals; files that the cluster needs are written into the folder."""
    setting, variant = point.setting, point.variant
    _refuse_ablations(variant)
    if on not in ("emulated", "real"):
        raise BadInput(f"--on {on}: a live cluster is emulated or real")
    profile, factor, device = None, 1.0, "cpu"
    if on == "real":
        if model is None:
            raise BadInput("--on real: give the folder of the model with --model")
    elif model is None:
        model = str(write_stand_in(folder / "model", stages=setting.stages, context_length=CONTEXT_LENGTH))
    opened = open_model_folder(str(model), stages=setting.stages)
    known = sources or Sources(context_lengths={})
    limits = {setting.model: min(opened.context_length, known.context_lengths.get(setting.model, 2**31))}
    workload = workload_of(setting, replace(known, context_lengths=limits))
    if on == "emulated":
        profile = profile_of(setting.model, setting.device, setting.stages)
        factor = slowdown or slowdown_for(profile, workload)
        profile = slowed(profile, factor)
        write_profile(folder / "profile.json", profile)
        device = f"{EMULATED}{folder / 'profile.json'}"
    return LivePlan(
        settings=settings_of(setting, variant, model=str(model), device=device),
        arrivals=tuple(arrivals_of(workload, factor, opened.vocab_size, setting.seed)),
        slowdown=factor,
        profile=profile,
    )


def settings_of(setting: Setting, variant: Variant, *, model: str, device: str) -> ClusterSettings:
    """The point's cluster. A policy that is kept to some nodes has a cluster of so many.

    What computes learns one model, and serves each of its versions. Emulated accelerators have nothing to learn: a step
    is that of the node which computes it, as in the paper, and none is published.
    """
    is_emulated = device.startswith(EMULATED)
    nodes = setting.nodes if variant.use_nodes is None else variant.use_nodes
    if variant.policy.endswith("+") and variant.use_nodes is None:
        raise BadInput(f"{variant.policy}: say on how many nodes")
    training: dict[str, Any] = {
        "step_examples": setting.rows,
        "microbatches": min(setting.microbatches, setting.rows),
        "schedule": setting.schedule,
        "virtual_shards": 1,
    }
    if setting.release == "a-pp":
        training = {"step_examples": max(setting.rows, setting.stages * nodes), "schedule": "a-pp"}
    return ClusterSettings(
        model=model,
        device=device,
        nodes=nodes,
        stages=setting.stages,
        policy=variant.policy.removesuffix("+"),
        prefer=variant.prefer or "balanced",
        training_share=min(
            max(setting.training_rate if variant.split is None else variant.split, 0.01), 0.99
        ),
        order=setting.stage_order,
        max_running=setting.decode_batch * setting.stages,
        max_batch_tokens=CONTEXT_LENGTH,
        max_queue=max(10_000, 2 * setting.items * setting.rows),
        publish_every=NEVER if is_emulated else 1,
        replicas="independent" if is_emulated and setting.release == "s-pp" else "allreduce",
        checkpoint_every=NEVER,
        seed=setting.seed,
        **training,
    )


def arrivals_of(workload: Workload, slowdown: float, vocab_size: int, seed: int) -> Iterator[PlannedArrival]:
    """Every row, in the order in which it is submitted; its tokens are random, and no special ones."""
    randomness = Random(f"{seed} tokens")
    line = 0
    for work in sorted((*workload.training, *workload.requests), key=lambda work: work.arrived_at):
        for length in work.lengths:
            prompt, reference = _parts(work, length)
            tokens = [
                randomness.randrange(min(3, vocab_size - 1), vocab_size) for _ in range(prompt + reference)
            ]
            yield PlannedArrival(
                line=line,
                at_s=work.arrived_at * slowdown,
                kind=work.kind,
                prompt=tuple(tokens[:prompt]),
                reference=tuple(tokens[prompt:]),
                is_capped=False,
            )
            line += 1


def slowdown_for(profile: Profile, workload: Workload) -> float:
    """By how much accelerators are slowed down so that average requests and steps take long enough."""
    stage_s = [
        fmean(stage.forward.of(work.tokens, work.contexts) for stage in profile.stages)
        for work in workload.requests
    ]
    step_s = [
        sum(
            stage.forward_of(is_training=True).of(work.tokens, work.contexts)
            + stage.backward.of(work.tokens, work.contexts)
            for stage in profile.stages
        )
        for work in workload.training
    ]
    factors = [
        least_s / fmean(times)
        for times, least_s in ((stage_s, LEAST_STAGE_S), (step_s, LEAST_STEP_S))
        if times
    ]
    return max(1.0, *factors) if factors else 1.0


def slowed(profile: Profile, factor: float) -> Profile:
    """The same accelerator, slower."""

    def times(cost: Cost) -> Cost:
        return Cost(factor * cost.base, factor * cost.token, factor * cost.context)

    stages = tuple(
        replace(
            stage,
            forward=times(stage.forward),
            training_forward=stage.training_forward and times(stage.training_forward),
            backward=times(stage.backward),
            decode=times(stage.decode),
            optimizer_s=factor * stage.optimizer_s,
        )
        for stage in profile.stages
    )
    return replace(profile, stages=stages, hop=times(profile.hop), load_s=factor * profile.load_s)


def _parts(work: Work, length: int) -> tuple[int, int]:
    """A row as prompt and reference, or answer; each has a token at least."""
    if work.kind == "generate":
        return max(1, length), work.new_tokens
    reference = max(1, length // 3)
    return max(1, length - reference), reference


def _replay(plan: LivePlan, data_dir: Path, report: Path) -> Outcome:
    with running_cluster(plan.settings, data_dir=data_dir) as url:
        connection = open_connection(Address(url, DEFAULT_CLUSTER, data_dir), patience_s=PATIENCE_S)
        with closing(connection.broker.client), (report / HISTORY).open("w", encoding="utf-8") as history:
            return run_replay(connection, plan.arrivals, history, prefix=_PREFIX, data_dir=None)


def _refuse_ablations(variant: Variant) -> None:
    is_ablation = not (variant.uses_profile and variant.prioritises and variant.checks_memory)
    if is_ablation or any(value is not None for value in (variant.alpha, variant.beta, variant.epsilon)):
        raise BadInput(f"{variant.label}: ablations and other weights run with --on simulator only")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """For a point's files; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="lemix-study-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
