"""Numbers in readable form.

Owns the wording of sizes, counts and shares; pure, no rich.
"""

from __future__ import annotations

from vmdedup.models import HostReport
from vmdedup.units import PAGE_BYTES

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(amount_bytes: int) -> str:
    """`6.0 MiB`: one digit after the point, binary units."""
    rest, power = float(amount_bytes), 0
    # 1023.95 would be printed as 1024.0.
    while abs(rest) >= 1023.95 and power < len(_UNITS) - 1:
        rest /= 1024
        power += 1
    return f"{rest:,.{1 if power else 0}f} {_UNITS[power]}"


def page_size(pages: int) -> str:
    """The size of so many pages."""
    return size(pages * PAGE_BYTES)


def count(number: int | None) -> str:
    """`12,345`; a dash for an unknown number."""
    return "-" if number is None else f"{number:,}"


def share(part: int, whole: int) -> str:
    """`42.1%`; a dash if the whole is 0."""
    return "-" if whole == 0 else f"{100 * part / whole:.1f}%"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 min`, `3 h`, `5 days`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length_s, least_s in (("days", 86_400, 172_800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= least_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{seconds:.0f} s"


def milliseconds(value: float | None) -> str:
    """`1.24 ms`; a dash for a value that was not measured."""
    return "-" if value is None else f"{value:.2f} ms"


def cold_words(host: HostReport) -> str:
    """What cold pages give back beside the savings; empty if there are none."""
    if not host.cold_pages and not host.cold_refaults_per_s:
        return ""
    pages = number_of(host.cold_pages, "cold page")
    return (
        f"{size(host.cold_bytes_saved)} more given back by {pages} paged out,"
        f" {host.cold_refaults_per_s:.1f}/s come back soon"
    )


def number_of(number: int, thing: str) -> str:
    """`1 VM`, `2 VMs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
