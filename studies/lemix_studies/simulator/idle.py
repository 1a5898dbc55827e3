"""What requests take on an idle node: the unit of all SLOs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lemix_common.costs import Profile
from lemix_coordinator.scheduling.work import Work
from lemix_studies.measures import IdleTimes


def slo_base_s(profile: Profile, requests: Sequence[Work]) -> float:
    """Mean over the requests of the sum of their stage times on an idle node."""
    return idle_times(profile, requests).slo_base_s


def idle_times(profile: Profile, requests: Sequence[Work]) -> IdleTimes:
    """Means of the requests' stage times: of all their passes, of their first, and of one of those that follow."""
    if not requests:
        return IdleTimes(slo_base_s=0.0, ttft_s=0.0, itl_s=0.0)
    firsts = [prefill_s(profile, work) for work in requests]
    laters = [decode_s(profile, work) for work in requests]
    gaps = [
        later / (work.new_tokens - 1)
        for later, work in zip(laters, requests, strict=True)
        if work.new_tokens > 1
    ]
    return IdleTimes(
        slo_base_s=fmean(first + later for first, later in zip(firsts, laters, strict=True)),
        ttft_s=fmean(firsts),
        itl_s=fmean(gaps) if gaps else 0.0,
    )


def prefill_s(profile: Profile, work: Work) -> float:
    """Seconds of the pass over an item's whole rows, all stages."""
    tokens, contexts = work.tokens, work.contexts
    return sum(stage.forward.of(tokens, contexts) for stage in profile.stages)


def decode_s(profile: Profile, work: Work) -> float:
    """Seconds of the iterations behind the first token's, all stages."""
    following = max(work.new_tokens - 1, 0)
    if work.kind != "generate" or not following:
        return 0.0
    rows = len(work.lengths)
    # The k-th of them attends to k tokens more than the prompt has, itself included.
    contexts = work.tokens + rows * (following + 1) / 2
    return following * sum(stage.decode_s(rows, contexts) for stage in profile.stages)
