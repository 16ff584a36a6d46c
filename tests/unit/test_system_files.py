"""Files for the system in configs/, read by the programs that they are for."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.harness.capabilities import root_missing
from tests.release.container import IMAGE, documented_run
from vmdedup.linux.capabilities import ENGINE
from vmdedup.linux.syscalls import NR
from vmdedup.remap.domain_store import remove_unused_stores
from vmdedup.settings import Settings
from vmdedup.store.stable_store import StableStore

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"
UNIT = CONFIGS / "vmdedup.service"
CONTAINER = CONFIGS / "container"
MOST_EXPOSED = 40
"""Of systemd-analyze's 100; a unit without any restriction has 96."""
Need = Callable[[str | None], None]


def program_missing(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} on this machine"


def run(*words: str | Path, code: int = 0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """The root of another system, with the users of this one."""
    root = tmp_path / "system"
    (root / "etc").mkdir(parents=True)
    for name in ("passwd", "group"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    return root


def test_the_unit_is_little_exposed(need: Need) -> None:
    need(program_missing("systemd-analyze"))
    options = ["--offline=yes", f"--threshold={MOST_EXPOSED}", "--no-pager"]
    report = run("systemd-analyze", "security", *options, UNIT)
    assert "Overall exposure level" in report


def allowed_calls(*names: str) -> set[str]:
    """The system calls of a SystemCallFilter=, its sets taken apart."""
    calls = {name for name in names if not name.startswith("@")}
    for name in {*names} - calls:
        _, *listed = run("systemd-analyze", "--no-pager", "syscall-filter", name).split("\n")
        words = (line.strip() for line in listed)
        calls |= allowed_calls(*(word for word in words if word and not word.startswith("#")))
    return calls


def test_the_unit_allows_what_is_called(need: Need) -> None:
    """mincore was not: with shared memory swapped out the engine ended at every start."""
    need(program_missing("systemd-analyze"))
    (line,) = re.findall(r"^SystemCallFilter=(.*)$", UNIT.read_text(), re.M)
    assert {call.name.lower() for call in NR} - allowed_calls(*line.split()) == set()


def test_the_unit_restarts_with_its_directories() -> None:
    text = UNIT.read_text()
    lines = [f"{kind}Directory=vmdedup" for kind in ("Runtime", "State", "Cache")]
    for line in (*lines, "StateDirectoryMode=0700", "CacheDirectoryMode=0700"):
        assert f"\n{line}\n" in text


def test_the_unit_makes_the_store_directory_and_adopts_nobodys(tmp_path: Path) -> None:
    """As tmpfiles.d has it; what is there already is left for vmdedup to refuse."""
    (line,) = re.findall(r"^ExecStartPre=-(.*)$", UNIT.read_text(), re.M)
    program, *words, path = line.split()
    assert path == str(Settings.model_fields["store_dir"].default)
    folder = tmp_path / "vmdedup"
    run(program, *words, folder)
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o1700
    folder.chmod(0o755)
    run(program, *words, folder)
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o700, 0o1700])
def test_a_store_directory_that_was_made_for_us_stays(mode: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vmdedup-", dir="/dev/shm") as parent:
        folder = Path(parent) / "store"
        folder.mkdir()
        folder.chmod(mode)
        with StableStore(folder, "a") as store:
            assert store.path.exists()
        assert remove_unused_stores(folder)
        assert folder.exists() == bool(mode & stat.S_ISVTX)
        assert not folder.exists() or not list(folder.iterdir())


def test_sysctl_reads_its_file(need: Need) -> None:
    need(program_missing("sysctl"))
    read = run("sysctl", "--dry-run", "--load", CONFIGS / "sysctl.d/60-vmdedup.conf")
    name, _, value = read.strip().partition(" = ")
    assert name == "vm.max_map_count"
    assert 65_530 < int(value) < 1 << 31


def test_tmpfiles_makes_the_directories_and_leaves_those_that_are_there(
    system: Path, need: Need
) -> None:
    need(program_missing("systemd-tmpfiles") or root_missing())
    file = CONFIGS / "tmpfiles.d/vmdedup.conf"
    made = [system / "run/vmdedup", system / "var/lib/vmdedup"]
    run("systemd-tmpfiles", f"--root={system}", "--create", file)
    for folder in made:
        found = folder.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o700, 0, 0)
    store_dir = system / str(Settings.model_fields["store_dir"].default).lstrip("/")
    assert stat.S_IMODE(store_dir.lstat().st_mode) == 0o1700  # so that it stays
    made[0].chmod(0o710)
    run("systemd-tmpfiles", f"--root={system}", "--create", file)
    assert stat.S_IMODE(made[0].lstat().st_mode) == 0o710
    assert f"/{made[0].relative_to(system)}" == str(Settings.model_fields["runtime_dir"].default)
    assert f"x {Settings.model_fields['store_dir'].default}\n" in file.read_text()
    broken = system / "broken.conf"
    broken.write_text(file.read_text().replace(":0700", "rwx"))
    run("systemd-tmpfiles", f"--root={system}", "--create", broken, code=65)


def test_sysusers_makes_the_group(system: Path, need: Need) -> None:
    need(program_missing("systemd-sysusers") or root_missing())
    run("systemd-sysusers", f"--root={system}", CONFIGS / "sysusers.d/vmdedup.conf")
    assert re.search(r"^vmdedup:x:\d+:$", (system / "etc/group").read_text(), re.M)
    assert "vmdedup" not in (system / "etc/passwd").read_text()


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert run(hadolint, CONTAINER / "Containerfile") == ""


def test_hadolint_looks(tmp_path: Path) -> None:
    worse = tmp_path / "Containerfile"
    text = (CONTAINER / "Containerfile").read_text()
    worse.write_text(text.replace("--no-install-recommends", "").replace(":12-slim", ""))
    said = run(Path(sys.executable).with_name("hadolint"), worse, code=1)
    assert {"DL3015", "DL3006"} <= set(re.findall(r"DL\d{4}", said))


def test_the_image_is_built_from_what_there_is() -> None:
    text = (CONTAINER / "Containerfile").read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.+)$", text, re.M)]
    assert all((CONFIGS.parent / name).exists() for names in copied for name in names)
    (extra,) = re.findall(r"/src\[(\w+)\]", text)
    assert f"\n{extra} = [" in (CONFIGS.parent / "pyproject.toml").read_text()


def test_the_documented_container_has_what_the_daemon_needs() -> None:
    words = documented_run()
    given = {name: value for name, value in pairwise(words) if name.startswith("--")}
    assert {f"CAP_{name}" for name in given["--cap-add"].split(",")} == {c.label for c in ENGINE}
    assert given["--pid"] == "host"
    mounts = [value for name, value in pairwise(words) if name == "--volume"]
    fields = Settings.model_fields
    kept = [fields["store_dir"].default.parent, fields["runtime_dir"].default]
    assert {f"{folder}:{folder}" for folder in kept} < set(mounts)
    _, *command = words[words.index(IMAGE) :]
    assert command[:2] == ["run", "--config"]
    assert any(f"{Path(command[2]).parent}:" in mount for mount in mounts)


def test_kubernetes_knows_every_field() -> None:
    validate = Path(sys.executable).with_name("kubernetes-validate")
    said = run(validate, "--strict", CONTAINER / "daemonset.yaml")
    assert said.count(" passed ") == 3


def test_the_daemonset_fits_together(tmp_path: Path) -> None:
    text = (CONTAINER / "daemonset.yaml").read_text()
    kinds = {document["kind"]: document for document in yaml.safe_load_all(text)}
    pod = kinds["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    folders = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert folders.keys() == {volume["name"] for volume in pod["volumes"]}
    defaults = {name: Settings.model_fields[name].default for name in ("runtime_dir", "store_dir")}
    assert folders["runtime"] == defaults["runtime_dir"]
    assert folders["shm"] == defaults["store_dir"].parent
    (name,) = kinds["ConfigMap"]["data"]
    assert container["args"] == ["run", "--config", str(folders["settings"] / name)]
    assert container["image"] == f"vmdedup:{version('vmdedup')}"
    file = tmp_path / name
    file.write_text(kinds["ConfigMap"]["data"][name])
    (rule,) = Settings.load(file).domains
    assert rule.domain == "zero-only"
    assert rule.matches("any VM", 107, ("/kubepods/burstable/pod1",))
