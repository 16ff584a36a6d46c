"""Names for page contents that their bytes reveal: a fill, a known pattern, a file's start.

Pure. Promises to show none of a guest's bytes except the unit that fills a whole
page. Refuses to guess: most contents are `None`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FILLS = {
    0x00: "zero",
    0x5A: "0x5A fill (slab in use, SLUB poison)",
    0x6B: "0x6B fill (freed slab, SLUB poison)",
    0x90: "0x90 fill (x86 nop)",
    0xAA: "0xAA fill (freed page, page poison)",
    0xCC: "0xCC fill (x86 int3)",
    0xFF: "0xFF fill (erased flash, all ones)",
}
"""SLUB's and page poison's bytes: include/linux/poison.h."""

_BEGINS = (
    (b"\x7fELF", "begin of an ELF file"),
    (b"SQLite format 3\0", "begin of an SQLite database"),
    (b"\x1f\x8b\x08", "begin of gzip data"),
    (b"\x28\xb5\x2f\xfd", "begin of zstd data"),
    (b"\x89PNG\r\n", "begin of a PNG image"),
    (b"%PDF-", "begin of a PDF file"),
)
_TEXT = np.zeros(256, dtype=np.bool_)
_TEXT[[*range(0x20, 0x7F), *b"\t\n\r\f\b\x1b", *range(0x80, 0x100)]] = True
_NEARLY_ZERO_BYTES = 64


def describe(page: NDArray[np.uint8]) -> str | None:
    """The kind of a page (uint8, shape (PAGE_BYTES,)); `None` if its bytes do not reveal it."""
    fill = _fill_of(page)
    if fill is not None:
        return fill
    head = page[:32].tobytes()
    for begin, name in _BEGINS:
        if head.startswith(begin):
            return name
    used = int(np.count_nonzero(page))
    if used <= _NEARLY_ZERO_BYTES:
        return f"zero but for {used} byte{'' if used == 1 else 's'}"
    if _TEXT[page].all():
        return "text"
    return None


def _fill_of(page: NDArray[np.uint8]) -> str | None:
    for width in (1, 2, 4, 8):
        unit = page[:width]
        if (page.reshape(-1, width) == unit).all():
            if width == 1:
                return _FILLS.get(int(unit[0]), f"0x{int(unit[0]):02X} fill")
            word = int.from_bytes(unit.tobytes(), "little")
            return f"{width}-byte word 0x{word:0{2 * width}X} fill"
    return None
