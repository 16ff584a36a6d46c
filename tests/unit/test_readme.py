"""What the README says of tables and settings is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmdedup.policy.controls import as_table
from vmdedup.policy.hazards import as_markdown
from vmdedup.settings import Settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_hazard_table_is_the_codes() -> None:
    assert as_markdown() in README


def test_the_control_table_is_the_codes() -> None:
    assert as_table() in README


def test_every_setting_is_explained_with_its_description() -> None:
    for name, field in Settings.model_fields.items():
        assert re.search(
            rf"^\| `{name}` \|.*\| {re.escape(field.description or '')} \|$", README, re.M
        )


def test_the_example_environment_names_every_setting() -> None:
    named = set(re.findall(r"^#(VMDEDUP_\w+)=", (ROOT / "configs/vmdedup.env").read_text(), re.M))
    assert named == {f"VMDEDUP_{name.upper()}" for name in Settings.model_fields}


def test_the_example_environment_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (ROOT / "configs/vmdedup.env").read_text().splitlines():
        if match := re.match(r"#(VMDEDUP_\w+)=(.*)", line):
            monkeypatch.setenv(match[1], match[2].strip("'"))
    settings = Settings()
    assert settings.domains[0].domain == "ci"
