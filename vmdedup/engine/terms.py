"""The terms on which passes run: the current settings, controls and limits of the host."""

from __future__ import annotations

from dataclasses import dataclass

from vmdedup.errors import UsageError
from vmdedup.policy.huge_pages import PLENTY, density_in
from vmdedup.remap.context import Host
from vmdedup.settings import Settings


@dataclass(frozen=True)
class Limits:
    """KSM's controls that bound what a pass may do; `None` is no limit."""

    max_kernel_pages: int | None = None
    """Most store pages; at the limit no new one is made, existing ones gain sharers."""
    max_page_sharing: int | None = None
    """Most sites of one store page; for more sites another copy of it is made."""
    smart_scan: bool = True
    """Whether pages that stay unique are looked at ever more rarely."""
    merge_across_nodes: bool = True
    """Whether pages of different NUMA nodes may share a store page."""


NO_LIMITS = Limits(smart_scan=False)


@dataclass
class Terms:
    """The terms that all parts of an engine share. Only the engine changes them, between stages."""

    settings: Settings
    host: Host | None
    """`None` for an engine that looks and plans, and changes nothing."""
    limits: Limits
    max_map_count: int
    """Most mappings of a process: vm.max_map_count, as last read."""
    memory_state: int = PLENTY
    """How short memory is, a state of `policy.huge_pages`."""
    everywhere: bool = True
    """Whether the current pass looks at all memory, however long it has been known."""

    @property
    def huge_page_density(self) -> int:
        """Savable pages that a huge page must have to be split; `0`: each is split."""
        return density_in(self.memory_state, self.settings.controls.huge_page_density)

    def require_host(self) -> Host:
        """The host. Raises UsageError if nothing may be changed."""
        if self.host is None:
            raise UsageError("this engine only looks; it may not change a VM")
        return self.host
