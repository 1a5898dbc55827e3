"""A cluster's directory: one owner, a file for clients, and what a resume goes on from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lemix.data_dir import DataDir, RunningCluster
from lemix_common.errors import BadInput, ClusterError
from lemix_common.settings import ClusterSettings, load_settings

RUNNING = RunningCluster(
    url="redis://:secret@h:1/0", cluster="c", data_dir="d", pid=7, processes={"broker": 8}
)


def test_two_supervisors_cannot_share_a_directory(tmp_path: Path) -> None:
    """The second one is refused while the first lives, and not afterwards."""
    first, second = DataDir(tmp_path / "data"), DataDir(tmp_path / "data")
    with first.locked():
        assert second.is_locked()
        with pytest.raises(BadInput, match=r"runs in .* already"), second.locked():
            pass
    assert not second.is_locked()
    with second.locked():
        pass


def test_clients_read_what_the_supervisor_announced(tmp_path: Path) -> None:
    """cluster.json holds the broker's password, so only its owner may read it; it goes when the cluster goes."""
    directory = DataDir(tmp_path)
    directory.announce(RUNNING)
    assert directory.announced() == RUNNING
    assert stat.S_IMODE((tmp_path / "cluster.json").stat().st_mode) == 0o600
    directory.withdraw()
    with pytest.raises(ClusterError, match="start one with `lemix up`"):
        directory.announced()


def test_settings_survive_for_a_resume(tmp_path: Path) -> None:
    """What the cluster was started with is what `--resume` starts it with, whatever is in the values."""
    directory = DataDir(tmp_path)
    settings = ClusterSettings(model='/models/a "b" \\ ü', nodes=2, stages=3, learning_rate=1e-05)
    assert not directory.has_state()
    directory.remember(settings)
    assert directory.has_state()
    assert load_settings(directory.settings, {}) == settings


def test_a_start_that_failed_is_forgotten(tmp_path: Path) -> None:
    """Its state goes, its logs stay."""
    directory = DataDir(tmp_path)
    directory.remember(ClusterSettings())
    directory.broker.mkdir()
    directory.log("worker-0").parent.mkdir()
    directory.log("worker-0").write_text("why")
    directory.forget()
    assert not directory.has_state()
    assert not directory.broker.exists()
    assert directory.log("worker-0").read_text() == "why"


def test_logs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log over the limit moves aside, once, and its writer goes on in an empty one."""
    monkeypatch.setattr("lemix.data_dir._LARGEST_LOG_BYTES", 4)
    log = DataDir(tmp_path).log("worker-0")
    log.parent.mkdir()
    with log.open("a") as writer:
        for line in ("long line\n", "ok\n"):
            writer.write(line)
            writer.flush()
            DataDir(tmp_path).bound_logs()
    assert log.read_text() == "ok\n"
    assert log.with_suffix(".log.1").read_text() == "long line\n"


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """One sentence says that another directory is wanted."""
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="choose another --data-dir"), DataDir(tmp_path / "file").locked():
        pass
