"""A processor on which the installed numpy does not run: one line, and no dead process.

And one with registers that none here has.
"""

from __future__ import annotations

import random
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vmdedup.cli import main, processor
from vmdedup.errors import UnsupportedError
from vmdedup.inject.x86_64 import extended_state
from vmdedup.linux import capabilities
from vmdedup.linux.processor import X86_64_V2, processor_flags

pytestmark = pytest.mark.unit

Have = Callable[[Iterable[str], str], None]

_DIES = "kill -ILL $$"


@pytest.fixture
def have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Have:
    """Sets the processor's flags, and what a Python does that imports numpy, in sh's words."""

    def set_up(flags: Iterable[str], importing: str) -> None:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{importing}\n")
        python.chmod(stat.S_IRWXU)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))

    return set_up


def test_the_kernel_names_this_ones_flags() -> None:
    assert "fpu" in processor_flags()


def test_a_lesser_processor_on_which_numpy_dies_is_named(have: Have) -> None:
    have(X86_64_V2 - {"popcnt", "ssse3"}, _DIES)
    with pytest.raises(UnsupportedError, match=r"lacks popcnt, ssse3;.*numpy<2\.4"):
        processor.require_numpy_runs()


@pytest.mark.parametrize(
    ("flags", "importing"),
    [
        (X86_64_V2 | {"avx"}, _DIES),
        ((), _DIES),
        (X86_64_V2 - {"popcnt"}, "exit 0"),
        (X86_64_V2 - {"popcnt"}, "exit 1"),
    ],
    ids=["enough", "unknown", "older numpy", "no numpy"],
)
def test_any_other_is_not(have: Have, flags: Iterable[str], importing: str) -> None:
    have(flags, importing)
    processor.require_numpy_runs()


def test_a_verb_says_it_in_one_line(
    have: Have, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    have(("fpu",), _DIES)
    # The verb would give up root for all tests that follow in this process.
    monkeypatch.setattr(capabilities, "keep_only", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["vmdedup", "vms"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("vmdedup: the installed numpy does not run on this processor")


@pytest.mark.parametrize("in_use", [False, True])
def test_tile_data_is_restored_only_if_it_is_in_use(in_use: bool) -> None:
    """By the layout of an XSAVE area (Intel SDM 13.4): no processor here has tiles."""
    tiles, others = 1 << 18, 0b111
    area = bytearray(random.Random(1).randbytes(2752 + 8192))
    struct.pack_into("<Q", area, 464, others | tiles)  # what this processor has
    struct.pack_into("<Q", area, 512, others | (tiles if in_use else 0))  # what is in use
    size = len(area) if in_use else 2752
    frame = extended_state(bytes(area))
    assert frame[:464] == area[:464]
    assert frame[512:size] == area[512:size]
    features = others | (tiles if in_use else 0)
    assert struct.unpack_from("<IIQI", frame, 464) == (0x46505853, size + 4, features, size)
    assert frame[size:] == struct.pack("<I", 0x46505845)
