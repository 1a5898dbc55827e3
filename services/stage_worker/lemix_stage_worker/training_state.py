"""The weights and optimizer state that one stage trains, at a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lemix_common.ids import Version
from lemix_common.store.training import PlannedStep
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.trained_weights import Weights

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_OLDER = "older"
BUCKET_BYTES = 8 << 20
"""Parameters that the optimizer updates between two safepoints."""


def optimizer_name(kind: str, parameter: str) -> str:
    """The name of a tensor of the training state, other than the weights, in a checkpoint."""
    return f"optimizer.{kind}.{parameter}"


def optimizer_names(model: StageModel) -> list[str]:
    """Such tensors that a checkpoint may have for this stage."""
    return [optimizer_name(kind, name) for name in model.parameter_names() for kind in (*_MOMENTS, _OLDER)]


@dataclass
class TrainingState:
    """The weights of one stage and the optimizer (AdamW or SGD) that makes their next version.

    In half precision the optimizer has float32 masters, which the weights are rounded from; else its parameters are
    the newest weights' own memory. Where steps overlap (``overlaps``), the version before the newest stays, since the
    next step is computed on it: the optimizer writes beside it, never over it.

    A tied head is a leaf of its own, for its gradient; its values are the embedding's. The stage that has both updates
    the shared storage once; of two stages that have one each, both make the same update from the same summed gradient.
    """

    step: int
    newest: Weights
    overlaps: bool = False
    older: Weights | None = None
    """The version before, where it is kept."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the checkpoint it comes from, by their names in it."""
    masters: Mapping[str, Tensor] = field(default_factory=dict)
    """In half precision: the checkpoint's weights in float32, by source."""
    lineage: int = 0
    _buckets: list[_Bucket] = field(default_factory=list)

    @property
    def version(self) -> Version:
        """The name of the newest weights."""
        return Version(self.lineage, self.step)

    @property
    def model(self) -> StageModel:
        """The stage, with the newest weights."""
        return self.newest.model

    def weights_at(self, step: int) -> Weights | None:
        """The weights that a step made, if they are here."""
        if step == self.step:
            return self.newest
        return self.older if step == self.step - 1 else None

    def drop_gradients(self) -> None:
        """Forget gradients that have accumulated: no step goes on."""
        for weights in filter(None, (self.newest, self.older)):
            weights.drop_gradients()

    def apply(self, gradients: Mapping[str, Tensor], planned: PlannedStep, *, scale: float) -> Iterator[None]:
        """One optimizer step from the summed gradients, by leaf; at its end the state is one step further.

        Yields after each bucket of parameters: nobody else may use the newest weights until the end. A step without
        gradients (nothing could be learned from) only counts.
        """
        if gradients:
            target = self._next_weights()
            before, after = self.newest.leaves(), target.leaves()
            for bucket in self._buckets or self._make_buckets(planned.optimizer):
                for name, parameter in bucket.parameters.items():
                    if not self.newest.is_half and target is not self.newest:
                        parameter.data = after[name].data.copy_(before[name].data)
                    # only now: the next attempt may begin at a safepoint, and clears gradients
                    gradient = gradients[name]
                    parameter.grad = gradient if scale == 1 else gradient.mul_(scale)
                bucket.step(planned)
                if self.newest.is_half:
                    for name, parameter in bucket.parameters.items():
                        after[name].data.copy_(parameter.data)
                yield
            self.older = self.newest if self.overlaps else None
            self.newest = target
        elif self.overlaps:
            self.older = self.newest
        self.step += 1

    def squares(self, gradients: Mapping[str, Tensor]) -> tuple[float, ...]:
        """The sum of squares of each parameter's gradient in model order, in float64; a tied parameter's once."""
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            for name, gradient in gradients.items()
            if not self._is_tied_head(name)
        ]
        return tuple(torch.stack(squares).tolist()) if squares else ()  # a GPU is asked once, not for each

    def snapshot(self, *, optimizer: bool) -> dict[str, Tensor]:
        """A copy of the weights (a tied head is the embedding's, so left out), and with them all that goes on needs.

        That is the optimizer's state (the first stage's for a tied head) and, where it is kept, the older version.
        """
        names = [name for name in self.newest.leaves() if not self._is_tied_head(name)]
        tensors = self._values(names)
        if optimizer:
            tensors |= self._moments(names)
            if self.older is not None:
                leaves = self.older.leaves()
                tensors |= {optimizer_name(_OLDER, name): leaves[name].detach().clone() for name in names}
        return tensors

    # ---- parts
    def _values(self, names: Sequence[str]) -> dict[str, Tensor]:
        exact: dict[str, Tensor] = {}
        if self.newest.is_half:
            exact = {name: p for bucket in self._buckets for name, p in bucket.parameters.items()}
            exact = exact or dict(self.masters)
        leaves = self.newest.leaves()
        return {name: exact.get(name, leaves[name]).detach().clone() for name in names}

    def _moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        wanted = {optimizer_name(moment, name): (moment, name) for name in names for moment in _MOMENTS}
        if not self._buckets:
            return {name: self.moments[name].clone() for name in wanted if name in self.moments}
        held = {name: state for bucket in self._buckets for name, state in bucket.state().items()}
        return {
            full: held[name][moment].clone()
            for full, (moment, name) in wanted.items()
            if moment in held.get(name, {})
        }

    def _next_weights(self) -> Weights:
        """Where the next version is written: over the oldest one that nobody needs any more."""
        reusable = self.older if self.overlaps else self.newest
        return reusable if reusable is not None and not reusable.is_shared else self.newest.empty_copy()

    def _make_buckets(self, optimizer: str) -> list[_Bucket]:
        """Runs of parameters of some megabytes: what one uninterrupted piece of the optimizer's work updates."""
        sources = {leaf.name: leaf.source for leaf in self.model.all_leaves()}
        parts: list[dict[str, nn.Parameter]] = []
        room = 0
        for name in self._updated():
            value = self.newest.leaves()[name].detach()
            if self.newest.is_half:
                value = self.masters[sources[name]].clone() if self.masters else value.float()
            if value.nbytes > room or not parts:
                parts.append({})
                room = BUCKET_BYTES
            parts[-1][name] = nn.Parameter(value)
            room -= value.nbytes
        self._buckets = [_Bucket(part, optimizer) for part in parts]
        if self.moments:
            for bucket in self._buckets:
                bucket.restore(self.moments, sources)
        self.moments, self.masters = {}, {}
        return self._buckets

    def _is_tied_head(self, name: str) -> bool:
        return self.model.tied_head and name == "lm_head.weight"

    def _updated(self) -> list[str]:
        """The leaves the optimizer steps: with one stage a tied head's storage is the embedding's."""
        shares = self.model.is_first and self.model.tied_head
        return [name for name in self.newest.leaves() if not (shares and self._is_tied_head(name))]


class _Bucket:
    """Some parameters and their optimizer. The parameters are others than those that are computed on."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: str) -> None:
        self.parameters = parameters
        values = list(parameters.values())
        self._optimizer = (
            torch.optim.SGD(values, fused=True)
            if optimizer == "sgd"
            else torch.optim.AdamW(values, fused=True)
        )

    def restore(self, moments: Mapping[str, Tensor], sources: Mapping[str, str]) -> None:
        """Go on from a checkpoint's moments."""
        for name, parameter in self.parameters.items():
            self._optimizer.state[parameter] = {
                moment: moments[optimizer_name(moment, sources[name])].clone() for moment in _MOMENTS
            }

    def step(self, planned: PlannedStep) -> None:
        """Update the parameters from their gradients, which are given up."""
        (group,) = self._optimizer.param_groups
        group["lr"], group["weight_decay"] = planned.learning_rate, planned.weight_decay
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """The optimizer's tensors by parameter."""
        return {name: self._optimizer.state.get(parameter, {}) for name, parameter in self.parameters.items()}
