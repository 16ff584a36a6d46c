"""HTTPS with a certificate on both sides: the files, their rules, and the contexts made of them.

Owns whom either side believes: only certificates of the CA that it is given, never those of the
system's CAs. Promises TLS 1.2 at least. Refuses a key that other users may read, and files that
do not fit together, in one line that names the file.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from vmdedup.errors import UsageError

SCHEME = "https://"
VARIABLE = "VMDEDUP_CERT_PATH"

_URL = re.compile(
    r"https://(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/?"
)
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one side: its certificate (and chain), its key, and the other side's CA."""

    certificate: Path
    key: Path
    ca: Path

    def server_context(self) -> ssl.SSLContext:
        """For a server that wants a certificate of each client. Raises UsageError."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext:
        """For a client, which checks the server's name too. Raises UsageError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        for path in (self.certificate, self.key, self.ca):
            _require_readable(path, is_private=path == self.key)
        try:
            # With a password, so that nothing asks for one: a key must have none.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, OSError) as error:
            why = _reason(error)
            raise UsageError(f"{self.certificate} with {self.key}: {why}") from error
        try:
            context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"{self.ca}: {_reason(error)}") from error
        return context


def require_url(url: str) -> None:
    """Raise UsageError unless it is `https://host[:port]`."""
    match = _URL.fullmatch(url)
    if match is None or not 0 < int(match[1] or 443) < 65536:
        shown = "".join(c if c.isprintable() else "?" for c in url)[:_SHOWN_CHARACTERS]
        raise UsageError(f"{shown}: write https://host[:port]")


def client_context() -> ssl.SSLContext:
    """This user's: of `ca.pem`, `cert.pem`, `key.pem` in VMDEDUP_CERT_PATH. Raises UsageError."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UsageError(
            f"https:// needs a certificate: set {VARIABLE} to a folder with ca.pem, cert.pem and"
            " key.pem"
        )
    place = Path(folder)
    return TlsFiles(place / "cert.pem", place / "key.pem", place / "ca.pem").client_context()


def failure(error: BaseException) -> str:
    """Why a connection of a client has failed, in one line."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not believed: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return f"no TLS connection, look at cert.pem: {_words(cause.reason)}"
        if isinstance(cause, socket.gaierror):
            return str(cause.strerror)
        if isinstance(cause, OSError) and cause.errno and cause.errno != errno.ECONNRESET:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    if "attempts failed" in text:
        return "no connection"
    # Who refuses a certificate ends the connection, and its reason may get lost.
    return "it ended the connection: perhaps its client_ca does not know cert.pem"


def _require_readable(path: Path, *, is_private: bool) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path}: not a file")
    if is_private and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077):
        raise UsageError(f"{path}: others may read or own this key: chmod 600 it, and chown it")


def _reason(error: OSError) -> str:
    named = getattr(error, "reason", None)
    return _words(named) if named else f"{error.strerror or error}"


def _words(reason: str) -> str:
    """OpenSSL's name of a failure, in words."""
    return reason.lower().replace("_", " ")
