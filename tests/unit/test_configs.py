"""The example settings load, say every default truly, and a typing error is named.

And a secret file that others could read, or that is none, is refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vmdedup.controls import Controls, initial
from vmdedup.errors import UsageError
from vmdedup.settings import ApiTlsSettings, LibvirtSettings, Settings
from vmdedup.store.sketch_secret import read_secret

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
TABLES = {"domains", "controls", "libvirt", "api_tls"}
OPTIONAL = {"state_dir", "api_group", "api_tcp_port", "sketch_secret"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VMDEDUP_{name.upper()}", raising=False)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_loads(file: Path) -> None:
    assert isinstance(Settings.load(file).controls, Controls)


def test_there_are_three() -> None:
    assert [file.name for file in FILES] == ["cautious.toml", "ci.toml", "default.toml"]


def test_the_default_one_changes_nothing(tmp_path: Path) -> None:
    text = (CONFIGS / "default.toml").read_text()
    assert Settings.load(CONFIGS / "default.toml") == Settings()
    named = re.findall(r"^#(\w+) = ", text, re.M)
    tables = {"name", "domain", *LibvirtSettings.model_fields, *ApiTlsSettings.model_fields}
    assert set(named) == {
        *(Settings.model_fields.keys() - TABLES),
        *Controls.model_fields,
        *tables,
    }
    live = tmp_path / "live.toml"
    live.write_text(re.sub(r"^#(?=\w+ = |\[)", "", text, flags=re.M))
    settings = Settings.load(live)
    for name, field in Settings.model_fields.items():
        if name not in OPTIONAL | TABLES:
            assert getattr(settings, name) == field.default
    assert settings.controls == Controls()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gate_run = 3", "did you mean gate_runs"),
        ("[[domains]]\nnme = 'x'\ndomain = 'y'", r"domains\.0\.nme .* did you mean name\?"),
        ("[[domains]]\nsleep_m = 1\ndomain = 'y'", r"domains\.0\.sleep_m .*; docs/settings\.md"),
        ("[libvirt]\nurl = 'qemu:///system'", r"libvirt\.url .* did you mean uri\?"),
        ("[api_tls]\ncert = 'x'", r"api_tls\.cert .* did you mean certificate\?|api_tls\.address"),
        ("[api_tls]\naddress = 'x'", r"api_tls\.address"),
        ("gate_runs = 0", "gate_runs"),
        (
            "vma_budget = 300",
            r"setting vma_budget: it is a control now; set vma_budget under \[controls\]",
        ),
        ("[controls]\nvma_budget = 3", "vma_budget=3: too few"),
        ("gate_runs =", "settings file"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=named) as refused:
        Settings.load(file)
    assert "\n" not in str(refused.value)


def test_a_variable_that_is_a_control_now_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMDEDUP_GATE_DEADLINE_MS", "50")
    with pytest.raises(UsageError, match="VMDEDUP_GATE_DEADLINE_MS: it is a control now"):
        Settings.load(None)


def test_a_wrong_control_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean pages_to_scan"):
        initial({"page_to_scan": 3})


def test_a_secret_is_read_from_a_file_that_is_roots_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert read_secret(file) == b"0123456789abcdef"
    file.chmod(0o640)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, told in (
        (file, "chmod 600 it"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "gone", "No such file or directory"),
    ):
        with pytest.raises(UsageError, match=f"sketch_secret: {path}: .*{told}"):
            read_secret(path)
