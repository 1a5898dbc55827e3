"""A worker's links: several ways to each, the best is taken, and the next one where that leads nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from integration.sites import FAR, NEAR, SECRET, nothing_left_behind
from lemix_common.broker import Broker, connect
from lemix_common.clock import ManualClock
from lemix_common.errors import ClusterError
from lemix_common.ids import WorkerId
from lemix_common.messages import ReleaseItem
from lemix_common.server import RunningBroker
from lemix_common.transports import Identity, Place, open_transport
from lemix_stage_worker.inbox import FrameArrived, Inbox, PeerGone
from lemix_stage_worker.links import TRY_AGAIN_S, Links

HERE = Place(host="a", network="a", process="1")
BESIDE = Place(host="a", network="a", process="2")
APART = Place(host="b", network="b", process="3")
FRAME = ReleaseItem(node=0, stage=1, epoch=2, item="i", attempt=0)
TENSOR = torch.arange(50_000, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _nothing_left_behind(server: RunningBroker, tmp_path: Path) -> Iterator[None]:
    """Each test ends with the threads and sockets it began with."""
    del server  # it only has to be there before anything is counted
    with nothing_left_behind(tmp_path):
        yield


@dataclass
class Workers:
    """Makes the links of workers, and closes them."""

    folder: Path
    broker: Broker
    clock: ManualClock = field(default_factory=ManualClock)
    opened: list[Links] = field(default_factory=list)

    def links(self, identity: Identity) -> Links:
        """A worker's, not listening yet."""
        transport = open_transport(identity, broker=self.broker)
        self.opened.append(Links(identity.worker, transport, Inbox(), self.clock))
        return self.opened[-1]

    def addresses(self, name: str) -> list[str]:
        """One of each kind."""
        return [
            f"shm:{self.folder}/{name}.shm",
            f"unix:{self.folder}/{name}.sock",
            "tcp:127.0.0.1:0",
            f"redis:{name}",
        ]


@pytest.fixture
def workers(server: RunningBroker, tmp_path: Path) -> Iterator[Workers]:
    """Two workers of one cluster can be made here."""
    broker = connect(server.url, "links")
    made = Workers(tmp_path, broker)
    yield made
    for links in made.opened:
        links.close()
    broker.client.connection_pool.disconnect()


def way_taken(sender: Links, receiver: Links, reach: str) -> str:
    """The scheme by which a message and its tensor arrive."""
    with capture_logs() as logged:
        assert sender.send(receiver.worker, reach, FRAME, [TENSOR])
    (arrived,) = receiver.inbox.drain(wait_s=10.0)
    assert isinstance(arrived, FrameArrived)
    assert (arrived.frame, arrived.peer) == (FRAME, sender.worker)
    assert torch.equal(arrived.tensors[0], TENSOR)
    arrived.release()
    (line,) = (line for line in logged if line["event"] == "connected")
    return str(line["address"]).partition(":")[0]


@pytest.mark.parametrize(
    ("number", "place", "way"),
    [(4, BESIDE, "shm"), (3, BESIDE, "unix"), (2, BESIDE, "tcp"), (1, BESIDE, "redis"), (4, APART, "redis")],
    ids=["on one host", "without shared memory", "over the network", "broker only", "apart"],
)
def test_a_message_goes_the_best_way(workers: Workers, number: int, place: Place, way: str) -> None:
    """Of the addresses that the other end registered, the fastest that leads there carries the tensors."""
    near, far = workers.links(NEAR), workers.links(FAR)
    near.listen(*workers.addresses("near"), place=HERE)
    reach = far.listen(*workers.addresses("far")[-number:], place=place)
    assert way_taken(near, far, reach) == way


def test_where_the_best_way_ends_the_next_is_taken_and_remembered(workers: Workers) -> None:
    """An address that nobody answers at is passed over, at first by trying, then for a while without."""
    near, far = workers.links(NEAR), workers.links(FAR)
    near.listen(*workers.addresses("near"), place=HERE)
    reach = far.listen(*workers.addresses("far"), place=BESIDE)
    far._listeners[0].close()
    assert way_taken(near, far, reach) == "unix"
    assert near._ways(reach)[-1].startswith("shm:")
    workers.clock.sleep(TRY_AGAIN_S)
    assert near._ways(reach)[0].startswith("shm:")


def test_a_worker_that_is_gone_is_reached_by_no_way(workers: Workers) -> None:
    """Sending to it returns False, and no way is held against it."""
    near, far = workers.links(NEAR), workers.links(FAR)
    near.listen(*workers.addresses("near"), place=HERE)
    reach = far.listen(*workers.addresses("far"), place=BESIDE)
    far.close()
    assert not near.send(far.worker, reach, FRAME)
    assert not near.send(far.worker, "", FRAME)
    assert near._unreachable == {}


def test_a_stranger_is_tried_once(workers: Workers) -> None:
    """Who answers without the secret isn't asked again by another way."""
    near, far = workers.links(NEAR), workers.links(Identity(WorkerId("far"), b"another secret"))
    near.listen(*workers.addresses("near"), place=HERE)
    reach = far.listen(*workers.addresses("far"), place=BESIDE)
    with capture_logs() as logged:
        assert not near.send(far.worker, reach, FRAME)
    assert [line["event"] for line in logged if line["log_level"] == "warning"].count("send_failed") == 1
    assert SECRET.decode() not in str(logged)


def test_an_address_that_cant_be_had_is_left_out(workers: Workers) -> None:
    """A worker listens where it can, and registers no other address; with none at all it can't work."""
    near, far = workers.links(NEAR), workers.links(FAR)
    taken = near.listen(*workers.addresses("near"), place=HERE).split()[0]
    with capture_logs() as logged:
        reach = far.listen(taken, *workers.addresses("far")[1:], place=BESIDE)
    assert ("not_listening", taken) in [(line["event"], line.get("address")) for line in logged]
    assert "shm:" not in reach
    with pytest.raises(ClusterError, match="can't listen"):
        workers.links(FAR).listen(taken)


def test_a_lost_connection_is_told(workers: Workers) -> None:
    """When a peer closes, its neighbour's compute loop gets one notice of it."""
    near, far = workers.links(NEAR), workers.links(FAR)
    near.listen(*workers.addresses("near"), place=HERE)
    reach = far.listen(*workers.addresses("far"), place=BESIDE)
    way_taken(near, far, reach)
    near.forget(set())
    assert list(far.inbox.drain(wait_s=10.0)) == [PeerGone("near")]
