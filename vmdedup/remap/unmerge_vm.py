"""Unmerging a whole VM: rounds of `unmerge`, as far as memory safely allows.

Owns the rounds, and the memory check, which looks at the host and at the cgroups that will
be charged. (KSM's documentation warns that unmerging too much at once "will ... arouse the
OOM killer".) Promises to leave the VM either fully unmerged, or with a stated number of pages
merged and the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import USUAL
from vmdedup.core.rmap import FIRST_SLOT, OWN
from vmdedup.errors import (
    DisturbedError,
    DrainPostponedError,
    MergeError,
    UnprotectedError,
    VmError,
)
from vmdedup.guest.mapping_state import MappingState, unfreed_pages
from vmdedup.inject.remote import RemoteThread
from vmdedup.models import UnmergedVm
from vmdedup.policy.hazards import Unmerging, unmerging
from vmdedup.remap.advice import Reapply
from vmdedup.remap.borrowed_thread import borrow_thread
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.new_memory import MappedStores, Unmerges, spendable
from vmdedup.remap.release import punch_merged
from vmdedup.remap.session import approach, lend_ram_files, open_session
from vmdedup.remap.unmerge import (
    GivenUp,
    HomeRegion,
    VmUnmerger,
    join_mappings,
    takes_blocks,
)
from vmdedup.store.stable_store import PublishedPages
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.vm.attached_vm import MEMORY_CHANGED, AttachedVm
from vmdedup.vm.lent import Lend

_EMPTY_LIVE_ROUNDS = 10
"""Rounds without an unmerged page before the rest is unmerged in a pause. Pages that a guest
writes at each timer tick succeed in some rounds, pages that it writes all the time in none."""
_EMPTY_STOPPED_ROUNDS = 2
_MOST_DISTURBANCES = 5
"""Most rounds that may find the VM changed; after another one it is left for later."""
_PATIENCE_S = 3.0
"""Longest wait for a disk that is too busy to be drained."""


def unmerge_vm(
    host: Host,
    vm: AttachedVm,
    which: npt.NDArray[np.bool_] | None = None,
    *,
    among: Unmerges | None = None,
    given_up: GivenUp | None = None,
) -> UnmergedVm:
    """Unmerge one VM, or only the pages of the mask `which` over its page space.

    `among`: what it shares with other unmerges under way. `given_up`: the guest has given the
    pages up, so that they come back as untouched memory. Raises VmError.
    """
    with told_as_merge_error(vm, "unmerge"), ExitStack() as exits:
        among = among or exits.enter_context(Unmerges())
        return _unmerge_vm(host, vm, which, among, given_up)


def _unmerge_vm(
    host: Host,
    vm: AttachedVm,
    which: npt.NDArray[np.bool_] | None,
    among: Unmerges,
    given_up: GivenUp | None,
) -> UnmergedVm:
    # Pages written since the state was read are found by each gate itself.
    state = _limited(vm.scan.known_state(), which)
    rounds = _Rounds(host, vm, which, among, given_up)
    if _merged_pages(state) and rounds.how.refusal is None:
        _punch_leftovers(vm, state)
        homes = homes_of(vm)
        try:
            state = rounds.run(homes, state)
        except VmError:
            # Content written for pages that stay merged is freed nevertheless.
            with suppress(VmError, OSError):
                _punch_leftovers(vm, vm.scan.refresh())
            raise
        if which is None and not _merged_pages(state):
            _join(host, vm, homes)
        if _merged_pages(state):
            _punch_leftovers(vm, state)
        if given_up is None:
            vm.start_over()
    return UnmergedVm(
        name=vm.name,
        pid=vm.pid,
        uuid=vm.identity.uuid,
        restored_pages=rounds.restored_pages,
        remaining_pages=_merged_pages(state),
        reason=_why_left(vm, state, rounds),
    )


class _Rounds:
    """The rounds in which a VM is unmerged, and the reasons why pages stay merged."""

    def __init__(
        self,
        host: Host,
        vm: AttachedVm,
        which: npt.NDArray[np.bool_] | None,
        among: Unmerges,
        given_up: GivenUp | None,
    ) -> None:
        self._host = host
        self._tenant = vm
        self._which = which
        self._among = among
        self._given_up = given_up
        self.how = _how(vm)
        self.restored_pages = 0
        self.hindrance: str | None = None
        """Why the VM cannot be unmerged now, `None` if it can."""
        self.shortage: str | None = None
        """Which room is lacking, `None` if none is."""
        self._disturbances = 0
        self._patient_until = time.monotonic() + _PATIENCE_S

    def run(self, homes: list[HomeRegion], state: MappingState) -> MappingState:
        """Unmerge the merged pages of `state` as far as possible; returns the state afterwards."""
        longest_run = min(USUAL.pages, self._host.settings.gate_pages)
        empty_rounds = 0
        while _merged_pages(state) and empty_rounds < _EMPTY_LIVE_ROUNDS + _EMPTY_STOPPED_ROUNDS:
            stopped = self.how.stopped or empty_rounds >= _EMPTY_LIVE_ROUNDS
            try:
                done = self._round(homes, state, longest_run, stopped=stopped)
            except (DisturbedError, UnprotectedError, DrainPostponedError) as error:
                if self._goes_on_after(error):
                    continue
                return _limited(self._tenant.scan.refresh(), self._which)
            if done is None:
                break
            self.restored_pages += done
            empty_rounds = 0 if done else empty_rounds + 1
            longest_run = max(1, longest_run // 8)
            state = _limited(self._tenant.scan.refresh(), self._which)
            if self.shortage is not None and not done:
                break  # no pause of the VM would make room
            if self._given_up is not None:
                break  # what is left has been plugged again, or is found by the next pass
        return state

    def _round(
        self, homes: list[HomeRegion], state: MappingState, longest_run: int, *, stopped: bool
    ) -> int | None:
        """How many pages were unmerged; `None` if there is no memory for any."""
        merged = _merged_pages(state)
        takes_none = nullcontext(merged)
        granted = self._among.memory.granted(self._tenant.pid, merged)
        with takes_none if self._given_up else granted as most_pages:
            if most_pages == 0:
                return None
            round_ = _Round(most_pages, longest_run, self._given_up, stopped=stopped)
            done, self.shortage = _run_round(
                self._host, self._tenant, homes, state, round_, self._among.stores
            )
            return done

    def _goes_on_after(self, error: MergeError) -> bool:
        """Whether another round may follow after one that could not be begun.

        Raises MergeError if the VM must be attached again.
        """
        if isinstance(error, DisturbedError):
            self._disturbances += 1
            if self._disturbances > _MOST_DISTURBANCES:
                raise error
            self.how = _how(self._tenant)
            return self.how.refusal is None
        is_patient = time.monotonic() < self._patient_until
        if isinstance(error, DrainPostponedError) and is_patient:  # uncovered: a busy disk's moment
            return self._tenant.storage.wait(_PATIENCE_S) or self._gives_up(error)
        return self._gives_up(error)

    def _gives_up(self, error: MergeError) -> bool:
        self.hindrance = error.reason
        return False


def _why_left(vm: AttachedVm, state: MappingState, rounds: _Rounds) -> str | None:
    """Why pages are still merged, in one line; `None` if none is."""
    remaining = _merged_pages(state)
    if not remaining:
        return None
    hindrance = rounds.how.refusal or rounds.hindrance
    if hindrance is not None:
        return f"{remaining} pages stay merged: {hindrance}"
    if rounds.shortage is not None:
        return (
            f"{remaining} pages stay merged: they need {remaining * PAGE_BYTES // MIB} MiB and"
            f" {rounds.shortage}, and unmerge again"
        )
    needed_bytes = _needing_memory(vm, state) * PAGE_BYTES
    left_bytes, where = spendable(vm.pid)
    if needed_bytes > left_bytes:
        return (
            f"{remaining} pages stay merged: {needed_bytes // MIB} MiB are needed, "
            f"{left_bytes // MIB} MiB may be taken of {where};"
            " free memory or raise its limit, and unmerge again"
        )
    return f"{remaining} pages stay merged: the guest wrote them at each attempt"


def _how(vm: AttachedVm) -> Unmerging:
    """How the VM may be unmerged now. Raises MergeError if it must be attached again."""
    if vm.has_news() and vm.changed() == MEMORY_CHANGED:
        reason = f"{MEMORY_CHANGED}; unmerge it again"
        raise MergeError(vm.name, "unmerge", reason, pid=vm.pid)
    return unmerging(vm.findings, on_store=vm.is_on_store)


def _merged_pages(state: MappingState) -> int:
    return int(np.count_nonzero(state.slot != OWN))


def _needing_memory(vm: AttachedVm, state: MappingState) -> int:
    """Number of merged pages that need memory at once: zero pages only if they take blocks."""
    needs = state.slot >= FIRST_SLOT
    for index, region in enumerate(vm.regions):
        if takes_blocks(region):
            where = vm.space.slice_of(index)
            needs[where] |= state.slot[where] != OWN
    return int(np.count_nonzero(needs))


def _limited(state: MappingState, which: npt.NDArray[np.bool_] | None) -> MappingState:
    """The state, with all pages outside of `which` marked as the VM's own."""
    if which is None:
        return state
    return replace(state, slot=np.where(which, state.slot, OWN).astype(np.int32))


@dataclass(frozen=True)
class _Round:
    """The bounds of one round. `stopped`: in a pause, for pages that guests write all the time."""

    most_pages: int
    longest_run: int
    given_up: GivenUp | None
    stopped: bool


def _run_round(
    host: Host,
    vm: AttachedVm,
    homes: list[HomeRegion],
    state: MappingState,
    how: _Round,
    stores: MappedStores,
) -> tuple[int, str | None]:
    """How many pages were unmerged, and which room is lacking, if any."""
    vm.scan.stop_dirty_tracking()
    whole = np.array(vm.space.spans(), dtype=np.int64)
    with ExitStack() as exits:
        approached = exits.enter_context(approach(host, vm, stopped=how.stopped))
        homes = with_own(vm, homes, approached.lend, approached.give)
        session = exits.enter_context(open_session(host, vm, approached, whole))
        published = stores.most_used(state)
        unmerger = unmerger_of(vm, homes, approached.remote, published, given_up=how.given_up)
        done = unmerger.unmerge(session, state, how.most_pages, how.longest_run)
        return done, unmerger.shortage


def unmerger_of(
    vm: AttachedVm,
    homes: list[HomeRegion],
    remote: RemoteThread,
    published: PublishedPages | None,
    *,
    given_up: GivenUp | None = None,
    whole: npt.NDArray[np.bool_] | None = None,
) -> VmUnmerger:
    """What unmerges pages of a VM in the session that has just been opened."""
    return VmUnmerger(
        vm.name,
        vm.pid,
        space=vm.space,
        homes=homes,
        remote=remote,
        published=published,
        mapped=vm.scan.known_state().slot,
        given_up=given_up,
        whole=whole,
    )


def with_own(
    vm: AttachedVm, homes: list[HomeRegion], lend: Lend, keep: Callable[[Sequence[int]], list[int]]
) -> list[HomeRegion]:
    """The homes with descriptors of their RAM files inside QEMU, which it does not close.

    A RAM file is lent if QEMU keeps no descriptor of it; `keep` copies lent ones there.
    """
    with vm.monitor.turn():
        numbers = lend_ram_files(vm, lend)
        lent = [home.index for home in homes if home.region.ram_fd is None]
        lent = [index for index in lent if index in numbers]
        own = keep([numbers[index] for index in lent])
    numbers |= dict(zip(lent, own, strict=True))
    return [replace(home, qemu_fd=numbers.get(home.index)) for home in homes]


def _join(host: Host, vm: AttachedVm, homes: list[HomeRegion]) -> None:
    """Map each region whose pieces the kernel cannot join as one mapping again."""
    split = [home for home in homes if home.is_shared and home.region.ram_fd is None]
    if split:
        with vm.lent.lending() as lend, borrow_thread(host, vm) as remote:
            for home in with_own(vm, split, lend, partial(vm.lent.copies, remote)):
                join_mappings(vm.name, remote, home)
                faults.reached("joined")


def _punch_leftovers(vm: AttachedVm, state: MappingState) -> None:
    """Empty the RAM files behind merged pages, so that zero pages read as zero there."""
    unfreed = unfreed_pages(vm.pid, vm.regions, vm.space, state)
    punch_merged(vm.process, vm.regions, vm.space, np.flatnonzero(unfreed))


def homes_of(vm: AttachedVm) -> list[HomeRegion]:
    """Where each region's pages go; `with_own` completes them inside a session."""
    return [
        HomeRegion(region, index, None, Reapply.of(region, vm.region_flags[index]))
        for index, region in enumerate(vm.regions)
    ]
