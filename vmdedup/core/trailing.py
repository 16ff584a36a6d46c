"""One figure over the last seconds: how much it has changed, and in what time.

Pure. Promises to keep two samples however old they are, so that a slow pace of samples still
tells a change; of older ones it keeps one at most from before the window.
"""

from __future__ import annotations

from collections import deque


class Trailing:
    """The samples of one figure within a window of so many seconds."""

    __slots__ = ("_seen", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()
        """Times in seconds, and the figure then."""

    def note(self, now_s: float, value: int) -> None:
        """Add a sample; its time is not before the last one's."""
        self._seen.append((now_s, value))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - self._window_s:
            self._seen.popleft()

    @property
    def last(self) -> int | None:
        """The figure in the last sample; `None` without any."""
        return self._seen[-1][1] if self._seen else None

    @property
    def change(self) -> int:
        """The last figure less the first; `0` for less than two samples."""
        return self._seen[-1][1] - self._seen[0][1] if self._seen else 0

    @property
    def span_s(self) -> float:
        """Seconds from the first sample to the last."""
        return self._seen[-1][0] - self._seen[0][0] if self._seen else 0.0
