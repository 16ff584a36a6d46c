"""The history's file written by a process that is killed, and read by the verb as a process."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmdedup.history.database import Database

pytestmark = pytest.mark.command


_WRITER = """
import sys
from pathlib import Path
from vmdedup.history.keeper import Keeper
from vmdedup.history.place import HistoryPlan
from vmdedup.models import HistorySample
keeper = Keeper(HistoryPlan(Path(sys.argv[1]), 15, 1))
number = int(sys.argv[2])
while True:
    keeper.note(HistorySample(unix_s=number, saved_bytes=0, present_bytes=0, vms=0))
    assert keeper.problem is None
    print(number, flush=True)
    number += 1
"""


def test_whatever_instant_the_writer_is_killed_at_no_sample_is_lost(tmp_path: Path) -> None:
    next_number = 1
    for round_number in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(next_number)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            written = [writer.stdout.readline()]
            time.sleep(0.013 * round_number)
            writer.send_signal(signal.SIGKILL)
            written += writer.stdout.readlines()
        told = int(written[-1])
        with Database(tmp_path / "history.db", 1, read_only=True) as database:
            newest = max(row[0] for row in database.rows("fine", 0, math.inf))
        # The kill may come between the write and the word of it.
        assert newest - told in (0, 1)
        next_number = int(newest) + 1
    with Database(tmp_path / "history.db", 1, read_only=True) as database:
        found = [row[0] for row in database.rows("fine", -math.inf, math.inf)]
    assert found == list(range(next_number - len(found), next_number))


def test_without_daemon_and_file_the_verb_says_so(tmp_path: Path) -> None:
    environment = {"VMDEDUP_RUNTIME_DIR": str(tmp_path), "VMDEDUP_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "from vmdedup.cli.main import main; main()", "history"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"vmdedup: no daemon runs, and there is no history at .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
