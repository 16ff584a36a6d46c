from collections.abc import Callable

import numpy as np
import numpy.typing as npt

TABLE_WORDS: tuple[int, int, int, int, int, int]
ENTRY_MASKS: tuple[int, int]

def run(
    fds: tuple[int, int, int, int],
    addresses: tuple[int, int, int],
    limits: tuple[int, int, int],
    gates: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    pages: npt.NDArray[np.int64],
    seen: npt.NDArray[np.uint64],
    calls: npt.NDArray[np.uint64],
    results: npt.NDArray[np.int64],
    closed_ns: npt.NDArray[np.int64],
    fault: Callable[[str], None] | None,
    /,
) -> tuple[int, int, int]: ...
