"""Every setting, with its default, its unit and why.

Owns names and limits of the settings and where they come from: arguments,
then environment variables `VMDEDUP_*`, then a TOML file. An unknown name or a value out of range
is refused whole, in one line.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from vmdedup.controls import Controls, initial
from vmdedup.errors import UsageError

Feature = Literal[
    "userfaultfd-wp",
    "wp-unpopulated",
    "wp-async",
    "pagemap-scan",
    "map-stack",
    "stub",
    "in-place",
    "compiled-gates",
]

MonitorUse = Literal["own", "shared"]

Versions = tuple[tuple[int, int], tuple[int, int]]
"""First and last (major, minor)."""

MOVED_TO_CONTROLS = ("use_zero_pages", "vma_budget", "gate_deadline_ms")
"""Names that were settings once, and are controls alone now."""

DEFAULT_DRAIN_TRUSTED: Versions = ((7, 2), (11, 1))


class DomainRule(BaseModel):
    """VMs whose name matches `name` (shell pattern) belong to trust domain `domain`.

    `uid` and `cgroup` (shell pattern), when given, must match the QEMU process too:
    they are the kernel's word, the name is QEMU's. The domain `none` is never merged,
    `zero-only` merges zero pages and nothing else; names that begin with `uid:` are
    the defaults and cannot be given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "*"
    uid: int | None = Field(default=None, ge=0, lt=1 << 32)
    cgroup: str | None = None
    domain: str = Field(min_length=1, max_length=100)

    @field_validator("domain")
    @classmethod
    def _can_be_a_file_name(cls, domain: str) -> str:
        if not domain.isprintable() or "/" in domain or domain.startswith("uid:"):
            raise ValueError("use printable characters without /, and no leading uid:")
        return domain

    def matches(self, name: str, uid: int, cgroups: Sequence[str] = ()) -> bool:
        """Whether the rule speaks of this VM."""
        pattern = self.cgroup
        inside = pattern is None or any(fnmatchcase(path, pattern) for path in cgroups)
        return inside and self.uid in (None, uid) and fnmatchcase(name, self.name)


class LibvirtSettings(BaseModel):
    """The libvirt whose domains are followed.

    `uri` is that of a libvirt of this host. `longest_retry_s`: the pause between
    attempts to connect grows up to so many seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = Field(default=None, min_length=1, max_length=1000)
    longest_retry_s: int = Field(default=30, ge=1, le=3600)


class ApiTlsSettings(BaseModel):
    """The listener for other hosts: it only reads, and only with a client's certificate.

    `address` is one of this host, `::` and `0.0.0.0` are all. The files are PEM: `certificate`
    with its chain, its `key`, root's alone, and `client_ca`, whose certificates clients need.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: IPvAnyAddress
    port: int = Field(ge=1, le=65535)
    certificate: Path
    key: Path
    client_ca: Path


class Settings(BaseSettings):
    """How vmdedup works on this host; immutable once made."""

    model_config = SettingsConfigDict(env_prefix="VMDEDUP_", frozen=True, extra="forbid")

    runtime_dir: Path = Field(
        default=Path("/run/vmdedup"),
        description="directory of the lock and the stop notes, root-only",
    )
    store_dir: Path = Field(
        default=Path("/dev/shm/vmdedup"),
        description="directory of the stable stores; on tmpfs, root-only",
    )
    state_dir: Path | None = Field(
        default=None,
        description="directory of the history's database, root-only; default: /var/lib/vmdedup,"
        " or ~/.local/state/vmdedup if the user is not root",
    )
    history_interval_s: int = Field(
        default=15, ge=1, le=3600, description="time between two samples of the history, seconds"
    )
    history_days: int = Field(
        default=90,
        ge=0,
        le=365,
        description="days for which history is kept; `0` keeps none on disk",
    )
    domains: tuple[DomainRule, ...] = Field(
        default=(), description="trust domains by VM; the first match wins, else uid:UID"
    )
    first_look_ms: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="shortest time between the first two looks at a page, milliseconds",
    )
    sleep_ms: int = Field(
        default=1000, ge=0, le=3_600_000, description="pause between passes of `run`, milliseconds"
    )
    vma_headroom: int = Field(
        default=4096, ge=256, description="VMAs left to QEMU itself below vm.max_map_count"
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=16,
        description="most VMs merged on request or unmerged at once; each takes a processor",
    )
    gate_runs: int = Field(default=256, ge=1, le=256, description="most runs in one gate")
    gate_pages: int = Field(default=2048, ge=1, le=8192, description="most pages in one gate")
    gate_target_ms: float = Field(
        default=1,
        gt=0,
        le=10,
        description="intended duration of a gate, milliseconds; vmdedup sizes gates to meet it",
    )
    hang_limit_ms: int = Field(
        default=1000,
        ge=200,
        le=10_000,
        description="milliseconds without a heartbeat after which the guardian kills the engine,"
        " while guests may wait",
    )
    drain_timeout_ms: int = Field(
        default=5000,
        ge=100,
        le=60_000,
        description="longest wait for the VM's disk requests in flight, milliseconds",
    )
    stop_budget_ms: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="longest pause of a VM that cannot be merged live, milliseconds",
    )
    monitor_timeout_ms: int = Field(
        default=3000,
        ge=100,
        le=60_000,
        description="longest wait for a monitor's greeting, milliseconds",
    )
    monitor: MonitorUse = Field(
        default="own",
        description="`own` keeps the connection to a VM's QMP socket; `shared` uses sockets that"
        " others need too in turns of a second at most",
    )
    drain_trusted: Versions = Field(
        default=DEFAULT_DRAIN_TRUSTED,
        description="QEMU versions, first to last, whose empty transaction was seen to drain",
    )
    qmp: tuple[str, ...] = Field(
        default=(),
        description="QMP sockets or globs that the daemon follows; none: all QEMUs on this host",
    )
    libvirt: LibvirtSettings = Field(
        default=LibvirtSettings(),
        description="libvirt whose domains the daemon follows, and longest pause between"
        " attempts to reach it",
    )
    controls: Controls = Field(
        default=Controls(), description="start values of the controls, by name"
    )
    memory_hook: tuple[str, ...] = Field(
        default=(),
        description="program, by its whole path, and its arguments, that `shortage_hook` runs when"
        " memory is short",
    )
    memory_hook_timeout_s: int = Field(
        default=10,
        ge=1,
        le=3600,
        description="time after which that program is killed, seconds",
    )
    unmerge_on_exit: bool = Field(
        default=False, description="whether the daemon unmerges everything when it ends"
    )
    api_group: str | None = Field(
        default=None, description="group that may use the API socket, beside root"
    )
    known_folders: tuple[str, ...] = Field(
        default=(),
        description="folders whose files clients may name as known files; only with api_group,"
        " without which root alone names them",
    )
    api_tcp_port: int | None = Field(
        default=None, ge=1, le=65535, description="loopback port of the read-only API"
    )
    api_tls: ApiTlsSettings | None = Field(
        default=None,
        description="read-only HTTPS for other hosts, whose clients need a certificate: address,"
        " port and files",
    )
    sketch_secret: Path | None = Field(
        default=None,
        description="file of the secret, root's alone, with which the hosts of a fleet key"
        " sketches of their VMs",
    )
    cold_never: tuple[str, ...] = Field(
        default=(),
        description="names (shell patterns) of VMs whose cold pages are never paged out",
    )
    cold_any_swap: bool = Field(
        default=False,
        description="whether cold pages may go to swap that is not memory (zram, zswap), as it"
        " is fast",
    )
    mask: frozenset[Feature] = Field(
        default=frozenset(),
        description="features of the kernel or of this build to treat as absent",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_control(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Raises UsageError for a control that an older version had as a setting."""
        for name in MOVED_TO_CONTROLS:
            variable = f"VMDEDUP_{name.upper()}"
            if name in values or variable in os.environ:
                given = f"setting {name}" if name in values else variable
                remedy = f"set {name} under [controls], or with --controls {name}=…"
                raise UsageError(f"{given}: it is a control now; {remedy}")
        return values

    @field_validator("controls", mode="before")
    @classmethod
    def _as_controls(cls, value: Any) -> Any:
        """Numbers and switches of the controls may be text, as in `vmdedup set`."""
        return initial(value) if isinstance(value, Mapping) else value

    @field_validator("memory_hook")
    @classmethod
    def _has_whole_path(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if words and not words[0].startswith("/"):
            raise ValueError("name the program by its whole path")
        return words

    @model_validator(mode="after")
    def _has_hook_to_run(self) -> Self:
        if self.controls.shortage_hook and not self.memory_hook:
            raise ValueError("the control shortage_hook needs memory_hook, a program to run")
        return self

    @classmethod
    def load(cls, file: Path | None, **given: Any) -> Settings:
        """Settings from a TOML file, under the environment, under what is `given`.

        Raises UsageError in one line: unknown keys name the nearest, values their limits.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = tomllib.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise UsageError(f"settings file {file}: {error}") from error
        values = {
            name: value
            for name, value in values.items()
            if f"VMDEDUP_{name.upper()}" not in os.environ
        }
        try:
            return cls(**{**values, **given})
        except ValidationError as error:
            raise UsageError(_one_line(error, file)) from error

    def has(self, feature: Feature) -> bool:
        """False when the feature is masked; whether it is there is probed elsewhere."""
        return feature not in self.mask


def _one_line(error: ValidationError, file: Path | None) -> str:
    """Pydantic's first finding as one line for the user."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    where = f" in {file}" if file is not None else ""
    if first["type"] == "extra_forbidden":
        owners: dict[str, type[BaseModel]] = {
            "domains": DomainRule,
            "libvirt": LibvirtSettings,
            "api_tls": ApiTlsSettings,
        }
        owner = owners.get(str(first["loc"][0]), Settings)
        near = get_close_matches(str(first["loc"][-1]), owner.model_fields, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "docs/settings.md has them all"
        return f"unknown setting {name}{where}; {remedy}"
    return f"setting {name}{where}: {first['msg']}"
