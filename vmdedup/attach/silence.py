"""Which commands a monitor has not answered in time, and whether it still has not.

Owns that knowledge for one monitor. A caller that finds a monitor silent need not wait
again: each further command would take as long. A late answer, whatever it says, ends the
silence. Safe for several threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Unanswered:
    command: str
    since_clock: str
    is_over: Callable[[], bool]
    because: str | None


class Silence:
    """The commands of one monitor that are no longer waited for."""

    def __init__(self) -> None:
        self._unanswered: tuple[_Unanswered, ...] = ()

    def note(
        self,
        command: str,
        waited_s: float,
        is_over: Callable[[], bool],
        because: str | None = None,
    ) -> None:
        """Note an unanswered `command`; `is_over` tells whether it has been answered by now.

        `because`: why it was not, if that is known.
        """
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - waited_s))
        self._unanswered = (*self._unanswered, _Unanswered(command, clock, is_over, because))

    @property
    def reason(self) -> str | None:
        """The unanswered command and since when, in one line; `None` if there is none."""
        if not self._unanswered:
            return None
        left = tuple(each for each in self._unanswered if not each.is_over())
        self._unanswered = left
        if not left:
            return None
        if left[0].because is not None:
            return f"{left[0].because} (since {left[0].since_clock})"
        return (
            f"its monitor does not answer since {left[0].since_clock} (command {left[0].command}):"
            " look at its QEMU and its storage; vmdedup asks again when it answers"
        )
