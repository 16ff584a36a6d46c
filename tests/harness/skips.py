"""An honest skip where a capability is missing, and a failure where it must be there.

Apart from the probes in `capabilities`: the demo asks these, and has no pytest.
"""

from __future__ import annotations

import os

import pytest


def require(missing: str | None) -> None:
    """`require(kvm_missing())` skips with the reason; VMDEDUP_REQUIRE=1 makes it a failure."""
    if missing is None:
        return
    if os.environ.get("VMDEDUP_REQUIRE") == "1":
        pytest.fail(missing)
    pytest.skip(missing)
