"""The answers of many hosts, asked side by side.

Owns the limits of time and number. Promises one answer for each host, in order: what it said, or
the reason in one line; a host that is away, slow or answers nonsense holds up none of the
others. Refuses to believe a sketch whose numbers do not fit together.
"""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vmdedup.client import AsyncClient, ServiceError
from vmdedup.core.sketch import MAX_MARKS, Sketch
from vmdedup.hosts.inventory import HostEntry, Inventory
from vmdedup.models import SharingReport, VmReport, VmSketch
from vmdedup.units import PAGE_BYTES, require_rate

_AT_ONCE = 32
"""Hosts asked at the same time: each is an ssh process here and there."""

_MOST_VMS = 10_000


@dataclass(frozen=True)
class SketchedVm:
    """One VM and its sketch."""

    host: str
    name: str
    trust_domain: str
    uuid: str | None
    present_bytes: int
    ram_bytes: int
    sketch: Sketch
    only_here: str | None
    qmp: str | None = None
    """Path of its monitor's socket on its host."""


@dataclass
class Answer:
    """What a host said, or why nothing."""

    host: HostEntry
    report: SharingReport | None = None
    vms: list[SketchedVm] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def ask_all(inventory: Inventory, *, timeout_s: float, rate: int | None) -> list[Answer]:
    """Every host's report and, with a `rate`, the sketches of its VMs."""
    return asyncio.run(_ask_all(inventory, timeout_s, rate))


async def _ask_all(inventory: Inventory, timeout_s: float, rate: int | None) -> list[Answer]:
    again = inventory.again()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def ask(number: int, host: HostEntry) -> Answer:
        answer = Answer(host)
        if number in again:
            answer.reasons.append("another host of the list has this name: give it one of its own")
            return answer
        async with gate:
            try:
                async with asyncio.timeout(timeout_s), AsyncClient(host.url) as client:
                    await _ask(client, answer, rate)
            except TimeoutError:
                answer.reasons.append(f"not done after {timeout_s:g} s; raise --timeout")
            except ServiceError as error:
                answer.reasons.append(str(error).removeprefix(f"{host.url}: "))
        return answer

    answers = await asyncio.gather(*(ask(n, host) for n, host in enumerate(inventory.hosts)))
    _drop_moved(answers)
    return answers


async def _ask(client: AsyncClient, answer: Answer, rate: int | None) -> None:
    report = await client.report()
    if len(report.vms) > _MOST_VMS or any(
        min(vm.present_bytes, vm.ram_bytes, vm.saved_bytes) < 0 for vm in report.vms
    ):
        raise ServiceError("its report makes no sense")
    answer.report = report
    if rate is None:
        return
    monitors = {vm.pid: vm.qmp for vm in (await client.vms()).vms}
    for vm in report.vms:
        if not vm.is_served:
            continue
        try:
            document = await client.sketch(str(vm.pid), rate=rate)
            answer.vms.append(_vm(answer.host.name, vm, document, monitors.get(vm.pid)))
        except ServiceError as error:
            if error.status is None:
                raise
            answer.reasons.append(f"{vm.name}: {error}")
        except ValueError as error:
            answer.reasons.append(f"{vm.name}: its sketch makes no sense: {error}")


def _vm(host: str, vm: VmReport, document: VmSketch, qmp: str | None) -> SketchedVm:
    """The VM with its sketch. Raises ValueError if that cannot be one."""
    if document.pid != vm.pid:
        raise ValueError("it is of another VM")
    return SketchedVm(
        host=host,
        name=vm.name,
        trust_domain=document.trust_domain,
        uuid=document.uuid,
        present_bytes=vm.present_bytes,
        ram_bytes=document.ram_bytes,
        sketch=checked(document),
        only_here=document.only_here,
        qmp=qmp,
    )


def checked(document: VmSketch) -> Sketch:
    """The sketch in a document. Raises ValueError if its numbers do not fit together."""
    require_rate(document.rate)
    try:
        mark = np.frombuffer(b64decode(document.marks, validate=True), dtype="<u8")
        pages = np.frombuffer(b64decode(document.pages, validate=True), dtype="<u4")
    except binascii.Error as error:
        raise ValueError("no base64") from error
    if len(mark) != len(pages) or len(mark) > MAX_MARKS:
        raise ValueError("wrong number of marks")
    if (mark[1:] <= mark[:-1]).any():
        raise ValueError("marks out of order")
    if (pages == 0).any() or int(pages.sum(dtype=np.uint64)) > document.still_pages:
        raise ValueError("more sampled pages than pages")
    if not 0 <= document.still_pages + document.zero_pages <= document.ram_bytes // PAGE_BYTES:
        raise ValueError("more pages than memory")
    sketch = Sketch(document.key_id, document.rate, mark.astype(np.uint64), pages.astype(np.uint32))
    if len(sketch.only_at(document.rate)) < len(sketch):
        raise ValueError("marks of a finer rate")
    return sketch


def _drop_moved(answers: Sequence[Answer]) -> None:
    """Leave a VM that moved while hosts were asked, by its UUID, to the last host that has it."""
    last = {vm.uuid: number for number, each in enumerate(answers) for vm in each.vms if vm.uuid}
    for number, answer in enumerate(answers):
        gone = [vm for vm in answer.vms if vm.uuid and last[vm.uuid] != number]
        for vm in gone:
            there = answers[last[vm.uuid or ""]].host.name
            answer.reasons.append(f"{vm.name}: has moved to {there} meanwhile, and counts there")
        answer.vms = [vm for vm in answer.vms if vm not in gone]
