"""The snapshot as Prometheus metrics.

Owns names, help texts and units of the metrics. Promises base units (bytes,
seconds, pages counted), counters that only grow while the engine runs, and no
sample for an unknown value. `sum(vmdedup_pages_sharing)` is the host's
pages_sharing and `sum(vmdedup_saved_bytes)` its saved_bytes: both are shared
out fairly. VMs that are gone have no samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from vmdedup.ipc.protocol import ControlValues, Histogram, Snapshot
from vmdedup.models import MemoryPlace, VmReport, VmStatus
from vmdedup.policy.refusals import REFUSALS
from vmdedup.units import PAGE_BYTES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HOST_GAUGES = {
    "pages_shared": "Store pages in use.",
    "pages_unshared": "Guest pages that are unique, but checked again and again.",
    "pages_volatile": "Guest pages that change too fast to be merged.",
    "overhead_bytes": "Memory that vmdedup itself takes: bookkeeping, mappings, processes.",
    "profit_bytes": "Saved memory less overhead.",
    "store_swapped_pages": "Store pages in use that are swapped out.",
    "stable_node_chains": "Always 0: a copy of a content has a slot of its own.",
    "stable_node_dups": "Store pages that are copies (max_page_sharing, or for fewer mappings).",
}
_HOST_COUNTERS = {
    "full_scans": "Whole passes over all VMs.",
    "pages_scanned": "Guest pages looked at.",
    "pages_skipped": "Guest pages that smart scan passed over.",
    "huge_pages_split": "Huge pages of which merging took some pages, as events.",
    "cow_breaks": "Writes to merged pages, as events; cow_broken_pages counts the pages.",
}
_VM_GAUGES = {
    "merged_pages": "Guest pages that stand on a store page.",
    "zero_pages": "Guest pages on the kernel's zero page.",
    "cow_broken_pages": "Merged guest pages that the guest has written since.",
    "deferred_pages": "Guest pages that wait for VMA budget, or for room in the store.",
    "huge_pages": "Huge pages of 2 MiB that back guest RAM.",
    "pages_kept_in_huge": "Mergeable guest pages in huge pages not worth splitting.",
    "saved_bytes": "Memory saved, shared out fairly: the sum is the host's.",
    "ram_bytes": "Guest RAM.",
    "present_bytes": "Memory that the VM would hold without vmdedup.",
    "vmas": "Memory mappings of the QEMU process.",
    "unique_pages": "Guest pages never merged that equal no other page.",
    "volatile_pages": "Guest pages never merged that change too fast to be.",
    "swapped_pages": "Guest pages that are swapped out and left alone.",
    "absent_pages": "Guest pages never touched, or discarded.",
    "ballooned_pages": "Merged guest pages in its balloon or unplugged, a lower bound; not saved.",
    "perhaps_discarded_pages": "Merged guest pages reported as free, an upper bound.",
    "left_to_unmerge_pages": "Guest pages still to be unmerged.",
    "cold_pages": "Guest pages that vmdedup paged out as cold and that are still out.",
    "cold_bytes_saved": "Memory given back by cold pages; no part of saved_bytes.",
    "cold_refaults_per_s": "Guest pages a second that came back within a minute.",
}
_PLACE_GAUGES = {
    "memory_needed_bytes": ("needed_bytes", "New memory if all merged pages are written."),
    "memory_there_bytes": ("there_bytes", "Memory that may still be taken, swap included."),
    "memory_breaks_per_second": ("breaks_per_s", "Merged pages written a second, lately."),
    "memory_reserve_bytes": ("reserve_bytes", "Memory that must stay free for bursts of writes."),
    "memory_short": ("short", "1 if less than the reserve is there and merged pages can take it."),
    "memory_lasts_seconds": ("lasts_s", "Time until memory is used up at that rate, if it can be."),
}
_STATUSES: tuple[VmStatus, ...] = ("merged", "scanning", "failed", "refused", "gone")


def exposition(snapshot: Snapshot, version: str) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot, version))
    return generate_latest(registry)


class SnapshotCollector(Collector):
    """Yields the metrics of one snapshot."""

    def __init__(self, snapshot: Snapshot, version: str) -> None:
        self._snapshot = snapshot
        self._version = version

    def collect(self) -> Iterable[Metric]:
        """All metrics, those of the host first."""
        yield from self._host()
        yield from _memory_metrics(self._snapshot.report.memory)
        yield from _vm_metrics(self._snapshot.report.vms)
        yield from self._durations()
        yield from self._engine()
        yield _controls(self._snapshot.controls)

    def _host(self) -> Iterable[Metric]:
        values = self._snapshot.report.host.model_dump()
        for name, text in _HOST_GAUGES.items():
            if values.get(name) is not None:
                yield GaugeMetricFamily(f"vmdedup_{name}", text, value=values[name])
        for name, text in _HOST_COUNTERS.items():
            if values.get(name) is not None:
                yield CounterMetricFamily(f"vmdedup_{name}", text, value=values[name])

    def _durations(self) -> Iterable[Metric]:
        host = self._snapshot.report.host
        if host.stopped_ms is not None:
            yield CounterMetricFamily(
                "vmdedup_stopped_seconds",
                "Time for which vmdedup paused VMs.",
                value=host.stopped_ms / 1000,
            )
        if self._snapshot.gates is not None:
            text = "Time for which a writing guest thread could be held."
            yield _histogram("vmdedup_gate_seconds", text, self._snapshot.gates)
        if self._snapshot.drains is not None:
            text = "Time that disk requests in flight took to end."
            yield _histogram("vmdedup_drain_seconds", text, self._snapshot.drains)

    def _engine(self) -> Iterable[Metric]:
        health = self._snapshot.health
        build = GaugeMetricFamily("vmdedup_build_info", "Version.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield GaugeMetricFamily(
            "vmdedup_engine_start_time_seconds",
            "Unix time of the engine's start.",
            value=health.started_unix_s,
        )
        yield CounterMetricFamily(
            "vmdedup_engine_cpu_seconds", "CPU time the engine has used.", value=health.cpu_s
        )
        yield GaugeMetricFamily(
            "vmdedup_snapshot_time_seconds",
            "Unix time at which the engine took these figures.",
            value=self._snapshot.unix_s,
        )
        if health.last_pass_unix_s is not None:
            yield GaugeMetricFamily(
                "vmdedup_last_pass_time_seconds",
                "Unix time of the last pass's end.",
                value=health.last_pass_unix_s,
            )
        if health.last_pass_ms is not None:
            yield GaugeMetricFamily(
                "vmdedup_last_pass_duration_seconds",
                "Duration of the last pass.",
                value=health.last_pass_ms / 1000,
            )


def _memory_metrics(places: list[MemoryPlace]) -> Iterable[Metric]:
    for name, (field, text) in _PLACE_GAUGES.items():
        family = GaugeMetricFamily(f"vmdedup_{name}", text, labels=["place"])
        for place in places:
            value = getattr(place, field)
            if value is not None:
                family.add_metric([place.place], value)
        yield family
    paused = GaugeMetricFamily(
        "vmdedup_memory_paused_vms", "VMs paused until there is memory.", labels=["place"]
    )
    for place in places:
        paused.add_metric([place.place], len(place.paused_vms))
    yield paused


def _vm_metrics(reports: list[VmReport]) -> Iterable[Metric]:
    by_status = Counter(report.status for report in reports)
    states = GaugeMetricFamily("vmdedup_vms", "VMs known, by status.", labels=["status"])
    for status in _STATUSES:
        states.add_metric([status], by_status[status])
    yield states
    by_reason = Counter(report.refusal for report in reports if report.status == "refused")
    refused = GaugeMetricFamily(
        "vmdedup_refused_vms", "VMs that are not merged, by the kind of reason.", labels=["reason"]
    )
    known = sum(by_reason[reason] for reason in REFUSALS)
    for reason in REFUSALS:
        # A kind that only a newer engine knows must not become a label of its own.
        others = by_reason.total() - known if reason == "other" else 0
        refused.add_metric([reason], by_reason[reason] + others)
    yield refused
    yield GaugeMetricFamily(
        "vmdedup_leaving_vms",
        "VMs that still share pages of a trust domain that they have left.",
        value=sum(report.leaves_domain is not None for report in reports),
    )
    labelled = _labelled(reports)
    sharing = GaugeMetricFamily(
        "vmdedup_pages_sharing",
        "Guest pages saved by sharing store pages, shared out fairly: the sum is KSM's.",
        labels=["vm"],
    )
    for label, report in labelled.items():
        saved_pages = report.saved_bytes / PAGE_BYTES - report.zero_pages
        sharing.add_metric([label], max(0.0, saved_pages))
    yield sharing
    for name, text in _VM_GAUGES.items():
        family = GaugeMetricFamily(f"vmdedup_{name}", text, labels=["vm"])
        for label, report in labelled.items():
            value = getattr(report, name)
            if value is not None:
                family.add_metric([label], value)
        yield family


def _controls(controls: ControlValues) -> Metric:
    """The controls that are numbers; words have no value."""
    family = GaugeMetricFamily("vmdedup_control", "Value of a control.", labels=["name"])
    for name, value in controls.values.items():
        if not isinstance(value, str):
            family.add_metric([name], value)
    return family


def _labelled(reports: list[VmReport]) -> dict[str, VmReport]:
    """VMs by label: the name, with the pid if several have the same."""
    here = [report for report in reports if report.status != "gone"]
    uses = Counter(report.name for report in here)
    labelled: dict[str, VmReport] = {}
    for report in here:
        alone = uses[report.name] == 1
        labelled[report.name if alone else f"{report.name} (pid {report.pid})"] = report
    return labelled


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds = [*(str(bound) for bound in histogram.upper_bounds_s), "+Inf"]
    cumulative = list(accumulate(histogram.counts))
    buckets = list(zip(bounds, cumulative, strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum_s)
