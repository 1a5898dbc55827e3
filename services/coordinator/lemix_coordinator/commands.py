"""What the rules can decide. The shell (`coordinator`) carries each out by one fenced Lua call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForgetWorker:
    """Strike a dead worker off the register."""

    worker: str


@dataclass(frozen=True, slots=True)
class PlaceNode:
    """Have these workers host the node's stages ('' for none yet), in a new epoch."""

    node: int
    workers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StartStep:
    """Begin an attempt at a step, or at the replay of a committed one, or let the one in flight go on with it."""

    step: int
    members: tuple[int, ...]
    epochs: tuple[int, ...]
    reason: str
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class LoadTraining:
    """Have nodes take their training state from the newest checkpoint."""

    step: int
    directory: str
    nodes: tuple[int, ...]
    epochs: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class OpenSnapshot:
    """Begin a publish or checkpoint operation."""

    kind: str
    writers: tuple[int, ...]
    epochs: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ChooseWriters:
    """Give a snapshot its writers, or others after one was lost."""

    operation: str
    state: str
    writers: tuple[int, ...]
    epochs: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class AdvanceOperation:
    """Have an operations worker make the operation's next transition."""

    operation: str
    progress: str
    """What has been reported so far; the same progress is not enqueued twice in a row."""


@dataclass(frozen=True, slots=True)
class RetireVersion:
    """Let the draining version go: no item uses it."""

    version: str


@dataclass(frozen=True, slots=True)
class ClearVersion:
    """Have the items that still run on the draining version go on upon the served one."""

    version: str


@dataclass(frozen=True, slots=True)
class ForgetSteps:
    """Let the payloads of steps go that a checkpoint covers and a served version contains."""

    upto: int


Command = (
    ForgetWorker
    | PlaceNode
    | StartStep
    | LoadTraining
    | OpenSnapshot
    | ChooseWriters
    | AdvanceOperation
    | RetireVersion
    | ClearVersion
    | ForgetSteps
)
