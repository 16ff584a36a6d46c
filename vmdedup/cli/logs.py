"""Log lines on stderr that never make the engine wait.

Owns the handler of the `vmdedup` loggers: a queue, written out by a thread of
its own, so that a blocked terminal cannot lengthen a gate.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue


def log_to_stderr(*, verbose: bool) -> Callable[[], None]:
    """Log warnings from now on, with `verbose` everything; returns a call that ends it."""
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("vmdedup: %(message)s"))
    listener = QueueListener(lines, writer)
    listener.start()
    handler = QueueHandler(lines)
    logger = logging.getLogger("vmdedup")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.addHandler(handler)

    def end() -> None:
        logger.removeHandler(handler)
        listener.stop()

    return end
