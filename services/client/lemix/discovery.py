"""Where the cluster is: a URL that was given, then ``LEMIX_URL``, then what `lemix up` left in its data directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lemix_common.errors import BadInput, BrokerUnreachable

DEFAULT_CLUSTER = "lemix"
DEFAULT_DATA_DIR = ".lemix"
CLUSTER_FILE = "cluster.json"


@dataclass(frozen=True, slots=True)
class Address:
    """A cluster on a broker; ``data_dir`` is known where the cluster runs on this machine's files."""

    url: str
    cluster: str
    data_dir: Path | None = None


def find_cluster(
    url: str | None = None, cluster: str | None = None, environment: Mapping[str, str] = os.environ
) -> Address:
    """The cluster's address; `BrokerUnreachable` says what to do if there is none."""
    path = Path(environment.get("LEMIX_DATA_DIR") or DEFAULT_DATA_DIR) / CLUSTER_FILE
    name = cluster or environment.get("LEMIX_CLUSTER")
    given = url or environment.get("LEMIX_URL")
    left = _read(path) if path.exists() else None
    if given and not (left and left.url == given):
        return Address(given, name or DEFAULT_CLUSTER)
    if left is None:
        raise BrokerUnreachable(
            f"no cluster found: start one with `lemix up`, or give --url or LEMIX_URL (there is no {path})"
        )
    return Address(left.url, name or left.cluster, left.data_dir)


def _read(path: Path) -> Address:
    try:
        left = json.loads(path.read_text("utf-8"))
        data_dir = left.get("data_dir")
        return Address(left["url"], left["cluster"], Path(data_dir) if data_dir else path.parent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} can't be read ({error}): run `lemix up` again, or give --url") from None
