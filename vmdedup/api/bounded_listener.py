"""A listener whose clients cannot take all descriptors of the API server.

Promises that at most `MOST_OPEN` of its connections are open, handshakes under way included: the
oldest one gives way to a new one. So neither clients that are silent, nor strangers that
never end their handshake, keep others out for long, or the Unix socket at all.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import suppress
from typing import Any

MOST_OPEN = 64


class BoundedListener(socket.socket):
    """`listener`, which it takes over, with this bound on its connections."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(fileno=listener.detach())
        self._connections: deque[socket.socket] = deque()

    def accept(self) -> tuple[socket.socket, Any]:
        """As that of any socket. Whoever owns the oldest connection sees that it ends."""
        connection, address = super().accept()
        self._connections.append(connection)
        if len(self._connections) > MOST_OPEN:
            # Nearly all have been closed by their owner long ago.
            still_open = [each for each in self._connections if each.fileno() >= 0]
            for oldest in still_open[:-MOST_OPEN]:
                with suppress(OSError):  # its client has just ended it
                    oldest.shutdown(socket.SHUT_RDWR)
            self._connections = deque(still_open[-MOST_OPEN:])
        return connection, address
