"""How a bench measures, and the one JSON object it prints.

Machines are noisy and drift, so subjects are never compared across runs: every round measures each of them, the order
turned round from one round to the next, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import operator
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from statistics import median, quantiles

SCHEMA = 1
SECONDS = "s"
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked of a bench."""

    seed: int = 0
    quick: bool = False
    """Fewer, smaller rounds: under a minute."""
    device: str = "cpu"
    """Where subjects compute, as the setting of that name has it."""
    model: str = "bench-34m"
    """One of `lemix_benchmarks.model`."""
    vllm_python: str = ""
    """The Python of an environment with vLLM, a peer that can't live in ours; empty: there is none."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure: LeMix, or what it is compared with."""

    case: str
    name: str
    once: Callable[[], float]
    """Do it once; what that measured."""
    repetitions: int = 1
    """In each round, whose sample is their median."""
    unit: str = SECONDS


@dataclass(frozen=True, slots=True)
class Row:
    """A subject's samples in one case, one a round."""

    case: str
    subject: str
    samples: tuple[float, ...]
    unit: str = SECONDS
    further: Mapping[str, float] = field(default_factory=dict)
    """Fields of this bench alone."""

    def to_json(self) -> dict[str, object]:
        """As INTERFACES names it."""
        return {
            "case": self.case,
            "subject": self.subject,
            "unit": self.unit,
            "samples": list(self.samples),
            "median": median(self.samples),
            "p99": percentile_99(self.samples),
            **self.further,
        }


@dataclass(frozen=True, slots=True)
class Target:
    """A limit that a ratio must keep."""

    name: str
    value: float | None
    """None: what it is about could not be measured, so it is missed."""
    op: str
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether it does."""
        return self.value is not None and _OPERATORS[self.op](self.value, self.limit)

    def to_json(self) -> dict[str, object]:
        """As INTERFACES names it."""
        return {
            "name": self.name,
            "value": self.value,
            "op": self.op,
            "limit": self.limit,
            "met": self.is_met,
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not be measured, and why."""

    case: str
    subject: str
    reason: str

    def to_json(self) -> dict[str, object]:
        """As INTERFACES names it."""
        return {"case": self.case, "subject": self.subject, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a bench found out."""

    rounds: int
    threads: int
    """Of each process that computes."""
    model: str | None
    rows: tuple[Row, ...]
    ratios: Mapping[str, float]
    targets: tuple[Target, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    further: Mapping[str, object] = field(default_factory=dict)
    """Fields of this bench alone."""

    @property
    def met_all_targets(self) -> bool:
        """What ``--check`` asks."""
        return all(target.is_met for target in self.targets)


def measure(subjects: Sequence[Subject], *, rounds: int, warm_ups: int = 10) -> tuple[Row, ...]:
    """Measure all of them in each round, after a few times that don't count."""
    samples: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    for _ in range(warm_ups):
        for subject in subjects:
            subject.once()
    for order in _orders(subjects, rounds):
        for subject in order:
            samples[subject].append(median(subject.once() for _ in range(subject.repetitions)))
    return tuple(
        Row(subject.case, subject.name, tuple(taken), subject.unit) for subject, taken in samples.items()
    )


def ratio(rows: Sequence[Row], case: str, subject: str, peer: str) -> float:
    """The median over rounds of subject ÷ peer."""
    samples = {row.subject: row.samples for row in rows if row.case == case}
    return median(ours / theirs for ours, theirs in zip(samples[subject], samples[peer], strict=True))


def percentile_99(samples: Sequence[float]) -> float:
    """Between the two nearest samples, as numpy has it."""
    return quantiles(samples, n=100, method="inclusive")[-1] if len(samples) > 1 else samples[0]


def report(bench: str, plan: Plan, findings: Findings, *, started_at: datetime) -> dict[str, object]:
    """The JSON object of a run."""
    commit, is_modified = _source()
    return {
        "schema": SCHEMA,
        "bench": bench,
        "version": version("lemix"),
        "commit": commit,
        "modified": is_modified,
        "started_at": started_at.astimezone(UTC).isoformat(timespec="seconds"),
        "seed": plan.seed,
        "quick": plan.quick,
        "rounds": findings.rounds,
        "device": _device(plan.device),
        "threads": findings.threads,
        "model": findings.model,
        "rows": [row.to_json() for row in findings.rows],
        "ratios": dict(findings.ratios),
        "targets": [target.to_json() for target in findings.targets],
        "skipped": [skipped.to_json() for skipped in findings.skipped],
        **findings.further,
    }


def _orders(subjects: Sequence[Subject], rounds: int) -> Iterator[Sequence[Subject]]:
    """Who goes first in one round goes last in the next."""
    for number in range(rounds):
        yield subjects[::-1] if number % 2 else subjects


def _source() -> tuple[str, bool]:
    """The commit this file belongs to, and whether tracked files differ from it; ('', False) of an installed wheel."""
    folder = Path(__file__).parent
    if folder.parent.name != "benchmarks":
        return "", False
    try:
        return _git(folder, "rev-parse", "HEAD"), bool(_git(folder, "status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _device(asked: str) -> str:
    machine = f"{_processor()}, {cpu_count()} cores"
    if asked == "cpu":
        return machine
    import torch  # it takes seconds, and benches of pipes don't need it

    return f"{torch.cuda.get_device_name()}, {machine}" if torch.cuda.is_available() else machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
