"""The weights and optimizer state that one stage trains, at a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemix_common.store.training import PlannedStep
from lemix_stage_worker.model.stage import Leaf, StageModel

_MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_BYTES = 8 << 20
"""Parameters that the optimizer updates between two safepoints."""


def moment_name(moment: str, parameter: str) -> str:
    """The name of an optimizer tensor in a checkpoint."""
    return f"optimizer.{moment}.{parameter}"


def moment_names(model: StageModel) -> list[str]:
    """The optimizer tensors a checkpoint has for this stage."""
    return [moment_name(moment, name) for name in model.parameter_names() for moment in _MOMENTS]


@dataclass
class TrainingState:
    """The optimizer (AdamW or SGD) on one stage.

    A tied head is a leaf of its own, for its gradient; its values are the embedding's. The stage that has both updates
    the shared storage once; of two stages that have one each, both make the same update from the same summed gradient.
    """

    model: StageModel
    step: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the checkpoint it comes from."""
    owns_weights: bool = False
    """False while the weights are shared with a served version."""
    _optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    """One a bucket of parameters."""

    def __post_init__(self) -> None:
        self.parts = self.model.parts()
        """Layer by layer, over the same values."""

    def take_gradients(self) -> list[Tensor]:
        """The gradients accumulated since the last call, in model order, zeros where none came."""
        gradients = []
        for parameter in self.model.leaves().values():
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients

    def apply(self, gradients: Mapping[str, Tensor], planned: PlannedStep, *, scale: float) -> Iterator[None]:
        """One optimizer step from the summed gradients, by leaf; at its end the state is one step further.

        Yields after each bucket of parameters: nobody else may use the state until the end. A step without gradients
        (nothing could be learned from) only counts.
        """
        if not gradients:
            self.step += 1
            return
        self._own_weights()
        optimizers = self._optimizers or self._make_optimizers(planned.optimizer)
        names = {parameter: name for name, parameter in self.model.leaves().items()}
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"], group["weight_decay"] = planned.learning_rate, planned.weight_decay
            for parameter in group[
                "params"
            ]:  # only now: the next attempt may begin at a safepoint, and clears them
                gradient = gradients[names[parameter]]
                parameter.grad = gradient if scale == 1 else gradient.mul_(scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield
        self.step += 1

    def squares(self, gradients: Mapping[str, Tensor]) -> tuple[float, ...]:
        """The sum of squares of each parameter's gradient in model order, in float64; a tied parameter's once."""
        return tuple(
            float(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())
            for name, gradient in gradients.items()
            if not self._is_tied_head(name)
        )

    def snapshot(self, *, optimizer: bool) -> dict[str, Tensor]:
        """A copy of the weights (a tied head is the embedding's, so left out), and with them the optimizer's state."""
        leaves = self.model.leaves()
        tensors = {name: leaves[name].detach().clone() for name in leaves if not self._is_tied_head(name)}
        if optimizer and self._optimizers:
            state = {parameter: held for each in self._optimizers for parameter, held in each.state.items()}
            for name in list(tensors):
                for moment in _MOMENTS:
                    if (value := state.get(leaves[name], {}).get(moment)) is not None:
                        tensors[moment_name(moment, name)] = value.clone()
            # a tied head's moments are the embedding's, which the first stage writes
        elif optimizer:
            tensors |= {
                name: tensor.clone()
                for name, tensor in self.moments.items()
                if name.split(".", 2)[2] in leaves
            }
        return tensors

    def _is_tied_head(self, name: str) -> bool:
        return self.model.tied_head and name == "lm_head.weight"

    def _updated(self) -> list[str]:
        """The leaves the optimizer steps: with one stage a tied head's storage is the embedding's."""
        shares = self.model.is_first and self.model.tied_head
        return [name for name in self.model.leaves() if not (shares and self._is_tied_head(name))]

    def _own_weights(self) -> None:
        """Copy the weights before they change for the first time: a served version may share them."""
        if not self.owns_weights:
            sources = {leaf.source: leaf.parameter.detach() for leaf in self.model.all_leaves()}
            self.model.load({name: tensor.clone() for name, tensor in sources.items()})
            self.owns_weights = True

    def _make_optimizers(self, name: str) -> list[torch.optim.Optimizer]:
        leaves = {leaf.name: leaf for leaf in self.model.all_leaves()}
        for bucket in _buckets([leaves[name] for name in self._updated()]):
            parameters = [leaf.parameter for leaf in bucket]
            if name == "sgd":
                self._optimizers.append(torch.optim.SGD(parameters, foreach=False))
                continue
            optimizer = torch.optim.AdamW(parameters, foreach=False)
            self._optimizers.append(optimizer)
            for leaf in bucket if self.moments else ():
                optimizer.state[leaf.parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{moment: self.moments[moment_name(moment, leaf.source)].clone() for moment in _MOMENTS},
                }
        self.moments = {}
        return self._optimizers


def _buckets(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Runs of parameters of some megabytes: what one uninterrupted piece of the optimizer's work updates."""
    buckets: list[list[Leaf]] = []
    room = 0
    for leaf in leaves:
        if leaf.parameter.nbytes > room or not buckets:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(leaf)
        room -= leaf.parameter.nbytes
    return buckets
