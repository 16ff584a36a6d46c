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
        """The controls in effect; pages_to_scan as it was set by hand."""
        return self._controls

    @property
    def changes(self) -> int:
        """How often the pace was changed from outside: equal numbers, nothing new to tell."""
        return self._changes

    @property
    def pages_to_scan(self) -> int:
        """Pages to look at in one slice, when nobody waits for a merge."""
        return self._advice.pages_to_scan

    @property
    def rest_s(self) -> float:
        """How long to rest after a pass."""
        return self._advice.rest_s

    def values(self) -> ControlValues:
        """Every control; pages_to_scan as the advisor has it, while that is on."""
        values = self._controls.model_dump()
        if self._controls.advisor_mode != "none":
            values["pages_to_scan"] = self._advice.pages_to_scan
        return ControlValues(values=values)

    def use(self, controls: Controls) -> None:
        """Follow changed controls, at once."""
        self._controls = controls
        self._advice = advisor.readvise(self._advice, controls)
        self._changed()

    def hurry(self) -> None:
        """A VM has come: look at it at once, and as fast as the CPU limit allows."""
        self._advice = advisor.hurry(self._advice, self._controls)
        self._changed()

    def _changed(self) -> None:
        self._slice_at = 0.0
        self._changes += 1

    def follow(self, scan: advisor.Scan) -> None:
        """Let the advisor learn from a pass that was measured."""
        self._advice = advisor.advise(self._advice, scan, self._controls)

    def sleep(self, pause_s: float) -> None:
        """The next slice is due after this pause, or once something changes the pace."""
        self._slice_at = time.monotonic() + pause_s

    @property
    def until_slice_s(self) -> float:
        """How long until the next slice is due; 0 or less where it is."""
        return self._slice_at - time.monotonic()
