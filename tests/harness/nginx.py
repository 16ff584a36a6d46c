"""nginx with the shipped configuration, on ports of the test's own.

Owns the process, which runs in the foreground with all its files in the test's folder, and
ends with the test, or with who started it. Only names of files and ports are put into the
configuration.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx

from tests.harness.kernel import becomes_true
from tests.harness.pages import ROOT
from vmdedup.closing import Closing

USER, PASSWORD = "watcher", "correct horse"
_SHIPPED = ROOT / "configs/nginx/vmdedup.conf"
_WHOLE = """
user root;
pid {base}/pid;
error_log {base}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {base}/body;
    proxy_temp_path {base}/proxy;
    fastcgi_temp_path {base}/fastcgi;
    uwsgi_temp_path {base}/uwsgi;
    scgi_temp_path {base}/scgi;
    include {base}/vmdedup.conf;
}}
"""


def nginx_missing() -> str | None:
    """Which program is not here; None when both are."""
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            return f"no {program} on this machine"
    return None


class Nginx(Closing):
    """The proxy in `base`, listening on `port`, before vmdedup's `upstream_port`."""

    def __init__(self, base: Path, port: int, upstream_port: int) -> None:
        self.url = f"https://127.0.0.1:{port}/"
        self._base = base
        self._make_certificate()
        hashed = _run("openssl", "passwd", "-6", PASSWORD).strip()
        (base / "vmdedup.users").write_text(f"{USER}:{hashed}\n")
        text = _SHIPPED.read_text()
        for shipped, ours in (
            ("listen 443 ", f"listen 127.0.0.1:{port} "),
            ("127.0.0.1:9117;", f"127.0.0.1:{upstream_port};"),
            ("/etc/nginx/", f"{base}/"),
        ):
            assert shipped in text, shipped
            text = text.replace(shipped, ours)
        (base / "vmdedup.conf").write_text(text)
        (base / "nginx.conf").write_text(_WHOLE.format(base=base))
        words = ["nginx", "-p", str(base), "-c", str(base / "nginx.conf"), "-e", "stderr"]
        _run(*words, "-t")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *words, "-g", "daemon off;"],
            stdin=subprocess.DEVNULL,
        )
        if not becomes_true(self._answers, 20):
            self.close()
            raise AssertionError((base / "error.log").read_text())

    def client(self, password: str | None) -> httpx.Client:
        """A client that logs in with this password, or not at all."""
        login = None if password is None else (USER, password)
        return httpx.Client(base_url=self.url, verify=self._trust(), auth=login, timeout=30)

    def close(self) -> None:
        """End it, and its workers, which it waits for."""
        self._process.terminate()
        self._process.wait()

    def _make_certificate(self) -> None:
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        words += ["-nodes", "-days", "1", "-subj", "/CN=vmdedup"]
        words += ["-addext", "subjectAltName=IP:127.0.0.1"]
        names = ["-keyout", f"{self._base}/vmdedup.key", "-out", f"{self._base}/vmdedup.crt"]
        _run(*words, *names)

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._base / "vmdedup.crt"))

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._base / "error.log").read_text()
        try:
            with self.client(None) as client:
                return client.get("/").status_code == 401
        except httpx.TransportError:
            return False


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
