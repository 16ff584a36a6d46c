"""The base of context managers that end with `close`.

Owns the two methods that each such class would repeat. Refuses nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """`with` gives the object itself and closes it on every way out."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
