"""What was fitted before, put right by what is measured while the cluster runs.

Between an idle machine and a busy one every pass of a kind gets slower alike, and each gets something on top. So what
is learned of a line is two figures: measured ≈ extra + factor · predicted. They are found by recursive least squares
with forgetting (Ljung, System Identification, 2nd edition, section 11.2) on relative errors, in the form that adds up
sums: a measurement counts `KEPT` times as much as the next one. The profile itself counts as two measurements that
are never forgotten, so that passes which are all alike can't wind the figures up, and no single pass decides.

A pass that was disturbed (a page fault, a neighbour on the machine) counts no more than one that took three times, or a
third, of what was expected. How far off expectations were is kept as it was: a quantile of the last `RECENT` ratios
says what to add for safety.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from lemix_common.costs import Cost, Profile, StageCosts

KEPT: Final = 0.97
"""The last thirty or so tell."""
PRIOR: Final = 2.0
"""Measurements that the profile counts as."""
RECENT: Final = 128
_AT_MOST: Final = 3.0
"""Times what was expected, or by which it was less, that a measurement counts as."""
_RESPONSE_AT_MOST: Final = 1.25
"""The same of whole responses: a few meet somebody and take twice as long, and what most take is to be known."""

KINDS: Final = ("prefill", "training_forward", "training_backward", "decode")
"""The kinds of spans that a line of `StageCosts` each predicts."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Of one kind of work on one stage. Sums over measurements; u is 1 ÷ predicted, r is measured ÷ predicted."""

    count: float = 0.0
    u: float = 0.0
    uu: float = 0.0
    r: float = 0.0
    ur: float = 0.0
    at_most: float = _AT_MOST
    ratios: tuple[float, ...] = ()
    """Measured ÷ expected of the last ones, each by what was expected before it."""

    def noted(self, predicted: float, measured: float) -> Correction:
        """One more pass: what the profile says of it (not what was corrected), and what it took; both above 0."""
        expected = self.of(predicted)
        ratio = measured / expected
        counted = min(max(ratio, 1 / self.at_most), self.at_most) * expected
        u, r = 1 / predicted, counted / predicted
        return Correction(
            count=self.count * KEPT + 1,
            u=self.u * KEPT + u,
            uu=self.uu * KEPT + u * u,
            r=self.r * KEPT + r,
            ur=self.ur * KEPT + u * r,
            at_most=self.at_most,
            ratios=(*self.ratios[1 - RECENT :], ratio),
        )

    @property
    def extra_and_factor(self) -> tuple[float, float]:
        """Seconds of any pass, and what its predicted seconds are multiplied by; (0, 1) before anything was noted."""
        if not self.count:
            return 0.0, 1.0
        mean_u = self.u / self.count
        uu, ones, target = self.uu + PRIOR * mean_u**2, self.count + PRIOR, self.r + PRIOR
        determinant = uu * ones - self.u**2
        extra = (self.ur * ones - self.u * target) / determinant
        factor = (uu * target - self.u * self.ur) / determinant
        if factor <= 0:  # what is fixed explains it all
            return target / ones / mean_u, 0.0
        return extra, factor

    def of(self, predicted: float) -> float:
        """Seconds to expect of a pass of which the profile says this; never less than a tenth of that."""
        extra, factor = self.extra_and_factor
        return max(extra + factor * predicted, predicted / 10)

    def applied_to(self, cost: Cost) -> Cost:
        """The line to predict by from now on; what it has for nothing isn't below 0."""
        extra, factor = self.extra_and_factor
        return Cost(max(0.0, extra + factor * cost.base), factor * cost.token, factor * cost.context)

    def quantile(self, share: float) -> float:
        """The ratio of measured to expected that this share of the last passes didn't exceed; 1 without any."""
        if not self.ratios:
            return 1.0
        ranked = sorted(self.ratios)
        at = share * (len(ranked) - 1)
        below, part = int(at), at - int(at)
        above = min(below + 1, len(ranked) - 1)
        return ranked[below] * (1 - part) + ranked[above] * part


@dataclass(frozen=True, slots=True)
class Corrections:
    """Of every stage's kinds of work."""

    by_stage_and_kind: Mapping[tuple[int, str], Correction] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def noted(self, profile: Profile, spans: Iterable[Mapping[str, Any]]) -> Corrections:
        """With what workers said of what ran (as their reporters send it); the profile is the one that was measured.

        A span that doesn't say what it computed on (its ``tokens`` and ``contexts``), or of an unknown stage or kind,
        tells nothing. An iteration of decodes that chunks of prompts rode along with is of neither kind.
        """
        known = dict(self.by_stage_and_kind)
        for span in spans:
            kind, stage = str(span.get("cat")), int(span.get("stage", -1))
            if kind not in KINDS or not 0 <= stage < profile.num_stages or not _is_of_one_kind(span):
                continue
            tokens, contexts = float(span.get("tokens", 0)), float(span.get("contexts", 0))
            predicted = _predicted_s(profile.stages[stage], kind, tokens, contexts)
            measured = float(span["end"]) - float(span["start"])
            if tokens > 0 and predicted > 0 and measured > 0:
                before = known.get((stage, kind), Correction())
                known[stage, kind] = before.noted(predicted, measured)
        return replace(self, by_stage_and_kind=MappingProxyType(known))

    def of(self, stage: int, kind: str) -> Correction:
        """Of one kind of work; of nothing noted, one that changes nothing."""
        return self.by_stage_and_kind.get((stage, kind), Correction())

    def applied_to(self, profile: Profile) -> Profile:
        """The profile to predict by from now on."""
        return replace(
            profile, stages=tuple(self._stage(index, costs) for index, costs in enumerate(profile.stages))
        )

    def _stage(self, stage: int, costs: StageCosts) -> StageCosts:
        lines = {kind: self.of(stage, kind).applied_to(_line(costs, kind)) for kind in KINDS}
        return replace(
            costs,
            forward=lines["prefill"],
            training_forward=lines["training_forward"],
            backward=lines["training_backward"],
            decode=lines["decode"],
        )


_UNKNOWN: Final = Correction(at_most=_RESPONSE_AT_MOST)


@dataclass(frozen=True, slots=True)
class ResponseCorrections:
    """Of whole responses: what messages, sharing passes, and training beside a request add to the sum of its stages.

    Learned of scores and generations apart, and with and without training on the node when they were placed.
    """

    by_situation: Mapping[tuple[str, bool], Correction] = field(default_factory=lambda: MappingProxyType({}))

    def noted(
        self, kind: str, beside_training: bool, *, predicted_s: float, measured_s: float
    ) -> ResponseCorrections:
        """With a request that has ended; ``predicted_s`` is what was predicted without this correction."""
        if predicted_s <= 0 or measured_s <= 0:
            return self
        situation = (kind, beside_training)
        known = self.by_situation.get(situation, _UNKNOWN).noted(predicted_s, measured_s)
        return ResponseCorrections(MappingProxyType({**self.by_situation, situation: known}))

    def of(self, kind: str, beside_training: bool, predicted_s: float) -> float:
        """Seconds to expect."""
        return self.by_situation.get((kind, beside_training), _UNKNOWN).of(predicted_s)


def corrected(profile: Profile, spans: Iterable[Mapping[str, Any]]) -> Profile:
    """A profile as these spans put it right, from none before them."""
    return Corrections().noted(profile, spans).applied_to(profile)


def _predicted_s(costs: StageCosts, kind: str, tokens: float, contexts: float) -> float:
    return costs.decode_s(tokens, contexts) if kind == "decode" else _line(costs, kind).of(tokens, contexts)


def _line(costs: StageCosts, kind: str) -> Cost:
    match kind:
        case "prefill" | "training_forward":
            return costs.forward_of(is_training=kind == "training_forward")
        case "training_backward":
            return costs.backward
        case _:
            return costs.decode


def _is_of_one_kind(span: Mapping[str, Any]) -> bool:
    """Decodes are a token for each item."""
    num_items = 1 + len(span.get("others", ())) + int(span.get("more", 0))
    return span.get("cat") != "decode" or int(span.get("tokens", 0)) == num_items
