from __future__ import annotations

import json
from pathlib import Path

import pytest

from lemix.discovery import Address, find_cluster
from lemix_common.errors import BadInput, BrokerUnreachable


def data_dir(directory: Path, **record: str) -> dict[str, str]:
    """An environment whose data directory says where the cluster is."""
    (directory / "cluster.json").write_text(json.dumps(record))
    return {"LEMIX_DATA_DIR": str(directory)}


def test_a_given_url_comes_first(tmp_path: Path) -> None:
    """Then the environment's, then the data directory's."""
    environment = data_dir(tmp_path, url="redis://c", cluster="k", data_dir="/d")
    assert find_cluster("redis://a", None, {"LEMIX_URL": "redis://b"}) == Address("redis://a", "lemix")
    assert find_cluster(None, "mine", environment | {"LEMIX_URL": "redis://b"}) == Address(
        "redis://b", "mine"
    )
    assert find_cluster(None, None, environment) == Address("redis://c", "k", Path("/d"))


def test_the_environment_names_the_cluster() -> None:
    """``LEMIX_CLUSTER``, unless one was given."""
    environment = {"LEMIX_URL": "redis://b", "LEMIX_CLUSTER": "mine"}
    assert find_cluster(None, None, environment).cluster == "mine"
    assert find_cluster(None, "other", environment).cluster == "other"


def test_a_url_of_the_cluster_here_keeps_its_directory(tmp_path: Path) -> None:
    """So that what needs its files works with ``--url`` too."""
    environment = data_dir(tmp_path, url="redis://c", cluster="k", data_dir="/d")
    assert find_cluster("redis://c", None, environment).data_dir == Path("/d")


def test_no_cluster_says_what_to_do(tmp_path: Path) -> None:
    """Start one, or say where it is."""
    with pytest.raises(BrokerUnreachable, match=r"start one with `lemix up`, or give --url or LEMIX_URL"):
        find_cluster(None, None, {"LEMIX_DATA_DIR": str(tmp_path)})


@pytest.mark.parametrize("record", [{}, {"url": "redis://c"}])
def test_a_damaged_record_is_refused(tmp_path: Path, record: dict[str, str]) -> None:
    """By its name."""
    with pytest.raises(BadInput, match=r"cluster\.json can't be read"):
        find_cluster(None, None, data_dir(tmp_path, **record))
