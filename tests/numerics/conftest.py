"""The models under test, each opened once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from devices import DEVICE, DTYPE
from lemix_stage_worker.model.source import open_model
from numerics.subjects import GENERATED, REAL_MODELS, TRAINED, Subject, random_tensors, write_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread a process, as in a worker: two on shared cores are slower, and may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    disable_progress_bar: Callable[[], None] = logging.disable_progress_bar
    disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="session", params=[*GENERATED, *(pytest.param(name, marks=pytest.mark.data) for name in TRAINED)]
)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model's folder; a trained one is skipped where it isn't there."""
    name = str(request.param)
    if name in GENERATED:
        return write_model(tmp_path_factory.mktemp(name), GENERATED[name], random_tensors(GENERATED[name]))
    if not (REAL_MODELS / name).is_dir():
        pytest.skip(f"{REAL_MODELS / name} is not there")
    return REAL_MODELS / name


@pytest.fixture(scope="session")
def subject(model_folder: Path) -> Subject:
    """A model and two random sequences for it."""
    source = open_model(model_folder, dtype=DTYPE, device=DEVICE)
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_folder, local_files_only=True, dtype=DTYPE
    )
    whole.train(mode=False).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    return Subject(
        source=source,
        whole=whole,
        ids=torch.randint(3, source.vocab_size, (2, 24), generator=generator).to(DEVICE),
    )


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A fresh folder of a small Llama, to be damaged."""
    return write_model(tmp_path / "llama", GENERATED["llama"], random_tensors(GENERATED["llama"]))
