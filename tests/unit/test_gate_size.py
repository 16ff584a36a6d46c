"""The size of the next gate's batch, from how long gates took."""

from __future__ import annotations

import pytest

from vmdedup.core.gate_size import USUAL, BatchSize, GateSize

pytestmark = pytest.mark.unit

MOST = BatchSize(runs=256, pages=2048)


def after_gates(size: GateSize, fixed_ms: float, ms_per_run: float, gates: int = 100) -> GateSize:
    """Full gates on a host where a gate costs so much, and so much a run."""
    for _ in range(gates):
        size.took(fixed_ms + ms_per_run * size.runs, size.runs, size.runs)
    return size


@pytest.mark.parametrize("ms_per_run", [0.004, 0.01, 0.03])
def test_it_comes_to_what_lasts_the_target(ms_per_run: float) -> None:
    size = after_gates(GateSize(MOST, target_ms=1), 0.2, ms_per_run)
    assert 0.2 + ms_per_run * size.runs == pytest.approx(1, rel=0.1)
    assert size.pages == size.runs * 8


def test_it_stays_within_bounds() -> None:
    assert after_gates(GateSize(MOST, target_ms=1), 0.01, 0.0001).runs == MOST.runs
    assert after_gates(GateSize(MOST, target_ms=1), 5, 1).runs == 16
    small = GateSize(BatchSize(runs=4, pages=10), target_ms=1)
    assert (small.runs, small.pages, small.piece_pages) == (4, 10, 10)
    assert after_gates(small, 0.01, 0.001).runs == 4
    assert after_gates(small, 5, 1).runs == 4


def test_one_late_gate_halves_it_at_most() -> None:
    size = GateSize(MOST, target_ms=1)
    size.took(1000, size.runs, size.runs)
    assert size.runs == USUAL.runs // 2


def test_gates_that_were_not_full_do_not_let_it_grow() -> None:
    size = GateSize(MOST, target_ms=1)
    size.took(0.1, runs=3, pages=40)
    assert size.runs == USUAL.runs
    size.took(0.1, runs=3, pages=USUAL.pages)
    assert size.runs > USUAL.runs
