"""A real sshd on loopback, with host keys and a config of its own, and a user's ssh to reach it.

Owns a folder and one sshd process; the system's service, keys and known_hosts are not touched.
sshd runs in a mount namespace of its own, since it wants /run/sshd.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.harness.kernel import becomes_true

ROOT = Path(__file__).parent.parent.parent
_SSHD = "/usr/sbin/sshd"

_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {base}/host_key
AuthorizedKeysFile {base}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""

_SSH_CONFIG = """
Host 127.0.0.1
    IdentityFile {base}/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {base}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


def sshd_missing() -> str | None:
    """Whether an sshd can be started here."""
    if os.geteuid() != 0:
        return "needs root, to start an sshd in a mount namespace of its own"
    for program in (_SSHD, "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "no mount namespace can be made"


class Sshd:
    """An sshd whose logins find a `vmdedup` of this checkout. A context manager."""

    def __init__(self, base: Path, environment: dict[str, str], *, installed: bool = True) -> None:
        """`environment`: that of each login; `installed`: whether `vmdedup` is in its PATH."""
        self.base = base
        base.mkdir(parents=True)
        base.chmod(0o755)
        self.programs = base / "bin"
        self.programs.mkdir()
        for name in ("host_key", "key", "other_key"):
            kind = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name]
            subprocess.run([*kind, "-f", str(base / name)], check=True)
        if installed:
            code = "from vmdedup.cli.main import main; main()"
            words = shlex.join([sys.executable, "-c", code])
            self.install("vmdedup", f'PYTHONPATH={ROOT} exec {words} "$@"')
        shutil.copy(base / "key.pub", base / "authorized_keys")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        path = f"{self.programs}:/usr/bin:/bin"
        values = " ".join(f'"{name}={value}"' for name, value in environment.items())
        config = _CONFIG.format(port=self.port, base=base) + f'SetEnv "PATH={path}" {values}\n'
        (base / "sshd_config").write_text(config)
        (base / "ssh_config").write_text(_SSH_CONFIG.format(base=base))
        self.know_host()
        self.user_programs = base / "user"
        self.user_programs.mkdir()
        wrapper = self.user_programs / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {base}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    @property
    def url(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}"

    def install(self, name: str, line: str) -> None:
        """A program in the PATH of logins that runs this line of shell."""
        file = self.programs / name
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def admit(self, user: Sshd) -> None:
        """Let the user of another sshd of ours in here too, by his own key."""
        shutil.copy(user.base / "key.pub", self.base / "authorized_keys")
        with (user.base / "known_hosts").open("a") as known:
            known.write((self.base / "known_hosts").read_text())

    def know_host(self, key: str = "host_key") -> None:
        """Have the user's known_hosts hold this key for the host."""
        public = (self.base / f"{key}.pub").read_text()
        (self.base / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def __enter__(self) -> Self:
        script = (
            f'mount -t tmpfs none /run && mkdir -m 0755 /run/sshd && exec {_SSHD} -D -e -f "$1"'
        )
        self._log = (self.base / "log").open("wb")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", str(self.base / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        if not becomes_true(self._answers, 20):
            self.__exit__()
            raise AssertionError((self.base / "log").read_text())
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.base / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self._log.close()
