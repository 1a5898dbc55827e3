"""Two transitions of a version that the gate judges: have its held-out examples scored, then decide."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import structlog

from lemix_common.errors import Refused
from lemix_common.store.cluster import Cluster
from lemix_common.store.gate import Gate, HeldOut
from lemix_common.store.items import ENDED
from lemix_common.store.versions import Versions

log = structlog.get_logger()


def begin_judging(versions: Versions, operation: str, version: str, held_out: HeldOut) -> None:
    """preparing ─▶ judging: submit what is to be scored, by the served version too if it never was."""
    gate, served = Gate(versions.broker), versions.live()["served"]
    wanted = [version] if gate.known_loss(served, held_out) is not None else [version, served]
    try:
        items = {judged: gate.submit(judged, held_out) for judged in wanted}
    except Refused as refusal:
        log.warning("judging_waits", operation=operation, reason=str(refusal))
        return
    fields = {"items": json.dumps(items), "against": served}
    versions.advance(operation, "preparing", "judging", fields)


def judge(versions: Versions, operation: str, fields: Mapping[str, str], held_out: HeldOut) -> None:
    """judging ─▶ published or withdrawn, when everything is scored."""
    gate, version, against = Gate(versions.broker), fields["version"], fields["against"]
    scored = {judged: gate.ends(items) for judged, items in json.loads(fields["items"]).items()}
    ends = [end for of_one in scored.values() for end in of_one]
    if not all("state" in end for end in ends):  # results have expired while nobody looked
        versions.advance(operation, "judging", "preparing")
        return
    if not all(end["state"] in ENDED for end in ends):
        return
    if unscored := [end for end in ends if end["state"] != "done"]:
        why = unscored[0].get("reason", unscored[0]["state"])
        gate.hold_back(operation, f"version {version} could not be judged: {why}")
        return
    losses = {judged: mean_loss(of_one) for judged, of_one in scored.items()}
    known = gate.known_loss(against, held_out)
    losses.setdefault(against, math.nan if known is None else known)
    gate.judged(operation, held_out, losses, against=against)
    margin = Cluster(versions.broker).settings().gate_margin
    if is_good_enough(losses[version], losses[against], margin):
        versions.publish(operation)
    else:
        gate.hold_back(
            operation,
            f"its held-out loss is {losses[version]:.4f}, that of the served version {against} "
            f"{losses[against]:.4f}, and the margin is {margin:g}",
        )


def mean_loss(scored: Sequence[Mapping[str, str]]) -> float:
    """The mean over all reference tokens of scored items."""
    logprobs: list[float] = [logprob for item in scored for logprob in json.loads(item["result"])["logprobs"]]
    return -sum(logprobs) / len(logprobs)


def is_good_enough(loss: float, against: float, margin: float) -> bool:
    """Not worse by more than the margin. Not a number never is; against what isn't one, any number is."""
    return not math.isnan(loss) and not loss > against + margin
