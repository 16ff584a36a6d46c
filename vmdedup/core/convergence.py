"""The test whether a run has merged all there is to merge.

Pure. A run has converged when, from the third pass on, two passes in a row each
added under 1% to the merged pages. The net counts: guests that keep writing break
merges as fast as they are made again, and that adds nothing. A pass that ended early
on a VM says nothing about what is left to merge; but lasting trouble (a full store)
is not waited for. Nor does a pass count while a VM's disk may only be slow to answer.
"""

from __future__ import annotations

_FROM_PASS = 3
_QUIET_PASSES = 2
_QUIET_SHARE = 0.01
_MOST_TROUBLED_PASSES = 5
_MOST_AWAITING_PASSES = 300
"""Most such passes in a row for a disk that is slow again and again; each takes over 10 ms."""


class Convergence:
    """Takes the number of merged pages after each pass, and tells if the run has converged."""

    def __init__(self) -> None:
        self._passes = 0
        self._quiet_passes = 0
        self._troubled_passes = 0
        self._awaiting_passes = 0
        self._merged_pages = 0

    def add(
        self, merged_pages: int, *, troubled: bool = False, awaits_storage: bool = False
    ) -> None:
        """Note the merged pages after a pass.

        `troubled`: the pass ended early on some VM. `awaits_storage`: it put a VM's drain off,
        and it is not known yet whether that VM's storage hangs; that takes a few seconds.
        """
        self._troubled_passes = self._troubled_passes + 1 if troubled else 0
        self._awaiting_passes = self._awaiting_passes + 1 if awaits_storage else 0
        awaits = 0 < self._awaiting_passes < _MOST_AWAITING_PASSES
        if awaits or 0 < self._troubled_passes < _MOST_TROUBLED_PASSES:
            self._quiet_passes, self._merged_pages = 0, merged_pages
            return
        added = merged_pages - self._merged_pages
        is_quiet = added <= _QUIET_SHARE * self._merged_pages
        self._quiet_passes = self._quiet_passes + 1 if is_quiet else 0
        self._merged_pages = merged_pages
        self._passes += 1

    @property
    def reached(self) -> bool:
        """Whether further passes would bring next to nothing."""
        return self._passes >= _FROM_PASS and self._quiet_passes >= _QUIET_PASSES
