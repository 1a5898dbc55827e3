"""Which device a worker takes."""

from __future__ import annotations

import pytest
import torch

from lemix_common.errors import SettingsError
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.device import CPU, choose_device, device_text


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of them; none is touched by choosing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_two_gpus")
def test_gpus_are_dealt_out_by_turns() -> None:
    """By the numbers of the workers' slots, so that a restarted worker takes the same one."""
    chosen = [choose_device("cuda", f"worker-{number}").index for number in range(4)]
    assert chosen == [0, 1, 0, 1]
    assert choose_device("auto", "worker-3") == torch.device("cuda", 1)
    assert choose_device("cuda", "some-host") == torch.device("cuda", 0)


@pytest.mark.usefixtures("_two_gpus")
def test_a_gpu_may_be_named() -> None:
    """One for all workers; one that isn't there is refused."""
    assert {choose_device("cuda:1", f"worker-{number}") for number in range(3)} == {torch.device("cuda", 1)}
    with pytest.raises(SettingsError, match="this machine has 2 GPUs"):
        choose_device("cuda:2", "worker-0")
    assert choose_device("cpu", "worker-0") == CPU


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_only_auto_goes_on() -> None:
    """On the processor; who asks for a GPU is told that there is none."""
    assert choose_device("auto", "worker-0") == CPU
    assert device_text(CPU) == "cpu"
    with pytest.raises(SettingsError, match="finds no GPU here"):
        choose_device("cuda", "worker-0")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", "CPU"])
def test_what_names_no_device_is_refused(device: str) -> None:
    """With the settings, before anything starts."""
    with pytest.raises(SettingsError, match="must be cpu, cuda, cuda:N or auto"):
        ClusterSettings(device=device)
