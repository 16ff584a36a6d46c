"""The pace of scanning: the controls in effect, and the advisor's answer to them.

Owns the controls, the advice, and the time of the next slice of work. Promises that a VM
that comes, and a changed control, cut a sleep short. Refuses to judge a control: it gets
only those that `controls` has let pass.
"""

from __future__ import annotations

import time

from vmdedup.controls import Controls
from vmdedup.ipc.protocol import ControlValues
from vmdedup.policy import advisor


class Pace:
    """How fast to scan, and when to go on."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._advice = advisor.start(controls)
        self._slice_at = 0.0
        self._changes = 0

    @property
    def controls(self) -> Controls:
        """The controls in effect, with pages_to_scan as it was set by hand."""
        return self._controls

    @property
    def changes(self) -> int:
        """How often the pace was changed from outside: an equal number means no news."""
        return self._changes

    @property
    def pages_to_scan(self) -> int:
        """Pages to look at in one slice while nobody waits for a merge."""
        return self._advice.pages_to_scan

    @property
    def rest_s(self) -> float:
        """Rest after a pass, seconds."""
        return self._advice.rest_s

    def values(self) -> ControlValues:
        """Every control, with the advisor's pages_to_scan while the advisor is on."""
        values = self._controls.model_dump()
        if self._controls.advisor_mode != "none":
            values["pages_to_scan"] = self._advice.pages_to_scan
        return ControlValues(values=values)

    def use(self, controls: Controls) -> None:
        """Follow changed controls at once."""
        self._controls = controls
        self._advice = advisor.readvise(self._advice, controls)
        self._changed()

    def hurry(self) -> None:
        """After a VM has come: look at it at once, and as fast as the CPU limit allows."""
        self._advice = advisor.hurry(self._advice, self._controls)
        self._changed()

    def _changed(self) -> None:
        self._slice_at = 0.0
        self._changes += 1

    def follow(self, scan: advisor.Scan) -> None:
        """Let the advisor learn from a measured pass."""
        self._advice = advisor.advise(self._advice, scan, self._controls)

    def sleep(self, pause_s: float) -> None:
        """Have the next slice due after this pause, or once something changes the pace."""
        self._slice_at = time.monotonic() + pause_s

    @property
    def until_slice_s(self) -> float:
        """Time until the next slice is due, seconds; `0` or less if it is."""
        return self._slice_at - time.monotonic()
