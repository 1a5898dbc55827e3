from __future__ import annotations

from typing import Any

import pytest

from lemix_common.costs import Cost, computed_rows
from lemix_coordinator.scheduling.measured import LINES, measured_profile

TRUE = {
    "prefill": Cost(0.005, 0.0003, 7e-8),
    "training_forward": Cost(0.011, 0.00034, 8e-8),
    "training_backward": Cost(0.02, 0.0006, 3e-7),
    "decode": Cost(0.007, 0.0004, 1e-6),
}
TOKENS = (8, 16, 32, 64, 128, 256, 512)


def stage(slower: float = 1.0) -> dict[str, Any]:
    """As a worker measures one whose lines are exact."""
    return {
        "layers": [0, 3],
        "load_s": 0.1 * slower,
        "optimizer_s": 0.03 * slower,
        "weight_bytes": 100,
        "training_bytes": 300,
        "kv_token_bytes": 16,
        "row_steps": [],
        "activations": [{"tokens": n, "contexts": n * n, "bytes": 1000 * n} for n in TOKENS],
        "samples": [
            {"kind": kind, "tokens": n, "contexts": n * n, "seconds": slower * line.of(n, n * n)}
            for kind, line in TRUE.items()
            for n in TOKENS
        ],
    }


FOUND = {
    "schema": 2,
    "device": "cpu",
    "memory_bytes": 2**30,
    "hops": [{"tokens": n, "seconds": 1e-4 + 1e-6 * n} for n in TOKENS],
    "stages": [stage(), stage(slower=2.0)],
}


def test_each_stage_gets_its_own_lines() -> None:
    """The lines that were measured come back, with their error, and the slowest stage tells when a node serves."""
    measured = measured_profile("m", FOUND)
    profile = measured.profile
    assert (profile.model, profile.source, profile.num_stages) == ("m", "measured", 2)
    for line, kind in LINES.items():
        for costs, slower in zip(profile.stages, (1.0, 2.0), strict=True):
            found: Cost = getattr(costs, line)
            assert found.of(300, 300**2) == pytest.approx(slower * TRUE[kind].of(300, 300**2))
    assert profile.held_out_error == dict.fromkeys([*LINES, "hop"], pytest.approx(0, abs=1e-9))
    assert profile.stages[1].activation_bytes.of(100, 100**2) == pytest.approx(100_000)
    assert profile.load_s == pytest.approx(0.2)
    assert profile.hop.of(1000) == pytest.approx(1.1e-3)


def test_decodes_are_a_line_over_the_rows_that_are_computed() -> None:
    """Where 33 rows take as long as 48 the line fits all the same, and it is not another kind's matter."""
    steps = ((4, 4), (8, 1), (32, 4), (128, 16))
    line = TRUE["decode"]
    rows = [*range(1, 65)]
    samples = [
        {
            "kind": "decode",
            "tokens": n,
            "contexts": 100 * n,
            "seconds": line.of(computed_rows(n, steps), 100 * n),
        }
        for n in rows
    ]
    others = [sample for sample in stage()["samples"] if sample["kind"] != "decode"]
    found = FOUND | {"stages": [stage() | {"row_steps": steps, "samples": others + samples}]}
    costs = measured_profile("m", found).profile.stages[0]
    for n in rows:
        assert costs.decode_s(n, 50 * n) == pytest.approx(line.of(computed_rows(n, steps), 50 * n))
    assert costs.decode_s(33, 0) == costs.decode_s(48, 0) < costs.decode_s(49, 0)
    assert costs.forward.of(33, 33**2) == pytest.approx(TRUE["prefill"].of(33, 33**2))


def test_other_measurements_are_refused() -> None:
    """A worker of another version wrote them."""
    with pytest.raises(ValueError, match="schema 7, not 2"):
        measured_profile("m", FOUND | {"schema": 7})
