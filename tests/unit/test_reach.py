"""Which way leads from one worker to another, from what both have and where both are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemix_common.errors import PeerUnreachable
from lemix_common.transports.place import this_place, usual_addresses
from lemix_common.transports.reach import (
    NOWHERE,
    Place,
    Reach,
    choose_transport,
    parse_reach,
    usable_addresses,
)

SHM, UNIX, REDIS = "shm:/run/w.shm", "unix:/run/w.sock", "redis:w"
TCP, LOOPBACK = "tcp:10.0.0.7:4000", "tcp:127.0.0.1:4000"
EVERYTHING = ("memory:w", SHM, UNIX, LOOPBACK, TCP, REDIS)
SOCKETS = Path("/run/lemix")
HERE = Place(host="a", network="a", process="1")
SAME_HOST = Place(host="a", network="a", process="2")
CONTAINER = Place(host="b", network="b", process="3")
POD = Place(host="c", network="a", process="4")


def reach(*addresses: str, place: Place = HERE) -> Reach:
    return Reach(addresses, place)


@pytest.mark.parametrize(
    ("theirs", "best"),
    [
        pytest.param(reach(*EVERYTHING), "memory:w", id="one process"),
        pytest.param(reach(*EVERYTHING, place=SAME_HOST), SHM, id="one host"),
        pytest.param(reach(UNIX, TCP, REDIS, place=SAME_HOST), UNIX, id="one host, they lack shared memory"),
        pytest.param(reach(REDIS, TCP, UNIX, SHM, place=SAME_HOST), SHM, id="whatever their order"),
        pytest.param(reach(*EVERYTHING, place=CONTAINER), TCP, id="another container or host"),
        pytest.param(reach(*EVERYTHING, place=POD), LOOPBACK, id="other files, one network"),
        pytest.param(reach(SHM, LOOPBACK, REDIS, place=CONTAINER), REDIS, id="no network address"),
        pytest.param(reach("tcp:localhost:1", REDIS, place=CONTAINER), REDIS, id="localhost is loopback"),
        pytest.param(reach("tcp:[::1]:1", REDIS, place=CONTAINER), REDIS, id="so is ::1"),
        pytest.param(reach("tcp:worker:1", REDIS, place=CONTAINER), "tcp:worker:1", id="a name is not"),
        pytest.param(reach(UNIX, place=NOWHERE), UNIX, id="an address alone is taken at its word"),
    ],
)
def test_the_fastest_way_that_leads_there_is_taken(theirs: Reach, best: str) -> None:
    """In process, shared memory, Unix socket, TCP, broker: the first that both ends' places and means allow."""
    assert choose_transport(reach(*EVERYTHING), theirs) == best


@pytest.mark.parametrize(
    ("mine", "best"),
    [(reach(UNIX, REDIS), UNIX), (reach(SHM), SHM), (reach("tcp:10.0.0.8:1"), UNIX)],
    ids=["without shared memory", "with it", "listening elsewhere"],
)
def test_shared_memory_takes_two(mine: Reach, best: str) -> None:
    """It is chosen only if this end has it too."""
    assert choose_transport(mine, reach(SHM, UNIX, TCP, REDIS, place=SAME_HOST)) == best


def test_the_broker_takes_two() -> None:
    """A worker without an address on the broker isn't sent there."""
    with pytest.raises(PeerUnreachable, match="no way"):
        choose_transport(reach(UNIX), reach(SHM, REDIS, place=CONTAINER))


def test_ways_that_may_fail_are_followed_by_those_that_may_not() -> None:
    """Whoever can't connect by the best way tries the next; ways that can't lead there aren't among them."""
    assert usable_addresses(reach(*EVERYTHING), reach(*EVERYTHING, place=CONTAINER)) == (TCP, REDIS)


@pytest.mark.parametrize(
    "said",
    [
        reach(*EVERYTHING),
        reach("unix:/my data/100% é/w=1.sock", "tcp:[::1]:4000"),
        reach("unix:/run/host=1"),
        reach(place=NOWHERE),
        reach("memory:w", place=NOWHERE),
    ],
    ids=str,
)
def test_what_a_worker_registers_is_read_as_it_was_meant(said: Reach) -> None:
    """One text, words with spaces between them, whatever the paths contain."""
    assert parse_reach(str(said)) == said


def test_an_address_alone_is_a_reach() -> None:
    """As a test, or a worker with one ``--listen``, has it."""
    assert str(reach(UNIX, place=NOWHERE)) == UNIX


def test_ways_of_another_release_are_left_out() -> None:
    """A worker that can more than this one is reached by what both know."""
    assert parse_reach(f"quic:host:1 {TCP} cell=7 host=a").addresses == (TCP,)


def test_a_worker_listens_for_its_host_and_others_where_its_broker_is() -> None:
    """With a broker on this host, nothing listens on a network."""
    for url in ("redis://127.0.0.1:6379/0", "redis://localhost", "unix:///run/redis.sock"):
        schemes = [address.partition(":")[0] for address in usual_addresses("w", SOCKETS, url)]
        assert schemes[-2:] == ["unix", "redis"]


def test_this_place_is_where_this_process_is() -> None:
    """It doesn't change, and each part of it says something."""
    place = this_place()
    assert place == this_place()
    assert all((place.host, place.network, place.process))
