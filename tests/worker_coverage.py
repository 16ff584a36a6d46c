"""A plugin of pytest: a worker writes what it ran before it says that it finished.

Coverage.py writes when its process exits. pytest-xdist kills a worker that needs more than
10 s for that (`xdist/workermanage.py:NodeManager.EXIT_TIMEOUT`).
"""

from __future__ import annotations

import os

from coverage import Coverage


def pytest_sessionfinish() -> None:
    """End the worker's measurement; that of pytest's first process ends later, by its owner."""
    if "PYTEST_XDIST_WORKER" in os.environ and (own := Coverage.current()) is not None:
        own.stop()
        own.save()
