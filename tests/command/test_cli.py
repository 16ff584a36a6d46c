"""The command as users meet it: a process, its exit code, its two streams."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from vmdedup.accounting.analyze import ImageSource, QmpSource, Source
from vmdedup.cli import analyze, main

pytestmark = [pytest.mark.command, pytest.mark.alone]

COMMAND = [sys.executable, "-c", "from vmdedup.cli.main import main; main()"]
QUICK = {"VMDEDUP_MONITOR_TIMEOUT_MS": "200"}


@pytest.fixture
def own_directories(tmp_path: Path) -> dict[str, str]:
    """Nothing of the host's own vmdedup is used."""
    return {"VMDEDUP_RUNTIME_DIR": str(tmp_path / "run")}


def vmdedup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    assert done.stderr.endswith("\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("vmdedup: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Missing command"),
        (["mrege"], "mrege"),
        (["set"], "NAME=VALUE"),
        (["set", "run"], "run"),
        (["run", "--controls", "run"], "run"),
        (["run", "--controls", "page_to_scan=1"], "did you mean pages_to_scan"),
        (["report", "--fail-under", "half"], "half"),
        (["register", "web"], "BACKEND"),
        (["vms", "--bogus"], "--bogus"),
        (["run", "--passes", "0"], "--passes"),
        (["run", "--passes", "many"], "--passes"),
        (["run", "--once", "--until-converged"], "--until-converged"),
        (["run", "--once", "--passes", "2"], "--passes"),
        (["run", "--vma-budget", "3"], "vma_budget"),
        (["run", "--gate-runs", "1000"], "gate_runs"),
        (["run", "--mask", "ksm"], "mask"),
        (["run", "--domain", "web"], "--domain web"),
        (["vms", "--domain", "=shop"], "--domain =shop"),
        (["explain"], "VM"),
        (["schema", "nothing"], "nothing"),
        (["history", "--since", "1y"], "--since 1y"),
        (["history", "--format", "xml"], "xml"),
        (["history", "--format", "parquet"], "-o FILE"),
        (["history", "-o", "history.txt"], "history.txt"),
        (["report", "--compare", "swap"], "--compare swap"),
        (["report", "--compare", "KSM", "--from", "x.json"], "--compare"),
        (["explain", "--contents"], "--known"),
        (["explain", "web", "--contents", "--known", "/"], "leave VM out"),
        (["explain", "web", "--known", "/"], "--contents"),
        (["explain", "--contents", "--known", "/nothing/there"], "/nothing/there"),
        (["assert"], "no rule"),
        (["history", "--max-points", "6001"], "6001"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], named: str) -> None:
    done = vmdedup(*arguments)
    assert done.returncode == 2
    assert named in only_line(done)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "environment", [{"VMDEDUP_GATE_RUNS": "0"}, {"VMDEDUP_MASK": "stub"}, {"VMDEDUP_MASK": '["x"]'}]
)
def test_settings_from_the_environment_are_checked(environment: dict[str, str]) -> None:
    done = vmdedup("vms", **environment)
    assert done.returncode == 2
    (name,) = environment
    assert name.removeprefix("VMDEDUP_").lower() in only_line(done)


@contextmanager
def listening(path: Path, says: bytes) -> Iterator[None]:
    """A socket whose first client is greeted with `says`; without, nobody ever is."""
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(path))
        server.listen()

        def greet() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(says)
                connection.recv(1 << 16)

        greeter = threading.Thread(target=greet)
        if says:
            greeter.start()
        yield
        if says:
            greeter.join()


@pytest.mark.parametrize(
    "verb",
    [
        "get",
        "set run=0",
        "merge",
        "register web ram0",
        "unregister web ram0",
        "attach web.qmp",
        "detach web",
        "events",
    ],
)
def test_no_daemon_runs(tmp_path: Path, verb: str) -> None:
    """One line: where it was looked for, and how to start one."""
    done = vmdedup(*verb.split(), "--runtime-dir", str(tmp_path), VMDEDUP_RUNTIME_DIR="/nothing")
    assert done.returncode == 1
    line = only_line(done)
    assert str(tmp_path / "vmdedup.sock") in line
    assert "vmdedup run" in line
    assert done.stdout == ""


def test_an_unknown_setting_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("gate_run = 7\n")
    done = vmdedup("run", "--config", str(file))
    assert done.returncode == 2
    assert "did you mean gate_runs?" in only_line(done)


VERBS = ["vms", "analyze", "run --once", "run --dry-run", "report", "explain web", "verify"]


@pytest.mark.parametrize("verb", [*VERBS, "unmerge"])
def test_no_socket_there(tmp_path: Path, verb: str, own_directories: dict[str, str]) -> None:
    path = tmp_path / "nothing"
    done = vmdedup(*verb.split(), "--qmp", str(path), **own_directories)
    assert done.returncode == 1
    assert only_line(done) == f"vmdedup: {path}: no socket there"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("says", "reason"),
    [(b"", "monitor busy"), (b"220 mail\r\n", "not a QMP socket"), (b"{}\n", "not a QMP socket")],
)
def test_not_a_usable_monitor(tmp_path: Path, says: bytes, reason: str) -> None:
    with listening(tmp_path / "socket", says):
        done = vmdedup("report", "--qmp", str(tmp_path / "socket"), **QUICK)
    assert done.returncode == 1
    assert reason in only_line(done)


@pytest.mark.parametrize("verb", ["vms", "report", "run --once", "run --dry-run", "analyze"])
def test_json_is_one_document_also_when_nothing_was_served(
    tmp_path: Path, verb: str, own_directories: dict[str, str]
) -> None:
    done = vmdedup(*verb.split(), "--json", "--qmp", str(tmp_path / "nothing"), **own_directories)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    only_line(done)


def test_analyze_prints_json_and_nothing_else(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"a" * 4096 + b"b" * 4096 + b"a" * 4096 + bytes(4096) + b"end")
    done = vmdedup("analyze", "--ram-file", str(image), "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    counts = {
        "total_pages": 5,
        "zero_pages": 1,
        "nonzero_pages": 4,
        "distinct_pages": 3,
        "duplicate_pages": 1,
    }
    assert json.loads(done.stdout) == {
        "schema_version": 1,
        **counts,
        "vms": [{"name": str(image), **counts}],
        "matrix": [[1]],
    }


def test_analyze_needs_every_image(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x")
    done = vmdedup("analyze", "--ram-file", str(good), "--ram-file", str(tmp_path / "bad"))
    assert done.returncode == 1
    assert str(tmp_path / "bad") in only_line(done)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--qmp", "A", "--ram-file", "F", "--qmp", "B"],
            [QmpSource("A"), ImageSource("F"), QmpSource("B")],
        ),
        (
            ["--ram-file=F", "--json", "--qmp=A", "--ram-file", "--qmp"],
            [ImageSource("F"), QmpSource("A"), ImageSource("--qmp")],
        ),
        (["--json"], []),
    ],
)
def test_analyze_knows_the_order_of_its_arguments(
    arguments: list[str], expected: list[Source]
) -> None:
    group: Any = typer.main.get_command(main.app)
    context = group.commands["analyze"].make_context("analyze", arguments)
    given = context.params
    order = context.meta[analyze.ORDER]
    assert analyze.in_order(order, given["qmp"] or [], given["ram_file"] or []) == expected


def test_version() -> None:
    done = vmdedup("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("vmdedup ")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "schema", "all"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


def test_an_unexpected_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.delenv("VMDEDUP_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: by zero" in line
    assert "VMDEDUP_DEBUG=1" in line
    monkeypatch.setenv("VMDEDUP_DEBUG", "1")
    with pytest.raises(SystemExit):
        main.main()
    assert "Traceback" in capsys.readouterr().err


def test_json_output_never_loads_rich(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    code = (
        "import sys; from vmdedup.cli import main\n"
        "try: main.main()\n"
        "finally: print([name for name in sys.modules if name.split('.')[0] == 'rich'],"
        " file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "analyze", "--json", "--ram-file", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


PUBLISHED = {
    "report": {
        "": "converged host vms matrix",
        "HostReport": "pages_shared pages_sharing pages_unshared pages_volatile zero_pages"
        " cow_broken_pages full_scans pages_scanned saved_bytes overhead_bytes profit_bytes"
        " stopped_ms gate_ms drain_ms",
        "Durations": "count p50 p99 max",
        "VmReport": "name pid status reason trust_domain ram_bytes present_bytes merged_pages"
        " zero_pages cow_broken_pages deferred_pages vmas saved_bytes gates stops",
        "Matrix": "vms pages",
    },
    "analysis": {
        "": "total_pages zero_pages nonzero_pages distinct_pages duplicate_pages vms matrix",
        "VmContents": "name total_pages zero_pages nonzero_pages distinct_pages duplicate_pages",
    },
    "vms": {"": "vms", "VmListing": "name pid mergeable reason backends"},
    "plan": {"": "saved_bytes vms domains", "VmPlan": "name vmas_now vmas_after"},
}


@pytest.mark.parametrize("document", PUBLISHED)
def test_schema_has_every_promised_field(document: str) -> None:
    done = vmdedup("schema", document)
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    for model, fields in PUBLISHED[document].items():
        properties = (schema["$defs"][model] if model else schema)["properties"]
        assert set(fields.split()) <= properties.keys()


def test_all_schemas_by_name() -> None:
    schemas = json.loads(vmdedup("schema", "all").stdout)
    assert schemas.keys() > PUBLISHED.keys()
