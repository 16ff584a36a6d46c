"""The three results of a check: fine, a note, or a problem with its remedy."""

from __future__ import annotations

from vmdedup.models import CheckedThing


def fine(area: str, name: str, found: str) -> CheckedThing:
    """Nothing needs to be done."""
    return CheckedThing(area=area, name=name, verdict="fine", found=found)


def note(area: str, name: str, found: str, remedy: str | None = None) -> CheckedThing:
    """Merging works, but less well than it could."""
    return CheckedThing(area=area, name=name, verdict="note", found=found, remedy=remedy)


def problem(area: str, name: str, found: str, remedy: str) -> CheckedThing:
    """Merging cannot work."""
    return CheckedThing(area=area, name=name, verdict="problem", found=found, remedy=remedy)
