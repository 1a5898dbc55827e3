from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_stage_worker.emulated.emulation import SAFEPOINT_S, Emulation, safepoints
from lemix_stage_worker.emulated.stand_ins import Waiter
from toy_profile import STAGE, toy_profile

EMULATION = Emulation(profile=toy_profile(2), vocab_size=50, eos_ids=(1, 2))


def test_an_iteration_costs_what_its_rows_cost() -> None:
    """Prompts by the forward's line, decodes by theirs; of both together, one base."""
    prompt = EMULATION.iteration_s(0, [0, 0], [10, 20])
    assert prompt == pytest.approx(STAGE.forward.of(30, 10 * 10 + 20 * 20))
    decodes = EMULATION.iteration_s(1, [30, 40, 50], [1, 1, 1])
    assert decodes == pytest.approx(STAGE.decode.of(3, 31 + 41 + 51))
    both = EMULATION.iteration_s(0, [0, 30], [10, 1])
    alone = STAGE.forward.of(10, 100) + STAGE.decode.of(1, 31) - STAGE.decode.base
    assert both == pytest.approx(alone)


def test_a_later_chunk_attends_to_the_earlier_ones() -> None:
    """The chunks of a prompt cost more the later they are."""
    assert EMULATION.iteration_s(0, [0], [16]) < EMULATION.iteration_s(0, [16], [16])


@given(st.text(max_size=8), st.integers(0, 10_000))
def test_a_token_is_a_function_of_item_and_position(item: str, position: int) -> None:
    """The same again, in the vocabulary, and never the end."""
    token = EMULATION.token_of(item, position)
    assert token == EMULATION.token_of(item, position)
    assert 0 <= token < 50
    assert token not in EMULATION.eos_ids


@given(st.floats(0.0, 1.0))
def test_safepoints_are_close_and_add_up(seconds: float) -> None:
    """No part is longer than a safepoint's distance."""
    parts = list(safepoints(seconds))
    assert sum(parts) == pytest.approx(seconds)
    assert all(part <= SAFEPOINT_S * 1.0001 for part in parts)


@dataclass
class LateClock:
    """A clock whose sleeps are longer than asked for."""

    time: float = 0.0
    late_s: float = 0.001

    def now(self) -> float:
        """The time."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """Sleep for too long."""
        self.time += seconds + self.late_s


def test_a_late_timer_is_made_up_for() -> None:
    """Many parts together take what they should, and a part's lateness."""
    clock = LateClock()
    for _ in Waiter(clock.now, clock.sleep).spend(0.1):
        pass
    assert 0.1 <= clock.time <= 0.1 + 2 * clock.late_s


def test_a_look_at_what_has_arrived_is_part_of_the_work() -> None:
    """At a safepoint; what came first there isn't."""
    clock = LateClock(late_s=0.0)
    for _ in Waiter(clock.now, clock.sleep).spend(0.1):
        clock.time += 0.0001
    assert clock.time == pytest.approx(0.1 + 0.0001)
    began = clock.time
    for number, _ in enumerate(Waiter(clock.now, clock.sleep).spend(0.1)):
        clock.time += 0.05 if number == 3 else 0.0
    assert clock.time - began == pytest.approx(0.15)


def test_what_is_done_behind_a_wait_is_part_of_the_work() -> None:
    """The wait learns to end earlier by that much."""
    clock = LateClock(late_s=0.0)
    waiter = Waiter(clock.now, clock.sleep)
    for _ in range(100):
        began = clock.time
        waiter.until(began + 0.01)
        waited_until = clock.time
        clock.time += 0.001  # a message is sent
        waiter.done(waited_until)
    assert clock.time - began == pytest.approx(0.01, abs=1e-5)
