"""Everything processes say to each other, as frozen values.

Commands are imperative (`RunForward`), events past tense (`StepCommitted`). Two vocabularies, each closed:

* `Frame`: between stage workers, by tensor messaging (`wire`, `transports`). Every frame says for which node, stage
  and placement epoch it is meant; a receiver drops what an older placement sent.
* `Notice`: on the cluster's control stream, in one total order that every process reads alike. A notice is written by
  the same Lua call that changed the hashes it speaks of, so a process that missed some reads the hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

# --------------------------------------------------------------------------------------- frames, worker to worker


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenItem:
    """From stage to stage, before an item's first row: its number on this node, and how its tokens are chosen.

    Tensors: ids_T, everything known of its sequence, where its tokens depend on it; else none.
    """

    node: int
    stage: int
    epoch: int
    number: int
    item: str
    attempt: int
    prompt_length: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    min_tokens: int
    logprobs: int
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForward:
    """Serve an iteration on the next stage: consecutive tokens of each of these items, all of one version.

    Tensors: hidden_1TD, the rows one behind the other; blocks_N, their block tables likewise; targets_T (-100: not
    scored), empty if nothing is scored.
    """

    node: int
    stage: int
    epoch: int
    iteration: int
    version: str
    numbers: tuple[int, ...]  # the items, a row each
    starts: tuple[int, ...]  # position of a row's first token
    lengths: tuple[int, ...]
    tables: tuple[int, ...]  # length of a row's block table
    wants: tuple[int, ...]  # what the last stage computes of a row: 0 nothing, 1 a token, 2 scores
    slowest_s: float  # what the slowest stage took so far


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardDone:
    """The last stage to stage 0: an iteration's results. Tensors: logprobs_T of all scored tokens (float32), if any."""

    node: int
    stage: int
    epoch: int
    iteration: int
    tokens: tuple[int, ...]  # of the rows that want one, in order; -1: the item has left
    logprobs: tuple[str, ...]  # of the same rows, where they are asked for; else empty texts
    slowest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFailed:
    """A later stage to stage 0: this iteration can't be computed, and why."""

    node: int
    stage: int
    epoch: int
    iteration: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseItem:
    """From stage to stage: the item has ended on this node, or begins again there."""

    node: int
    stage: int
    epoch: int
    item: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainForward:
    """One microbatch of a planned step on the next stage. Tensors: hidden_BTD, targets_BT (-100: not in the loss)."""

    node: int
    stage: int
    epoch: int
    run: str
    step: int
    attempt: int
    microbatch: int
    version: str
    lengths: tuple[int, ...]  # tokens of each example packed into it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBackward:
    """The gradient of a microbatch's hidden states, to the previous stage. Tensors: gradient_BTD."""

    node: int
    stage: int
    epoch: int
    run: str
    step: int
    attempt: int
    microbatch: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddShardGradients:
    """One virtual shard's gradients, to the same stage of another node. Tensors: one a parameter, in model order."""

    node: int
    stage: int
    epoch: int
    run: str
    step: int
    attempt: int
    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AddTiedGradient:
    """The other end's gradient of a tied embedding (first and last stage exchange theirs). Tensors: gradient_VD."""

    node: int
    stage: int
    epoch: int
    run: str
    step: int
    attempt: int


Frame = (
    OpenItem
    | RunForward
    | ForwardDone
    | ForwardFailed
    | ReleaseItem
    | TrainForward
    | TrainBackward
    | AddShardGradients
    | AddTiedGradient
)

# ------------------------------------------------------------------------------------- notices, on the control stream


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementChanged:
    """A node's stages are hosted by other workers, or its links start afresh."""

    node: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReady:
    """A stage holds its weights and can serve."""

    node: int
    stage: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLost:
    """A worker lost the connection to a neighbour of this node's current epoch."""

    node: int
    epoch: int
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """Compute a planned step: virtual shard ``i`` on node ``shard_nodes[i]``; all ``members`` take the sum.

    An attempt that is known already goes on with this step.
    """

    run: str
    step: int
    attempt: int
    lineage: int
    weights: int  # it is computed on the version that this step made
    shard_nodes: tuple[int, ...]
    members: tuple[int, ...]
    epochs: tuple[int, ...]  # the members' placement epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """Every stage of every member had the step's gradients: all run their optimizers now."""

    run: str
    step: int
    attempt: int
    replay: int  # 1 if the step had been committed before and was computed again
    scale: float  # what the gradients are multiplied by, so that their norm keeps its bound


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRejected:
    """A loss or gradient of the attempt wasn't finite: the step is redone without these examples, or taken apart."""

    run: str
    step: int
    attempt: int
    excluded: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteShards:
    """Write the training state as it is after ``step``: stage ``i`` is written by node ``writers[i]``."""

    operation: str
    run: str
    step: int
    lineage: int
    optimizer: int  # 1: optimizer state too
    writers: tuple[int, ...]
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTraining:
    """These nodes take their training state from a checkpoint."""

    run: str
    step: int
    lineage: int
    directory: str
    nodes: tuple[int, ...]
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRefused:
    """A stage can't take its training state from the newest checkpoint, with the reason."""

    run: str
    directory: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareVersion:
    """Every serving stage loads this published version, then reports it."""

    version: str
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPublished:
    """Items that start from now on are served by this version."""

    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionCleared:
    """The next version needs this one's place: items that still run on it go on upon the served one."""

    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRetired:
    """No item uses this version any more."""

    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemCancelled:
    """An item was taken back by its client, since that is gone, or past its deadline; its node may forget it."""

    item: str
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationAdvanced:
    """An operation reached another state of its table, or one of its reports came in."""

    operation: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushRequested:
    """A client wants its partial step planned now."""

    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    """A worker process is there and can host stages."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFailed:
    """A stage can't be built or loaded on this worker, with the reason."""

    node: int
    stage: int
    epoch: int
    reason: str


Notice = (
    PlacementChanged
    | StageReady
    | LinkLost
    | RunStep
    | StepCommitted
    | StepRejected
    | WriteShards
    | LoadTraining
    | TrainingRefused
    | PrepareVersion
    | VersionPublished
    | VersionCleared
    | VersionRetired
    | ItemCancelled
    | OperationAdvanced
    | FlushRequested
    | WorkerRegistered
    | StageFailed
)
