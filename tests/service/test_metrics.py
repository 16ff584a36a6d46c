"""The metrics are valid Prometheus text, in base units, and add up."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.engine import ScriptedEngine, sharing, vm_report
from tests.service.test_channel import snapshot
from vmdedup.api.metrics import exposition
from vmdedup.ipc.protocol import Histogram
from vmdedup.models import HostReport, VmReport
from vmdedup.policy.refusals import REFUSALS

pytestmark = pytest.mark.process

Samples = dict[str, dict[tuple[str, ...], float]]


def samples(text: str) -> Samples:
    """Values by sample name and label values; every family is documented and unique."""
    found: Samples = {}
    names: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type != "unknown"
        assert family.name not in names
        names.add(family.name)
        assert not family.name.endswith(("_ms", "_percent", "_kb"))
        for sample in family.samples:
            by_label = found.setdefault(sample.name, {})
            labels = tuple(sample.labels.values())
            assert labels not in by_label
            by_label[labels] = sample.value
    return found


def of(*vms: VmReport) -> Samples:
    state = snapshot().model_copy(update={"report": sharing(list(vms))})
    return samples(exposition(state, "1").decode())


def test_the_service_exposes_what_the_report_says(
    engine: ScriptedEngine, http: httpx.Client
) -> None:
    response = http.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = samples(response.text)
    report = engine.snapshot().report
    assert found["vmdedup_pages_shared"][()] == report.host.pages_shared
    assert sum(found["vmdedup_pages_sharing"].values()) == report.host.pages_sharing
    assert sum(found["vmdedup_saved_bytes"].values()) == report.host.saved_bytes
    assert found["vmdedup_cow_broken_pages"] == {("web",): 17, ("db",): 17}
    assert found["vmdedup_zero_pages"] == {("web",): 500, ("db",): 500}
    assert found["vmdedup_full_scans_total"][()] == 3
    assert found["vmdedup_pages_scanned_total"][()] == 123_456
    assert found["vmdedup_stopped_seconds_total"][()] == 0.0125
    assert found["vmdedup_gate_seconds_count"][()] == 3
    assert found["vmdedup_gate_seconds_bucket"][("0.0025",)] == 2
    assert found["vmdedup_gate_seconds_bucket"][("+Inf",)] == 3
    assert found["vmdedup_build_info"] != {}


def test_what_is_not_known_has_no_sample() -> None:
    state = snapshot()
    host = state.report.host.model_copy(
        update={"full_scans": None, "pages_unshared": None, "stopped_ms": None}
    )
    vms = [vm_report("web").model_copy(update={"deferred_pages": None})]
    report = state.report.model_copy(update={"host": host, "vms": vms})
    found = samples(exposition(state.model_copy(update={"report": report}), "1").decode())
    for name in ("full_scans_total", "pages_unshared", "stopped_seconds_total", "deferred_pages"):
        assert f"vmdedup_{name}" not in found
    assert "vmdedup_gate_seconds_count" not in found


def test_names_of_vms_may_be_anything_and_need_not_be_unique() -> None:
    odd = 'we"ird\\name\nwith {labels="x"}'
    found = of(vm_report(odd), vm_report("twin", pid=1), vm_report("twin", pid=2))
    assert set(found["vmdedup_merged_pages"]) == {(odd,), ("twin (pid 1)",), ("twin (pid 2)",)}


def test_vms_are_counted_by_status_and_those_gone_have_no_samples() -> None:
    found = of(vm_report("web"), vm_report("web", status="gone"), vm_report("x", status="refused"))
    assert found["vmdedup_vms"] == {
        ("merged",): 1,
        ("scanning",): 0,
        ("failed",): 0,
        ("refused",): 1,
        ("gone",): 1,
    }
    assert set(found["vmdedup_vmas"]) == {("web",), ("x",)}


def test_refused_vms_are_counted_by_kind_and_no_kind_is_new() -> None:
    refused = [vm_report(f"vm{number}", status="refused") for number in range(4)]
    kinds = ("nested", "nested", "a kind of next year", None)
    vms = [vm.model_copy(update={"refusal": kind}) for vm, kind in zip(refused, kinds, strict=True)]
    found = of(vm_report("web"), *vms)["vmdedup_refused_vms"]
    assert set(found) == {(kind,) for kind in REFUSALS}
    assert {kind: count for (kind,), count in found.items() if count} == {"nested": 2, "other": 2}


def test_events_are_counted_apart_from_what_stands() -> None:
    report = sharing([vm_report("web")])
    host = report.host.model_copy(update={"cow_breaks": 1234})
    state = snapshot().model_copy(update={"report": report.model_copy(update={"host": host})})
    found = samples(exposition(state, "1").decode())
    assert found["vmdedup_cow_breaks_total"][()] == 1234
    assert found["vmdedup_cow_broken_pages"] == {("web",): 17}


def test_every_counter_of_the_report_is_exposed() -> None:
    host = sharing([vm_report("web")]).host
    everything = {name: 1 for name, value in host if value is None}
    of_vm = {"huge_pages": 1, "pages_kept_in_huge": 1}
    report = sharing([vm_report("web").model_copy(update=of_vm)])
    full = report.model_copy(update={"host": host.model_copy(update=everything)})
    state = snapshot().model_copy(update={"report": full, "gates": Histogram().plus([1.0])})
    state = state.model_copy(update={"drains": Histogram().plus([1.0])})
    found = set(samples(exposition(state, "1").decode()))
    same = {
        "ksm_zero_pages": "zero_pages",
        "general_profit": "profit_bytes",
        "kernel_pages_allocated": "pages_shared",
        "stopped_ms": "stopped_seconds_total",
        "gate_ms": "gate_seconds_count",
        "drain_ms": "drain_seconds_count",
    }
    for name in HostReport.model_fields:
        metric = f"vmdedup_{same.get(name, name)}"
        assert found & {metric, f"{metric}_total"}, name


def test_a_histogram_counts_a_bound_in_and_adds_up() -> None:
    histogram = Histogram().plus([0.5, 0.500001]).plus([6000])
    assert histogram.counts[:2] == (1, 1)
    assert histogram.counts[-1] == 1
    assert histogram.sum_s == pytest.approx(6.001, abs=1e-5)
