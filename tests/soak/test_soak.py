"""A short soak; the long one is `python -m tests.soak --minutes N`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.qemu.conftest import need
from tests.soak.soak import Soak

__all__ = ["need"]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_SECONDS = float(os.environ.get("VMDEDUP_SOAK_SECONDS", "12"))


def test_a_short_soak(tmp_path: Path, need: Callable[[str | None], None]) -> None:
    need(root_missing())
    with Soak(tmp_path, vms=3) as soak:
        figures = soak.run(_SECONDS)
    print(figures)
    assert figures.problems() == []
    assert figures.most_merged_pages > 0
    assert figures.guest_checks > 0
    assert sum(figures.events.values()) > 0
