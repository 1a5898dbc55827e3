"""Who decides where work runs: the policies by name, and those that a user's own package brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Final

from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.policies.dealing import NaiveMix, Random
from lemix_coordinator.scheduling.policies.lemix import Lemix
from lemix_coordinator.scheduling.policies.lemix_paper import LemixPaper
from lemix_coordinator.scheduling.policies.lemix_prototype import LemixPrototype
from lemix_coordinator.scheduling.policies.loads import LeastUsed, ShortestQueue
from lemix_coordinator.scheduling.policies.policy import Policy, PolicyOptions, Preference
from lemix_coordinator.scheduling.policies.separate import Separate, SeparateDynamic

__all__ = ["ENTRY_POINTS", "POLICY_NAMES", "Policy", "PolicyOptions", "Preference", "make_policy"]

ENTRY_POINTS: Final = "lemix.policies"
"""The group: each entry is called with a name and the options, and returns a policy."""

_OURS: Mapping[str, Callable[[str, PolicyOptions], Policy]] = {
    "separate": Separate,
    "separate-dynamic": SeparateDynamic,
    "naive-mix": NaiveMix,
    "random": Random,
    "luf": LeastUsed,
    "jsq": ShortestQueue,
    "naive-mix+": NaiveMix,
    "random+": Random,
    "luf+": LeastUsed,
    "lemix-prototype": LemixPrototype,
    "lemix-paper": LemixPaper,
    "lemix": Lemix,
}

POLICY_NAMES: Final = tuple(_OURS)


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """The policy of this name, ours or a user's; `BadInput` if there is none."""
    if name in _OURS:
        return _OURS[name](name, options)
    theirs = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in theirs:
        known = ", ".join([*POLICY_NAMES, *sorted(theirs)])
        raise BadInput(f"no policy is called {name!r}; there are {known}")
    policy: Policy = theirs[name].load()(name, options)
    return policy
