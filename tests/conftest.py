"""What every folder of tests shares: one real broker a session, one torch thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lemix_common.server import RunningBroker, start_broker

pytest.register_assert_rewrite("faults.scenario", "references")  # their checks tell what they found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A real server for the whole session."""
    running = start_broker(tmp_path_factory.mktemp("broker"))
    yield running
    running.stop()
