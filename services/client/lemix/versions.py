"""Weight versions as a user sees them: which were published, which can be gone back to, and going back."""

from __future__ import annotations

import math
import uuid

from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError
from lemix_common.ids import BASE_VERSION, Version
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.versions import ENDED_STATES, Versions

_POLL_S = 0.02


def list_versions(broker: Broker, count: int) -> list[dict[str, str]]:
    """The newest versions first, published ones and those with a checkpoint, which ``checkpoint`` names."""
    checkpoints = Rollbacks(broker, MAIN_RUN).checkpoints()
    rows = {Version.parse(fields["version"]): fields for fields in Versions(broker).published(count)}
    for version in checkpoints.keys() - rows.keys() - {BASE_VERSION}:
        rows[version] = {"version": str(version), "run": MAIN_RUN, "step": str(version.step)}
    newest = sorted(rows.items(), reverse=True)[:count]
    return [fields | {"checkpoint": checkpoints.get(version, "")} for version, fields in newest]


def roll_back(broker: Broker, target: Version, *, timeout_s: float | None) -> str:
    """Serve and train an earlier version's weights again; returns the new version that has them.

    Requests in work finish on the version they began with. `BadInput`: there is no such checkpoint. `ClusterError`: it
    is damaged, and nothing was changed.
    """
    versions, operation = Versions(broker), f"rollback-{uuid.uuid4().hex[:8]}"
    Rollbacks(broker, MAIN_RUN).open(operation, target)
    wait_until(
        lambda: versions.operation(operation).get("state") in ENDED_STATES,
        what=f"version {target} is served again (rollback {operation} goes on)",
        timeout_s=math.inf if timeout_s is None else timeout_s,
        interval_s=_POLL_S,
    )
    fields = versions.operation(operation)
    if fields["state"] == "failed":
        raise ClusterError(f"nothing was changed: {fields.get('reason', 'no reason was recorded')}")
    return fields["version"]
