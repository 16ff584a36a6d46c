"""No field of what vmdedup prints or serves may disappear: programs read them.

`schema_fields.json` has every field by model. A new field is added to it with

    python -m tests.unit.test_schema_stable

A field that goes, or changes its meaning, needs a new `SCHEMA_VERSION`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from vmdedup import models
from vmdedup.controls import Controls
from vmdedup.ipc import protocol

pytestmark = pytest.mark.unit

SNAPSHOT = Path(__file__).with_name("schema_fields.json")
INTERNAL = {"Model", "RequestFrame", "SnapshotFrame", "TakenFrame", "ReplyFrame", "Snapshot"}
"""What only our own processes say to each other."""


def fields() -> dict[str, list[str]]:
    """The fields of every published model, and the controls."""
    found = {"Controls": sorted(Controls.model_fields)}
    for module in (models, protocol):
        found |= _of(module)
    return dict(sorted(found.items()))


def _of(module: ModuleType) -> dict[str, list[str]]:
    return {
        name: sorted(kind.model_fields)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, models.Model) and name not in INTERNAL
    }


def snapshot() -> dict[str, list[str]]:
    document: dict[str, dict[str, list[str]]] = json.loads(SNAPSHOT.read_text())
    return document[f"version {models.SCHEMA_VERSION}"]


@pytest.mark.parametrize("model", snapshot())
def test_no_field_disappears(model: str) -> None:
    assert set(snapshot()[model]) <= set(fields().get(model, []))


def test_every_field_is_in_the_snapshot() -> None:
    assert fields() == snapshot(), "run python -m tests.unit.test_schema_stable and commit"


def test_documents_carry_their_version() -> None:
    documents = "SharingReport VmList ControlValues EventList Health History Unmerged"
    for name in documents.split():
        assert "schema_version" in snapshot()[name]


if __name__ == "__main__":
    document = {f"version {models.SCHEMA_VERSION}": fields()}
    SNAPSHOT.write_text(json.dumps(document, indent=1) + "\n")
