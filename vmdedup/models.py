"""What users and other programs see: reports, plans and listings, as pydantic models.

Owns the JSON shapes. `schema_version` grows when a field changes its meaning or
goes; new fields may come at any time. Numbers are in the unit their name says;
a field is null where only a scan of this process could know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Model(BaseModel):
    """Base: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Durations(Model):
    """Distribution of a duration in milliseconds; null percentiles when nothing was measured."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class HostReport(Model):
    """KSM's counters under KSM's names, over all VMs."""

    pages_shared: int = Field(description="store pages in use")
    pages_sharing: int = Field(description="further guest pages that share them: pages saved")
    pages_unshared: int | None = Field(description="unique pages that are checked again and again")
    pages_volatile: int | None = Field(description="pages that change too fast to be merged")
    zero_pages: int = Field(description="guest pages on the kernel's zero page")
    cow_broken_pages: int = Field(description="merged pages the guest has written since")
    full_scans: int | None = Field(description="whole passes of this engine")
    pages_scanned: int | None = Field(description="pages this engine has looked at")
    saved_bytes: int = Field(description="guest memory that exists once instead of often")
    overhead_bytes: int | None = Field(
        description="memory for store bookkeeping, VMAs, our processes"
    )
    profit_bytes: int | None = Field(description="saved_bytes less overhead_bytes")
    stopped_ms: float | None = Field(description="time for which vmdedup paused VMs")
    pages_skipped: int | None = Field(default=None, description="pages passed over by smart scan")
    ksm_zero_pages: int = Field(default=0, description="KSM's name of zero_pages")
    stable_node_chains: int = Field(
        default=0, description="always 0: a copy of a content has a slot of its own, not a chain"
    )
    stable_node_dups: int = Field(
        default=0,
        description="store pages that are copies (max_page_sharing, or for fewer mappings)",
    )
    store_swapped_pages: int = Field(
        default=0, description="store pages swapped out; one is read in once, for all its VMs"
    )
    cold_pages: int = Field(
        default=0, description="pages that this engine paged out as cold and that are still out"
    )
    cold_bytes_saved: int = Field(
        default=0, description="memory given back by cold_pages; no part of saved_bytes"
    )
    cold_refaults_per_s: float = Field(
        default=0, description="pages a second that came back within a minute of being paged out"
    )
    general_profit: int | None = Field(default=None, description="KSM's name of profit_bytes")
    kernel_pages_allocated: int = Field(
        default=0, description="name of pages_shared in the first KSM (2009)"
    )
    cow_breaks: int | None = Field(
        default=None, description="writes to merged pages since this engine's start, as events"
    )
    huge_pages: int | None = Field(
        default=None,
        description="huge pages of 2 MiB that back guest RAM; null where the kernel does not tell",
    )
    huge_pages_split: int | None = Field(
        default=None, description="huge pages of which merging took some pages, as events"
    )
    pages_kept_in_huge: int | None = Field(
        default=None,
        description="mergeable pages in huge pages not worth splitting (huge_page_density)",
    )
    gate_ms: Durations = Field(description="time for which a gate could hold a writer")
    drain_ms: Durations = Field(description="time that disk requests in flight took to end")


VmStatus = Literal["merged", "scanning", "failed", "refused", "gone"]


class VmReport(Model):
    """One VM."""

    name: str
    pid: int | None
    uuid: str | None = Field(default=None, description="UUID of the libvirt domain")
    status: VmStatus
    reason: str | None = Field(description="why it is failed, refused, gone or deferred")
    hint: str | None = Field(default=None, description="change that would make it merge better")
    trust_domain: str | None
    ram_bytes: int
    present_bytes: int = Field(description="memory that it would hold without vmdedup")
    merged_pages: int = Field(description="pages that stand on a store page")
    zero_pages: int
    cow_broken_pages: int
    deferred_pages: int | None = Field(
        description="mergeable pages that wait for VMA budget, or for room in the store"
    )
    needed_max_map_count: int | None = Field(
        default=None, description="the vm.max_map_count that would admit the deferred pages"
    )
    vmas: int
    saved_bytes: int = Field(description="fair share of the saving; all VMs' sum is the host's")
    gates: int | None
    stops: int | None
    ksm_rmap_items: int = Field(default=0, description="pages that have a row in our columns")
    ksm_zero_pages: int = Field(default=0, description="KSM's name of zero_pages")
    ksm_merging_pages: int = Field(default=0, description="KSM's name of merged_pages")
    ksm_process_profit: int = Field(
        default=0, description="saved_bytes less our memory for this VM, bytes"
    )
    ksm_mergeable: bool = Field(default=False, description="whether anything is registered")
    refusal: str | None = Field(
        default=None, description="kind of reason, one of a fixed set; null if not refused"
    )
    cow_breaks: int | None = Field(
        default=None, description="writes to its merged pages since it was attached, as events"
    )
    absent_pages: int | None = Field(default=None, description="pages never touched, or discarded")
    swapped_pages: int | None = Field(default=None, description="pages swapped out and left alone")
    ballooned_pages: int = Field(
        default=0,
        description="merged and zero pages in its balloon or unplugged, a lower bound",
    )
    perhaps_discarded_pages: int = Field(
        default=0,
        description="merged and zero pages that its guest may have reported as free, an upper"
        " bound; those save nothing",
    )
    unique_pages: int | None = Field(
        default=None, description="pages never merged, and equal to no other page"
    )
    volatile_pages: int | None = Field(
        default=None, description="pages never merged, and changing too fast to be"
    )
    left_to_unmerge_pages: int = Field(
        default=0, description="pages still to be unmerged; vmdedup tries again until it is done"
    )
    leaves_domain: str | None = Field(
        default=None, description="trust domain that it has left and whose pages it still shares"
    )
    huge_pages: int | None = Field(
        default=None,
        description="huge pages of 2 MiB that back its RAM; null where the kernel does not tell",
    )
    huge_pages_split: int | None = Field(
        default=None, description="its huge pages of which merging took some pages, as events"
    )
    pages_kept_in_huge: int | None = Field(
        default=None,
        description="mergeable pages in huge pages not worth splitting (huge_page_density)",
    )
    cold_pages: int = Field(
        default=0, description="pages that this engine paged out as cold and that are still out"
    )
    cold_bytes_saved: int = Field(
        default=0,
        description="memory given back by cold_pages, less its share of what zram and zswap take",
    )
    cold_refaults_per_s: float = Field(
        default=0, description="pages a second that came back within a minute of being paged out"
    )

    @property
    def is_served(self) -> bool:
        """Whether it is attached to and merging it works, as far as is known."""
        return self.status in ("merged", "scanning")


class Matrix(Model):
    """`pages[i][j]`: distinct non-zero store contents that VMs i and j both map.

    The diagonal counts the contents that VM i maps itself.
    """

    vms: list[str]
    pages: list[list[int]]


class RepeatedContent(Model):
    """A content that many merged pages have."""

    pages: int = Field(description="guest pages that show it")
    store_pages: int = Field(
        description="store pages it takes: `0` for zeroes, more than 1 for copies"
    )
    vms: int = Field(description="VMs that have it")
    what: str | None = Field(description="kind of content, if its bytes tell")


class HistorySample(Model):
    """The sharing at one time, for the time line of a report."""

    unix_s: float
    saved_bytes: int
    present_bytes: int
    overhead_bytes: int | None = None
    cow_breaks: int | None = None
    vms: int = Field(description="VMs that were merged or scanned")
    pages_shared: int | None = None
    pages_sharing: int | None = None
    zero_pages: int | None = None
    gates: int | None = Field(default=None, description="gates since the engine's start")
    stopped_ms: float | None = Field(default=None, description="time for which vmdedup paused VMs")
    gate_p99_ms: float | None = Field(
        default=None, description="99th percentile of the latest gates' durations"
    )
    gate_max_ms: float | None = Field(default=None, description="longest of the latest gates")
    cow_broken_pages: int | None = Field(
        default=None, description="pages in a merged mapping that the guest has written since"
    )
    unique_pages: int | None = Field(
        default=None, description="pages never merged, and equal to no other page"
    )


class History(Model):
    """The sharing over time, the oldest sample first.

    A sample may stand for several: levels are then their average, counters and
    peaks (`cow_breaks`, `gates`, `stopped_ms`, `gate_p99_ms`, `gate_max_ms`) their highest.
    """

    schema_version: int = SCHEMA_VERSION
    samples: list[HistorySample]
    interval_s: float = Field(description="time that one sample stands for")
    vm: str | None = Field(
        default=None, description="VM whose samples these are; null for all VMs together"
    )


class KsmVm(Model):
    """What KSM, and vmdedup, would save of one VM."""

    name: str
    pid: int
    scanned_pages: int = Field(description="private pages that KSM would look at")
    merging_pages: int = Field(description="pages that would stand on a KSM page")
    zero_pages: int = Field(description="pages that KSM would put on the zero page")
    saved_bytes: int = Field(description="fair share of what KSM would save")
    vmdedup_saved_bytes: int = Field(description="fair share of what vmdedup would save")


class KsmComparison(Model):
    """What the kernel's KSM would save on the same VMs, if no page changed.

    KSM's own words and settings; private memory only, over all trust domains.
    """

    max_page_sharing: int = Field(description="KSM's setting: most mappings of a KSM page")
    use_zero_pages: bool = Field(description="KSM's setting: zeroes go onto the zero page")
    pages_shared: int = Field(description="KSM pages in use")
    pages_sharing: int = Field(description="further pages that share them: pages saved")
    zero_pages: int = Field(description="pages on the zero page: pages saved")
    saved_bytes: int = Field(description="memory that KSM would save")
    general_profit: int = Field(description="saved_bytes less KSM's 64 bytes a scanned page")
    vmdedup_saved_bytes: int = Field(
        description="memory that vmdedup would save by the same contents, within trust domains"
    )
    vms: list[KsmVm]
    notes: list[str] = Field(default=[], description="where the count is only a bound, and why")


class KnownSource(Model):
    """A file or folder on the host whose contents were looked for."""

    path: str
    kind: str
    pages: int = Field(description="distinct non-zero pages that it has")
    parts: int = Field(
        default=0, description="names inside it: members of an archive, files of a folder or disk"
    )


class SourcePages(Model):
    """Pages of one VM whose content comes from one source."""

    source: str | None = Field(description="path of the known source; null: in none of them")
    part: str = Field(
        description="name inside the source, empty for all else; with a final slash: files of a"
        " folder that are not named apart"
    )
    shared_pages: int = Field(description="pages whose content another page has too")
    unique_pages: int


class VmSources(Model):
    """One VM's non-zero pages in memory, by the source of their content."""

    name: str
    pid: int
    zero_pages: int
    sources: list[SourcePages] = Field(description="most pages first")


class PairPages(Model):
    """Contents that two VMs both have, from one source."""

    source: str | None
    part: str
    pages: int = Field(description="distinct contents")


class PairSources(Model):
    """The contents that two VMs both have, by source."""

    vms: list[str]
    sources: list[PairPages] = Field(description="most contents first")


class ContentSources(Model):
    """Where the contents of the VMs' memory come from."""

    schema_version: int = SCHEMA_VERSION
    known: list[KnownSource]
    shared_pages: int = Field(description="non-zero pages whose content another page has too")
    explained_pages: int = Field(description="those of shared_pages that are in a known source")
    vms: list[VmSources]
    pairs: list[PairSources] = Field(description="most contents first, at most 200")


class MemoryPlace(Model):
    """Memory that is needed if all merged pages are written, and memory that is there.

    One for the host, and one for each memory cgroup with a limit that VMs are in.
    """

    place: str = Field(description="`host`, or the folder of the cgroup")
    vms: list[str] = Field(description="VMs whose pages take memory of it")
    needed_bytes: int = Field(
        description="new memory if all merged pages of these VMs are written, zero pages too"
    )
    available_bytes: int = Field(
        description="MemAvailable of the host, or the rest below the cgroup's limit, file cache"
        " included"
    )
    swap_bytes: int = Field(description="memory that may still be swapped out to make room")
    breaks_per_s: float | None = Field(
        default=None, description="merged pages that these VMs write a second, over half a minute"
    )
    lasts_s: float | None = Field(
        default=None,
        description="seconds until the memory is used up at that rate; null if it suffices, or"
        " the rate is unknown or 0",
    )

    reserve_bytes: int | None = Field(
        default=None,
        description="memory that must stay free for bursts of writes, by the controls; null in a"
        " plan",
    )
    short: bool = Field(
        default=False,
        description="whether less than the reserve is there, and merged pages can take it",
    )
    paused_vms: list[str] = Field(
        default=[], description="VMs that are paused until there is memory"
    )

    @property
    def there_bytes(self) -> int:
        """Memory that may still be taken, with what may be swapped out."""
        return self.available_bytes + self.swap_bytes

    @property
    def is_lacking(self) -> bool:
        """Whether more is needed if all is written than is there."""
        return self.needed_bytes > self.there_bytes


class SharingReport(Model):
    """The sharing of all VMs, read from the kernel's page tables."""

    schema_version: int = SCHEMA_VERSION
    converged: bool | None
    host: HostReport
    vms: list[VmReport]
    matrix: Matrix
    contents: list[RepeatedContent] = Field(
        default=[], description="the most repeated contents, most pages first"
    )
    ksm: KsmComparison | None = Field(
        default=None, description="what KSM would save on the same VMs; null if nobody asked"
    )
    sources: ContentSources | None = Field(
        default=None, description="where the contents come from; null if nobody asked"
    )
    memory: list[MemoryPlace] = Field(
        default=[],
        description="memory needed if all is written, and there; the host first. Empty in a report"
        " of some VMs",
    )

    def to_libvirt(self, controls: Mapping[str, object] | None = None) -> dict[str, int]:
        """The counters as virNodeGetMemoryParameters names them (`virsh node-memory-tune`).

        With the `controls` of the daemon also what is tuned there. A counter that only
        a scan knows is left out where there was none.
        """
        tuned = controls or {}
        values = {
            "pages_to_scan": tuned.get("pages_to_scan"),
            "sleep_millisecs": tuned.get("sleep_millisecs"),
            "pages_shared": self.host.pages_shared,
            "pages_sharing": self.host.pages_sharing,
            "pages_unshared": self.host.pages_unshared,
            "pages_volatile": self.host.pages_volatile,
            "full_scans": self.host.full_scans,
            "merge_across_nodes": tuned.get("merge_across_nodes"),
        }
        return {f"shm_{name}": value for name, value in values.items() if isinstance(value, int)}


class CheckedRule(Model):
    """A rule for a report, and whether the report keeps it."""

    rule: str = Field(description="min_saved, max_gate_ms, max_stops or max_broken_pages")
    limit: float = Field(description="limit of the rule, in the unit of its name; percent if none")
    found: float | None = Field(description="what the report has; null if it does not know")
    holds: bool
    message: str


class Judgement(Model):
    """The result of `vmdedup assert`."""

    schema_version: int = SCHEMA_VERSION
    ok: bool = Field(description="whether all rules hold")
    rules: list[CheckedRule]


class CheckedThing(Model):
    """One finding of `vmdedup doctor`."""

    area: str = Field(description="kernel, privileges, limits, host or vms")
    name: str
    verdict: Literal["fine", "note", "problem"] = Field(
        description="note: merging works, less well; problem: it cannot work"
    )
    found: str
    remedy: str | None = Field(default=None, description="action that helps")


class Diagnosis(Model):
    """The result of `vmdedup doctor`."""

    schema_version: int = SCHEMA_VERSION
    can_merge: bool
    checks: list[CheckedThing]


class BackendListing(Model):
    """A memory backend of a VM."""

    id: str
    kind: str
    size_bytes: int
    share: bool
    mergeable: bool
    reason: str | None = None


class FindingListing(Model):
    """A hazard that was found on a VM."""

    key: str
    verdict: str
    reason: str


class VmListing(Model):
    """A VM that was found, whether it can be merged or not."""

    name: str
    pid: int | None
    uuid: str | None = Field(default=None, description="UUID of the libvirt domain")
    qmp: str | None
    monitor: Literal["kept", "shared"] | None = Field(
        default=None,
        description="whether the connection to `qmp` is kept, or left after each turn",
    )
    qemu_version: str | None
    trust_domain: str | None
    mergeable: bool
    reason: str | None
    left_to_unmerge_pages: int = Field(
        default=0, description="pages still to be unmerged; vmdedup tries again until it is done"
    )
    leaves_domain: str | None = Field(
        default=None, description="trust domain that it has left and whose pages it still shares"
    )
    backends: list[BackendListing] = []
    findings: list[FindingListing] = []


class VmList(Model):
    """All VMs found."""

    schema_version: int = SCHEMA_VERSION
    vms: list[VmListing]


class VmContents(Model):
    """How one VM's pages (or an image's) repeat, by content."""

    name: str
    total_pages: int
    zero_pages: int
    nonzero_pages: int
    distinct_pages: int
    duplicate_pages: int


class ContentAnalysis(Model):
    """Exact content counts over VMs and images.

    `matrix[i][j]`: distinct non-zero contents both hold; the diagonal is the
    duplicates within i.
    """

    schema_version: int = SCHEMA_VERSION
    total_pages: int
    zero_pages: int
    nonzero_pages: int
    distinct_pages: int
    duplicate_pages: int
    vms: list[VmContents]
    matrix: list[list[int]]


class VmPlan(Model):
    """The plan of a merge for one VM."""

    name: str
    pid: int
    uuid: str | None = Field(default=None, description="UUID of the libvirt domain")
    trust_domain: str
    mergeable_pages: int
    zero_pages: int
    deferred_pages: int
    vmas_now: int
    vmas_after: int
    vma_budget: int


class DomainPlan(Model):
    """The plan of a merge for one trust domain."""

    trust_domain: str
    vms: list[str]
    new_store_pages: int
    saved_pages: int


class MergePlan(Model):
    """A dry run: what would be saved and at what VMA cost. Nothing was touched."""

    schema_version: int = SCHEMA_VERSION
    saved_bytes: int
    vms: list[VmPlan]
    domains: list[DomainPlan]
    refused: list[VmListing]
    memory: list[MemoryPlace] = Field(
        default=[],
        description="memory needed if all is written, and there, once the plan is carried out",
    )


class Funnel(Model):
    """One VM's RAM, page by page, from all to saved; the parts sum to `ram_pages`.

    A page counts under one part: the first that applies of `core.counters.funnel`.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    ram_pages: int
    absent_pages: int = Field(description="pages never touched, or discarded")
    swapped_pages: int = Field(description="pages swapped out; a pass never reads them in")
    volatile_pages: int = Field(
        description="pages that changed between the last two looks, or were looked at once"
    )
    unique_pages: int = Field(description="pages that hold still and equal no other page")
    other_domain_pages: int = Field(description="pages with an equal only in other trust domains")
    deferred_pages: int = Field(description="pages that have a partner and wait for VMA budget")
    kept_in_huge_pages: int = Field(
        default=0,
        description="pages that have a partner, or are zero, and wait while a huge page is kept:"
        " theirs, or the partner's",
    )
    pending_pages: int = Field(
        description="pages that have a partner, or are zero, and are not merged yet"
    )
    broken_pages: int = Field(
        description="pages in a merged mapping that the guest has written: cow_broken_pages"
    )
    merged_pages: int = Field(description="pages that share a store page")
    zero_pages: int = Field(description="pages that share the zero page")


class VerifiedVm(Model):
    """The result of checking one VM's merges on the spot."""

    name: str
    pid: int
    checked_pages: int
    wrong_pages: int
    unchecked_pages: int = Field(description="pages without a published checksum to compare with")
    swapped_pages: int = Field(
        default=0, description="pages swapped out, and not read in to be checked"
    )
    leftovers: list[str] = Field(
        description="mappings, descriptors and notes that vmdedup left behind"
    )


class Verification(Model):
    """The result of `vmdedup verify`."""

    schema_version: int = SCHEMA_VERSION
    ok: bool
    vms: list[VerifiedVm]
    gone: list[str] = Field(default=[], description="VMs that ended before they were checked")


class VmSketch(Model):
    """A sample of one VM's contents, to estimate what it would share with any other VM.

    Of all contents of pages that hold still and are not zero, one in `rate` is in the sample,
    the same ones on every host.
    """

    schema_version: int = SCHEMA_VERSION
    vm: str
    pid: int
    uuid: str | None = Field(default=None, description="UUID of the libvirt domain")
    trust_domain: str
    key_id: str = Field(description="sketches with the same can be compared, others cannot")
    only_here: str | None = Field(
        default=None, description="why no other host has this key; null if others may have it"
    )
    rate: int = Field(description="contents for each one in the sample")
    ram_bytes: int
    still_pages: int = Field(description="pages that hold still and are not zero")
    zero_pages: int
    marks: str = Field(
        description="a keyed hash of each sampled content, ascending: 64-bit numbers, little"
        " endian, in base64"
    )
    pages: str = Field(
        description="pages that have each of these contents: 32-bit numbers, as `marks`"
    )


class UnmergedVm(Model):
    """The result of unmerging one VM."""

    name: str
    pid: int
    uuid: str | None = Field(default=None, description="UUID of the libvirt domain")
    restored_pages: int
    remaining_pages: int
    reason: str | None = Field(default=None, description="why pages stay merged, and what to do")

    @property
    def is_stuck(self) -> bool:
        """Whether not all of it was unmerged, as far as is known."""
        return self.remaining_pages > 0 or self.reason is not None


class Unmerged(Model):
    """The result of `vmdedup unmerge`."""

    schema_version: int = SCHEMA_VERSION
    vms: list[UnmergedVm]
    store_removed: bool
