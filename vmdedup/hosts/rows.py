"""One row for each host, whether it answered or not, and the report made of them.

Owns the reasons of a row. Promises that each host of the list has exactly one row, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vmdedup.hosts.ask import Answer
from vmdedup.hosts.documents import FleetReport, HostRow

_SHOWN_REASONS = 5


def fleet_report(answers: Sequence[Answer]) -> FleetReport:
    """The totals of all hosts that answered."""
    rows = host_rows(answers)
    return FleetReport(
        hosts=rows,
        vms=sum(row.vms for row in rows),
        present_bytes=sum(row.present_bytes for row in rows),
        saved_bytes=sum(row.saved_bytes for row in rows),
    )


def host_rows(answers: Sequence[Answer]) -> list[HostRow]:
    """A row for each host, with all that keeps its VMs from being compared."""
    usual = _usual_keys(answers)
    return [_row(answer, [*answer.reasons, *_key_problems(answer, usual)]) for answer in answers]


def _row(answer: Answer, reasons: Sequence[str]) -> HostRow:
    shown = list(dict.fromkeys(reasons))
    more = len(shown) - _SHOWN_REASONS
    text = "; ".join(shown[:_SHOWN_REASONS]) + (f"; and {more} more" if more > 0 else "")
    vms = [] if answer.report is None else answer.report.vms
    return HostRow(
        host=answer.host.name,
        url=answer.host.url,
        reason=text or None,
        vms=len(vms),
        present_bytes=sum(vm.present_bytes for vm in vms),
        saved_bytes=0 if answer.report is None else answer.report.host.saved_bytes,
    )


def _usual_keys(answers: Sequence[Answer]) -> dict[str, str]:
    """The key that most hosts have, of each trust domain."""
    found: dict[str, Counter[str]] = {}
    for answer in answers:
        for domain, key in {(vm.trust_domain, vm.sketch.key_id) for vm in answer.vms}:
            found.setdefault(domain, Counter())[key] += 1
    return {domain: keys.most_common(1)[0][0] for domain, keys in found.items()}


def _key_problems(answer: Answer, usual: dict[str, str]) -> list[str]:
    found = []
    for vm in answer.vms:
        if vm.only_here:
            found.append(f"its VMs are compared only with each other: {vm.only_here}")
        elif vm.sketch.key_id != usual[vm.trust_domain]:
            found.append(
                f"its VMs of trust domain {vm.trust_domain} are compared only with each other: its"
                " sketch_secret is not that of most hosts"
            )
    return found
