"""The table of docs/troubleshooting.md: each row is a message that the code really gives."""

from __future__ import annotations

import gc
import os
import pty
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.images import REPOSITORY
from tests.harness.pages import page
from tests.harness.vm import Backend
from tests.process.test_bounded import hostile_process
from tests.qemu.conftest import Boot
from tests.qemu.machine import Machine, alone, backend
from tests.service.daemon import COMMAND, Directories, running
from tests.service.engine import sharing, vm_report
from tests.service.test_client import unclosed_by_httpcore
from vmdedup.attach.discover import attach_all, running_qemus
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.shared_qmp import SharedQmpMonitor
from vmdedup.cli.outcome import require_any
from vmdedup.client import Client
from vmdedup.controls import ControlFacts, Controls, change
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import VmdedupError
from vmdedup.guardian.runtime_dir import RuntimeDirectory
from vmdedup.guest.vm_readv import page_buffer, read_runs
from vmdedup.history.database import Database
from vmdedup.history.place import FILE_NAME
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux import bounded
from vmdedup.linux.borders import require_runs
from vmdedup.models import VmList, VmListing
from vmdedup.settings import Settings
from vmdedup.store.stable_store import SUMS_SUFFIX, StableStore, prepare_directory

NOBODY = 65534
_START_S = 30


def rows() -> list[str]:
    """The messages of the table, as they stand there."""
    named = page("docs/troubleshooting.md").named()
    return sorted(message.strip() for message in named if " " in message)


def message(work: Callable[[], object]) -> str:
    """The line for the user that `work` ends with."""
    try:
        work()
    except VmdedupError as error:
        return str(error)
    finally:
        gc.collect()  # what httpcore left open; its warning is this test's
    pytest.fail("no error was raised")


@contextmanager
def listener(folder: Path, *, hangs_up: bool) -> Iterator[Path]:
    """A socket that is no monitor, or one that another client has."""
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0 if hangs_up else 8)
        if hangs_up:
            listening.settimeout(_START_S)
            thread = threading.Thread(target=hang_up, args=(listening,))
            thread.start()
            yield path
            thread.join()
        else:
            yield path


@contextmanager
def held_by_another(path: Path) -> Iterator[None]:
    """A process that has the lock of a runtime directory."""
    hold = """
import sys, time
from pathlib import Path
from vmdedup.guardian.runtime_dir import RuntimeDirectory
held = RuntimeDirectory(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()


def hang_up(listening: socket.socket) -> None:
    listening.accept()[0].close()


def attaching(path: Path) -> str:
    with MonitorLoop() as loop:
        (lost,) = attach_all([str(path)], loop, timeout_s=0.3).unreachable
    return f"{lost.name}: {lost.reason}"


class Producers:
    """One method a row; each gives a message of the code."""

    def __init__(self, folder: Path, directories: Directories, boot: Boot) -> None:
        self.folder = folder
        self.directories = directories
        self.boot = boot

    def no_running_qemu_found(self) -> str:
        return message(lambda: require_any(VmList(vms=[])))

    def no_socket_there(self) -> str:
        return attaching(self.folder / "nowhere")

    def not_a_qmp_socket(self) -> str:
        with listener(self.folder, hangs_up=True) as path:
            return attaching(path)

    def monitor_busy(self) -> str:
        with listener(self.folder, hangs_up=False) as path:
            return attaching(path)

    def it_has_no_qmp_monitor(self) -> str:
        return self._reason_of()

    def it_has_a_human_monitor_only(self) -> str:
        return self._reason_of("-monitor", f"unix:{self.folder / 'hmp'},server=on,wait=off")

    def _reason_of(self, *arguments: str) -> str:
        command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-m", "16"]
        command += arguments
        with subprocess.Popen(command) as process:
            try:
                deadline = time.monotonic() + _START_S
                while True:
                    found = [each for each in running_qemus() if each.pid == process.pid]
                    if found:
                        return found[0].reason or ""
                    assert time.monotonic() < deadline
            finally:
                process.kill()

    def its_only_qmp_socket(self) -> str:
        folder = self.folder / "qemu-server"
        folder.mkdir()
        with alone(folder / "100.qmp") as pid:
            (found,) = [each for each in running_qemus() if each.pid == pid]
            return found.reason or ""

    def others_use_its_monitor(self) -> str:
        with (
            Machine(self.folder) as machine,
            MonitorLoop() as loop,
            SharedQmpMonitor.connect(machine.qmp, loop) as monitor,
            socket.socket(socket.AF_UNIX) as other,
        ):
            other.connect(str(machine.qmp))
            assert other.recv(1)
            return message(monitor.status)

    def no_mergeable_memory(self) -> str:
        ram = ("-object", backend("memfd", 0, 64, "merge=off"))
        with Machine(self.folder, *ram, "-machine", "pc,memory-backend=ram0", "-S") as machine:
            return str(self.row(machine.qmp).reason)

    def trust_domain_none(self) -> str:
        ram = ("-object", backend("memfd", 0, 64))
        with Machine(self.folder, *ram, "-machine", "pc,memory-backend=ram0", "-S") as machine:
            return str(self.row(machine.qmp, domains=[{"domain": "none"}]).reason)

    def merged_only_while_stopped(self) -> str:
        ram = ("-object", backend("memfd", 0, 64))
        with Machine(self.folder, *ram, "-machine", "pc,memory-backend=ram0", "-S") as machine:
            return str(self.row(machine.qmp, mask=["userfaultfd-wp"]).reason)

    def only_zero_pages(self) -> str:
        balloon = ("-device", "virtio-balloon-pci,free-page-reporting=on")
        ram = ("-object", backend("memfd", 0, 64), *balloon)
        with Machine(self.folder, *ram, "-machine", "pc,memory-backend=ram0", "-S") as machine:
            return str(self.row(machine.qmp).reason)

    def balloon_without_a_file(self) -> str:
        ram = ("-object", backend("ram", 0, 64, "share=on"), "-device", "virtio-balloon-pci")
        with Machine(self.folder, *ram, "-machine", "pc,memory-backend=ram0", "-S") as machine:
            return str(self.row(machine.qmp).reason)

    def wrong_numbers(self) -> str:
        one = np.array([0], dtype=np.int64)
        return message(lambda: require_runs(one, one))

    def its_system_call_filter(self) -> str:
        code = (
            "import threading\n"
            "from tests.harness.filters import ALLOW, KILL, answers, install\n"
            "install(answers({237: KILL}, ALLOW))\n"
            "lock = threading.Lock()\n"
            "lock.acquire()\n"
            "waits = threading.Thread(target=lock.acquire, daemon=True)\n"
            "waits.start()\n"
            "print(waits.native_id, flush=True)\n"
            "input()\n"
        )
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdin=pipe, stdout=pipe
        ) as process:
            try:
                assert process.stdout is not None
                tid = int(process.stdout.readline())
                return message(RemoteThread("vm", process.pid, tid).open)
            finally:
                process.kill()

    def store_directory_was_made_by_another(self) -> str:
        self.directories.store.mkdir(mode=0o700)
        os.chown(self.directories.store, NOBODY, NOBODY)
        return message(lambda: prepare_directory(self.directories.store))

    def its_memory_can_not_be_read(self) -> str:
        address = np.zeros(1, dtype=np.int64)
        with hostile_process() as hostile, pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounded, "LIMIT_S", 0.2)
            return message(
                lambda: read_runs("vm", hostile.pid, hostile.never[:1], address + 1, page_buffer(1))
            )

    def row(self, qmp: Path, **changed: object) -> VmListing:
        with Deduplicator(self.settings(**changed)) as dedup:
            (row,) = dedup.attach([str(qmp)], merging=False).vms
        return row

    def settings(self, **changed: object) -> Settings:
        own = {"runtime_dir": self.directories.runtime, "store_dir": self.directories.store}
        return Settings.model_validate(own | changed)

    def mergeable_pages_wait_for_vmas(self) -> str:
        guest = {"mib": 4, "hold": 1, "run_pages": 1}
        vm = self.boot("bare", backend=Backend(mib=16), parameters=guest)
        with Deduplicator(self.settings(controls={"vma_budget": 256})) as dedup:
            dedup.attach([str(vm.qmp_path)])
            return str(dedup.run(passes=2).vms[0].reason)

    def another_vmdedup(self) -> str:
        with held_by_another(self.folder / "run"):
            return message(lambda: RuntimeDirectory(self.folder / "run"))

    def runtime_directory(self) -> str:
        (self.folder / "run").mkdir()
        (self.folder / "run").chmod(0o777)
        return message(lambda: RuntimeDirectory(self.folder / "run"))

    def no_service_at(self) -> str:
        with Client(self.folder / "vmdedup.sock") as client:
            return message(client.health)

    def no_permission_for(self) -> str:
        path = Path(f"/tmp/vmdedup-{secrets.token_hex(6)}.sock")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            try:
                path.chmod(0o600)
                listening.listen()
                with Client(path) as client:
                    os.setresuid(NOBODY, NOBODY, 0)
                    try:
                        return message(client.health)
                    finally:
                        os.setresuid(0, 0, 0)
            finally:
                path.unlink()

    def store_directory_is_not_on_tmpfs(self) -> str:
        place = Path(f"/var/tmp/vmdedup-{secrets.token_hex(6)}")
        try:
            return message(lambda: prepare_directory(place))
        finally:
            place.rmdir()

    def store_directory_is_open_to_others(self) -> str:
        self.directories.store.mkdir()
        self.directories.store.chmod(0o755)
        return message(lambda: prepare_directory(self.directories.store))

    def store_no_space_left(self) -> str:
        place = self.folder / "small"
        place.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(place)], check=True
        )
        try:
            pages = np.ones((64, 4096), dtype=np.uint8)
            with StableStore(place, "uid:0") as store:
                return message(lambda: store.publish(pages, np.zeros(64, dtype=np.uint64)))
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def store_of_another_version(self) -> str:
        store_dir = self.directories.store
        with StableStore(store_dir, "uid:0") as store:
            sums = store.path.with_suffix(SUMS_SUFFIX)
        sums.write_bytes(b"vmdedup1" + sums.read_bytes()[8:])
        return message(lambda: StableStore(store_dir, "uid:0"))

    def unknown_setting(self) -> str:
        file = self.folder / "vmdedup.toml"
        file.write_text("gate_run = 3\n")
        return message(lambda: Settings.load(file))

    def pages_to_scan(self) -> str:
        return message(lambda: change(Controls(), {"pages_to_scan": 5}, ControlFacts(0)))

    def max_page_sharing(self) -> str:
        return message(lambda: change(Controls(), {"max_page_sharing": 9}, ControlFacts(7)))

    def run_0(self) -> str:
        nothing = ("--qmp", str(self.folder / "none.qmp"))
        with running(self.directories, "--controls", "run=0", *nothing):
            return self.directories.verb("merge", code=1).stderr

    def saved_below(self) -> str:
        report = ("report", "--from", str(self.report()))
        return self.directories.verb(*report, "--fail-under", "99%", code=3).stderr

    def less_than_in_the_baseline(self) -> str:
        words = ("--baseline", str(self.report("better", 250 << 20)))
        told = self.directories.verb("report", "--from", str(self.report()), *words, code=3)
        return told.stderr.splitlines()[0]

    def not_a_report(self) -> str:
        (self.folder / "x.json").write_text("{}")
        return self.directories.verb("report", "--from", str(self.folder / "x.json"), code=2).stderr

    def the_page_has_tables_only(self) -> str:
        words = ("report", "--from", str(self.report()), "-o", str(self.folder / "page.html"))
        return self.without("plotly", *words)

    def top_needs_textual(self) -> str:
        return self.without("textual", "top")

    def top_needs_a_terminal(self) -> str:
        return self.directories.verb("top", code=2).stderr

    def parquet_needs_pyarrow(self) -> str:
        with Database(self.folder / FILE_NAME, days=1):
            pass
        words = ("--state-dir", str(self.folder), "-o", str(self.folder / "web.parquet"))
        return self.without("pyarrow", "history", *words)

    def report(self, name: str = "report", saved_bytes: int = 1 << 20) -> Path:
        file = self.folder / f"{name}.json"
        vm = vm_report("web").model_copy(update={"saved_bytes": saved_bytes})
        file.write_text(sharing([vm]).model_dump_json())
        return file

    def without(self, package: str, *words: str) -> str:
        """What a verb says on a terminal where a package is not installed."""
        master, terminal = pty.openpty()
        with os.fdopen(master, "rb", buffering=0) as screen:
            code = f"import sys; sys.modules[{package!r}] = None; " + COMMAND[-1]
            subprocess.run(
                [*COMMAND[:-1], code, *words],
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                env=self.directories.environment,
                check=False,
            )
            os.close(terminal)
            shown = b""
            try:
                while piece := screen.read(4096):
                    shown += piece
            except OSError:  # the end of a terminal
                pass
        return shown.decode()


PRODUCERS = {
    "no running QEMU found": Producers.no_running_qemu_found,
    "no socket there": Producers.no_socket_there,
    "not a QMP socket": Producers.not_a_qmp_socket,
    "monitor busy": Producers.monitor_busy,
    "its only QMP socket": Producers.its_only_qmp_socket,
    "others use its monitor": Producers.others_use_its_monitor,
    "it has no QMP monitor (": Producers.it_has_no_qmp_monitor,
    "it has no QMP monitor, only": Producers.it_has_a_human_monitor_only,
    "no mergeable memory": Producers.no_mergeable_memory,
    "trust domain none": Producers.trust_domain_none,
    "merged only while stopped": Producers.merged_only_while_stopped,
    "…: with free-page-reporting": Producers.only_zero_pages,
    "… cannot take merged pages": Producers.balloon_without_a_file,
    "wrong numbers": Producers.wrong_numbers,
    "… mergeable pages wait": Producers.mergeable_pages_wait_for_vmas,
    "another vmdedup": Producers.another_vmdedup,
    "runtime directory": Producers.runtime_directory,
    "no service at": Producers.no_service_at,
    "no permission for": Producers.no_permission_for,
    "read: its memory": Producers.its_memory_can_not_be_read,
    "its system call filter": Producers.its_system_call_filter,
    "store directory … is not": Producers.store_directory_is_not_on_tmpfs,
    "store directory … was made": Producers.store_directory_was_made_by_another,
    "store directory … is open": Producers.store_directory_is_open_to_others,
    "store …: No space": Producers.store_no_space_left,
    "….sums is not": Producers.store_of_another_version,
    "unknown setting": Producers.unknown_setting,
    "pages_to_scan": Producers.pages_to_scan,
    "max_page_sharing": Producers.max_page_sharing,
    "run=0": Producers.run_0,
    "…% saved": Producers.saved_below,
    "…: …% saved": Producers.less_than_in_the_baseline,
    "not a report": Producers.not_a_report,
    "the page has tables only": Producers.the_page_has_tables_only,
    "parquet needs pyarrow": Producers.parquet_needs_pyarrow,
    "top needs textual": Producers.top_needs_textual,
    "top needs a terminal": Producers.top_needs_a_terminal,
}
"""By the begin of the row's message."""


@pytest.mark.unit
def test_each_row_has_its_message_and_each_message_its_row() -> None:
    assert rows()
    for row in rows():
        assert [begin for begin in PRODUCERS if row.startswith(begin)], row
    for begin in PRODUCERS:
        assert len([row for row in rows() if row.startswith(begin)]) == 1, begin


@pytest.mark.qemu
@unclosed_by_httpcore
@pytest.mark.parametrize("begin", PRODUCERS)
def test_the_message_is_the_codes(
    begin: str,
    tmp_path: Path,
    directories: Directories,
    boot: Boot,
    need: Callable[[str | None], None],
) -> None:
    need(root_missing())
    (row,) = (row for row in rows() if row.startswith(begin))
    said = PRODUCERS[begin](Producers(tmp_path, directories, boot))
    said = said.strip().splitlines()[-1].strip().removeprefix("vmdedup: ")
    pattern = re.escape(row).replace("…", ".*")
    assert re.search(pattern, said), said
    assert "\n" not in said
    assert "Traceback" not in said
