"""The benchmark's own error.

Stands alone so that the processes in which `simulate` and `budget` measure import little.
"""

from __future__ import annotations

from vmdedup.errors import VmdedupError


class BenchError(VmdedupError):
    """The benchmark could not be done; what it changed has been put back."""
