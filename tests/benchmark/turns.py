"""What several ways were measured at, turn by turn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def medians(turns: Sequence[object], names: Iterable[str]) -> list[float]:
    """The median over all turns of each of these fields."""
    return [statistics.median(getattr(each, name) for each in turns) for name in names]


def write_json(file: Path, turns: Mapping[str, Sequence[DataclassInstance]]) -> None:
    """All turns of each way."""
    rows = {way: [asdict(each) for each in found] for way, found in turns.items()}
    file.write_text(json.dumps(rows, indent=2) + "\n")
