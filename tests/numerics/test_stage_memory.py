"""A worker needs the memory of its stage, not of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from numerics.subjects import random_tensors, write_model

MIB = 2**20


@pytest.fixture(scope="module")
def bench_34m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bench model of INTERFACES.md: 33,694,208 parameters, float32."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    tensors = random_tensors(config)
    assert sum(tensor.numel() for tensor in tensors.values()) == 33_694_208
    return write_model(tmp_path_factory.mktemp("bench-34m"), config, tensors)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", range(3))
def test_the_peak_of_loading_a_stage_is_its_shard(bench_34m: Path, stage: int) -> None:
    """The peak is at most 1.1 times the shard, and 32 MiB for transformers' classes: nothing is loaded twice."""
    script = Path(__file__).with_name("stage_memory.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(script), str(bench_34m), str(stage), "3"],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(process.stdout)
    assert found["weight_bytes"] < 0.5 * 33_694_208 * 4
    assert found["peak_bytes"] <= 1.1 * found["weight_bytes"] + 32 * MIB
