"""Real certificates, by the system's openssl: a CA, and what it issues."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from vmdedup.tls import TlsFiles

_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectAltName = {host}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def openssl_missing() -> str | None:
    """Whether certificates can be made here."""
    return None if shutil.which("openssl") else "openssl is not installed"


class Authority:
    """A CA of its own in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._issue(folder, name, "ca", self.certificate, folder / "ca.key")

    def issue(
        self,
        name: str,
        *,
        usage: str = "clientAuth, serverAuth",
        host: str = "IP:127.0.0.1",
        days: int = 2,
    ) -> TlsFiles:
        """A certificate, its key, and the CA's certificate, in a folder named `name`."""
        folder = self.folder / name
        folder.mkdir()
        files = TlsFiles(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
        shutil.copy(self.certificate, files.ca)
        signed = ["-CA", str(self.certificate), "-CAkey", str(self.folder / "ca.key")]
        self._issue(
            folder, name, "leaf", files.certificate, files.key, *signed,
            usage=usage, host=host, days=days,
        )  # fmt: skip
        return files

    def _issue(
        self,
        folder: Path,
        name: str,
        kind: str,
        certificate: Path,
        key: Path,
        *more: str,
        usage: str = "clientAuth",
        host: str = "DNS:ca",
        days: int = 2,
    ) -> None:
        config = folder / "openssl.cnf"
        config.write_text(_CONFIG.format(name=name, usage=usage, host=host))
        command = ["openssl", "req", "-x509", "-config", str(config), "-extensions", kind]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", str(days), "-keyout", str(key), "-out", str(certificate), *more]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(0o600)
