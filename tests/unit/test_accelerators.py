from __future__ import annotations

import pytest

from lemix_common.errors import BadInput
from lemix_studies.accelerators import DEVICES, MODELS, profile_of
from lemix_studies.accelerators.roofline import ROOM


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("dialogpt-small", 124_439_808),
        ("dialogpt-medium", 354_823_168),
        ("dialogpt-large", 774_030_080),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_shapes_have_the_published_parameters(model: str, parameters: int) -> None:
    """Every parameter is counted, to the last bias and norm."""
    assert MODELS[model].parameters == parameters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stages", [2, 4])
def test_every_profile_fits_and_rises(model: str, device: str, stages: int) -> None:
    """Weights and states fit; more tokens take longer; backward, twice the operations, longer than forward."""
    profile = profile_of(model, device, stages)
    assert profile.num_stages == stages
    for stage in profile.stages:
        assert 0 < stage.weight_bytes + stage.training_bytes <= ROOM * profile.memory_bytes
        assert 0 < stage.forward.of(10, 100) < stage.forward.of(1000, 10**6)
        assert stage.forward.of(500, 250_000) < stage.backward.of(500, 250_000)
        assert 0 < stage.decode.of(1, 100) < stage.decode.of(8, 8000) < stage.forward.of(4096, 4096**2)
    times = [stage.forward.of(256, 256**2) for stage in profile.stages]
    assert max(times) / min(times) < 1.5
    assert sum(stage.weight_bytes for stage in profile.stages) >= 2 * MODELS[model].parameters


def test_the_figures_are_the_data_sheets() -> None:
    """Llama-2 7B on A100s: 2 × parameters × tokens at half of 312 TFLOP/s, 13.5 GB read at four fifths of 2.04 TB/s."""
    (stage,) = profile_of("llama-2-7b", "a100-80g", 1).stages
    matrices = MODELS["llama-2-7b"].parameters - 32_000 * 4096  # the embedding is looked up, not multiplied
    assert stage.forward.token == pytest.approx(2 * matrices / 156e12, rel=1e-3)
    assert stage.kv_token_bytes == 32 * 2 * 4096 * 2
    reading_s = 2 * matrices / (0.8 * 2.039e12)
    assert stage.forward.base == stage.decode.base == pytest.approx(max(reading_s, 32 * 40 * 10e-6), rel=1e-3)


def test_a_faster_device_is_faster() -> None:
    """An H100 takes less for the same stage."""
    slow, fast = (profile_of("llama-2-13b", device, 2).stages[0] for device in ("a100-80g", "h100"))
    assert fast.forward.of(512, 512**2) < slow.forward.of(512, 512**2)


@pytest.mark.parametrize(
    ("model", "device", "stages", "says"),
    [
        ("gpt-5", "h100", 2, "no profile of model 'gpt-5': use dialogpt-small"),
        ("llama-2-7b", "tpu", 2, "no profile of device 'tpu': use a100-80g, h100"),
        ("llama-2-70b", "a100-80g", 1, r"doesn't fit a100-80g: a stage has 138\.0 GB of weights"),
        ("llama-2-7b", "h100", 0, "llama-2-7b: 32 layers can't be cut into 0 stages"),
    ],
)
def test_what_is_unknown_or_too_large_is_refused(model: str, device: str, stages: int, says: str) -> None:
    """One clear error."""
    with pytest.raises(BadInput, match=says):
        profile_of(model, device, stages)


def test_adapters_are_trained_where_all_weights_are_too_many() -> None:
    """13B with its optimizer's state doesn't fit two accelerators, but four; whoever insists is refused."""
    two, four = (profile_of("llama-2-13b", "a100-80g", stages) for stages in (2, 4))
    assert two.stages[0].training_bytes < 2**30 < four.stages[0].training_bytes
    with pytest.raises(BadInput, match="for training"):
        profile_of("llama-2-13b", "a100-80g", 2, trained="all")
