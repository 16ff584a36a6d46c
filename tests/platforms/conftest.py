"""`need` skips honestly."""

from __future__ import annotations

from tests.qemu.conftest import need

__all__ = ["need"]
