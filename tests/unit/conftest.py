"""Skips that name what is missing."""

from __future__ import annotations

from tests.qemu.conftest import need

__all__ = ["need"]
