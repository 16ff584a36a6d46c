"""Which thread of a real QEMU is borrowed where it is not the only one that idles."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import boot_fleet, merge
from tests.qemu.machine import Machine
from vmdedup.attach.identity import excluded_threads
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.errors import InjectionError
from vmdedup.inject.threads import executable_data, find_idle_thread, futex_wait
from vmdedup.linux.maps import read_maps
from vmdedup.linux.process import Process

pytestmark = [pytest.mark.qemu, pytest.mark.both_qemus]

QUICK = {"mib": 4, "check_per_s": 8192}

# Makes threads before QEMU makes its first, where the program is a QEMU.
LIBRARY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int in_library = -1;

static void *idle(void *word)
{
    for (;;)
        syscall(SYS_futex, word, FUTEX_WAIT, -1, NULL, NULL, 0);
    return NULL;
}

static void *asleep(void *unused)
{
    for (;;)
        pause();
    return unused;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_t thread;
    const char *manner = getenv("THREADS");
    int *word = NULL;
    if (!manner || strncmp(program_invocation_short_name, "qemu", 4))
        return;
    if (!strcmp(manner, "library"))
        word = &in_library;
    if (!strcmp(manner, "heap"))
        *(word = malloc(sizeof(int))) = -1;
    pthread_create(&thread, NULL, word ? idle : asleep, word);
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preloaded")
    (folder / "first.c").write_text(LIBRARY)
    command = ["gcc", "-shared", "-fPIC", "-pthread", str(folder / "first.c")]
    subprocess.run([*command, "-o", str(folder / "first.so")], check=True)
    return folder / "first.so"


def thread_ids(pid: int) -> list[int]:
    """In order of creation."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


@pytest.mark.parametrize("manner", ["library", "heap", "asleep"])
def test_a_preloaded_librarys_thread_is_not_taken(
    manner: str,
    library: Path,
    settings: MakeSettings,
    boot: Boot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the second thread, and idles in futex as well; the third is QEMU's RCU thread."""
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("THREADS", manner)
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=QUICK)
    monkeypatch.undo()
    for member in fleet:
        _, _, rcu, *_ = thread_ids(member.pid)
        assert find_idle_thread(member.pid, list).tid == rcu
        wait = futex_wait(member.pid, rcu)
        assert wait is not None
        assert wait.address in executable_data("vm", member.pid, read_maps("vm", member.pid))
    report = merge(settings(), fleet)
    assert [vm.status for vm in report.vms] == ["merged", "merged"]
    assert min(vm.merged_pages for vm in report.vms) > 128
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_vcpus_that_wait_for_qemus_big_lock_are_not_taken(tmp_path: Path) -> None:
    """The lock lies in QEMU's data too: what is no event is none, whoever waits for it."""
    with (
        Machine(tmp_path, "-smp", "2", "-object", "iothread,id=io0") as machine,
        MonitorLoop() as loop,
        QmpMonitor.connect(machine.own, loop) as monitor,
        Process("vm", machine.pid) as process,
    ):
        _, rcu, *_ = thread_ids(machine.pid)
        found = find_idle_thread(machine.pid, lambda: excluded_threads(monitor, process))
        assert found.tid == rcu
        others = {machine.pid, *excluded_threads(monitor, process)}
        with pytest.raises(InjectionError, match="no other waits as QEMU's RCU thread does"):
            find_idle_thread(machine.pid, lambda: [*others, rcu])
