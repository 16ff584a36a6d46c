"""An engine that only speaks the channel: scripted state, answers at once or when told.

It stands where the daemon's engine stands, in a thread of the test; the API
server it starts is the real one.
"""

from __future__ import annotations

import os
import select
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmdedup.daemon.api_process import ApiServer, TlsListener
from vmdedup.history.place import HistoryPlan
from vmdedup.ipc.channel import ChannelError
from vmdedup.ipc.protocol import (
    Attach,
    ByteRange,
    Command,
    CompareWithKsm,
    ControlValue,
    ControlValues,
    Detach,
    Detached,
    EngineHealth,
    Event,
    FreshReport,
    Histogram,
    MergeNow,
    ReadContentSources,
    ReadSketch,
    Refusal,
    Register,
    Registration,
    Request,
    SetControls,
    Snapshot,
    UnmergeVms,
    Unregister,
)
from vmdedup.models import (
    BackendListing,
    ContentSources,
    Durations,
    HostReport,
    KnownSource,
    Matrix,
    Model,
    SharingReport,
    Unmerged,
    UnmergedVm,
    VmList,
    VmListing,
    VmReport,
    VmSketch,
    VmStatus,
)
from vmdedup.units import PAGE_BYTES

Answer = Callable[[Command], Model | None]
"""What to answer; None: keep it waiting."""

CONTROLS: dict[str, ControlValue] = {
    "run": 1,
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "advisor_mode": "scan-time",
}


def vm_report(
    name: str, *, pid: int = 4711, merged: int = 3000, status: VmStatus = "merged"
) -> VmReport:
    return VmReport(
        name=name,
        pid=pid,
        status=status,
        reason=None if status == "merged" else f"it is {status}",
        trust_domain="uid:0",
        ram_bytes=512 << 20,
        present_bytes=300 << 20,
        merged_pages=merged,
        zero_pages=500,
        cow_broken_pages=17,
        deferred_pages=0,
        vmas=900,
        saved_bytes=(merged // 2 + 500) * PAGE_BYTES,
        gates=12,
        stops=0,
        huge_pages=7,
        huge_pages_split=2,
        pages_kept_in_huge=128,
        cold_pages=1024,
        cold_bytes_saved=3 << 20,
        cold_refaults_per_s=0.5,
    )


def sharing(vms: list[VmReport]) -> SharingReport:
    merged = sum(vm.merged_pages for vm in vms)
    saved_bytes = sum(vm.saved_bytes for vm in vms)
    return SharingReport(
        converged=True,
        host=HostReport(
            pages_shared=merged // 2,
            pages_sharing=merged // 2,
            pages_unshared=40,
            pages_volatile=5,
            zero_pages=sum(vm.zero_pages for vm in vms),
            cow_broken_pages=sum(vm.cow_broken_pages for vm in vms),
            full_scans=3,
            pages_scanned=123_456,
            saved_bytes=saved_bytes,
            overhead_bytes=1 << 20,
            profit_bytes=saved_bytes - (1 << 20),
            stopped_ms=12.5,
            huge_pages=sum(vm.huge_pages or 0 for vm in vms),
            huge_pages_split=sum(vm.huge_pages_split or 0 for vm in vms),
            pages_kept_in_huge=sum(vm.pages_kept_in_huge or 0 for vm in vms),
            cold_pages=sum(vm.cold_pages for vm in vms),
            cold_bytes_saved=sum(vm.cold_bytes_saved for vm in vms),
            cold_refaults_per_s=sum(vm.cold_refaults_per_s for vm in vms),
            gate_ms=Durations(count=2, p50=1.0, p95=2.0, p99=2.0, max=2.0),
            drain_ms=Durations(),
        ),
        vms=vms,
        matrix=Matrix(vms=[vm.name for vm in vms], pages=[[1] * len(vms) for _ in vms]),
    )


def listing(name: str) -> VmListing:
    backend = BackendListing(
        id="ram0", kind="memfd", size_bytes=512 << 20, share=True, mergeable=True
    )
    return VmListing(
        name=name,
        pid=4711,
        qmp=f"/run/vms/{name}.qmp",
        qemu_version="7.2.0",
        trust_domain="uid:0",
        mergeable=True,
        reason=None,
        backends=[backend],
    )


class ScriptedEngine:
    """Serves the channel of an API server in a thread."""

    names: list[str]
    controls: dict[str, ControlValue]
    commands: list[Command]
    waiting: list[Request]
    answer: Answer

    def __init__(
        self,
        runtime_dir: Path,
        *,
        tcp_port: int | None = None,
        tls: TlsListener | None = None,
        history: HistoryPlan | None = None,
    ) -> None:
        self.reset()
        self.failure: ChannelError | None = None
        self._passes = 0
        self._started_unix_s = time.time()
        self._wake_read, self._wake_fd = os.pipe2(os.O_CLOEXEC)
        self.api = ApiServer(runtime_dir, tcp_port=tcp_port, tls=tls, history=history)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pause()
        self.api.close()
        os.close(self._wake_read)
        os.close(self._wake_fd)

    def reset(self) -> None:
        """Know the VMs web and db, and have been asked nothing."""
        self.names = ["web", "db"]
        self.controls = dict(CONTROLS)
        self.commands = []
        self.waiting = []
        self.answer = self.obey

    def pause(self) -> None:
        """Look at the channel no more; it stays open."""
        if self._thread.is_alive():
            os.write(self._wake_fd, b"e")
            self._thread.join()

    def push(self, *events: Event) -> None:
        self._passes += 1
        self.api.channel.push(self.snapshot(*events))

    def snapshot(self, *events: Event) -> Snapshot:
        return Snapshot(
            unix_s=time.time(),
            report=sharing([vm_report(name) for name in self.names]),
            vms=VmList(vms=[listing(name) for name in self.names]),
            controls=ControlValues(values=self.controls),
            health=EngineHealth(
                engine_pid=os.getpid(),
                started_unix_s=self._started_unix_s,
                passes=self._passes,
                last_pass_unix_s=time.time(),
                last_pass_ms=250.0,
            ),
            events=events,
            gates=Histogram().plus([0.4, 1.5, 9_000]),
        )

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.api.channel, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if self._wake_read in ready:
                    return
                for request in self.api.channel.poll():
                    self._handle(request)
        except ChannelError as error:
            self.failure = error

    def _handle(self, request: Request) -> None:
        self.commands.append(request.command)
        result = self.answer(request.command)
        if result is None:
            self.waiting.append(request)
        elif isinstance(result, Refusal):
            self.api.channel.refuse(request.id, result)
        else:
            self.push()
            self.api.channel.reply(request.id, result)

    def obey(self, command: Command) -> Model:
        """Do as asked, in words."""
        match command:
            case SetControls():
                return self._set(command.values)
            case Attach():
                return self._attach(Path(command.qmp).stem)
            case FreshReport() | ReadSketch() | ReadContentSources() | CompareWithKsm():
                return self._read(command)
            case MergeNow() | UnmergeVms():
                return self._change_many(command)
            case Register() | Unregister() | Detach():
                return self._change_one(command)

    def _read(
        self, command: FreshReport | ReadSketch | ReadContentSources | CompareWithKsm
    ) -> Model:
        if isinstance(command, ReadContentSources):
            return content_sources(command)
        if isinstance(command, ReadSketch):
            is_there = command.vm in (*self.names, "4711")
            return sketch(command) if is_there else _no_vm(command.vm)
        return sharing([vm_report(name) for name in self.names])

    def _attach(self, name: str) -> Model:
        if name in self.names:
            return Refusal(kind="conflict", message=f"{name}: is attached already")
        return listing(name)

    def _change_many(self, command: MergeNow | UnmergeVms) -> Model:
        named = self.names if command.vms is None else command.vms
        for name in named:
            if name not in self.names:
                return _no_vm(name)
        if isinstance(command, MergeNow):
            return sharing([vm_report(name) for name in named])
        return Unmerged(vms=[_unmerged(name) for name in named], store_removed=True)

    def _change_one(self, command: Register | Unregister | Detach) -> Model:
        if command.vm not in self.names:
            return _no_vm(command.vm)
        if isinstance(command, Detach):
            return Detached(vm=command.vm, pid=4711, merged_pages=3000)
        span = ByteRange(
            offset_bytes=command.offset_bytes, length_bytes=command.length_bytes or 4096
        )
        return Registration(
            vm=command.vm, backend=command.backend, complete=True, registered=(span,)
        )

    def _set(self, values: dict[str, ControlValue]) -> Model:
        for name in values:
            if name not in self.controls:
                return Refusal(kind="usage", message=f"no control {name!r}")
        self.controls.update(values)
        return ControlValues(values=self.controls)


def _no_vm(name: str) -> Refusal:
    return Refusal(kind="not-found", message=f"no VM named {name!r}")


def content_sources(command: ReadContentSources) -> ContentSources:
    return ContentSources(
        known=[KnownSource(path=path, kind="folder", pages=5) for path in command.known],
        shared_pages=10,
        explained_pages=5,
        vms=[],
        pairs=[],
    )


def sketch(command: ReadSketch) -> VmSketch:
    return VmSketch(
        vm=command.vm,
        pid=4711,
        trust_domain="uid:0",
        key_id="00",
        rate=command.rate,
        ram_bytes=512 << 20,
        still_pages=3000,
        zero_pages=500,
        marks=b64encode(b"\0" * 7 + b"\xf0").decode(),
        pages=b64encode(b"\1\0\0\0").decode(),
    )


def _unmerged(name: str) -> UnmergedVm:
    return UnmergedVm(name=name, pid=4711, restored_pages=3000, remaining_pages=0)
