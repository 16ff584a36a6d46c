"""A headless Chromium, driven over its DevTools protocol.

Owns the process, its profile and the pipes to it: the protocol goes over two
descriptors, so that nothing listens. The browser resolves no names and reaches
this host only. Ends by its pid, and with whoever started it: it reads from a pipe.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LIMIT_S = 90
_END_S = 20
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
    "about:blank",
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
_TYPED = {"Enter": "\r", " ": " "}


def browser_missing() -> str | None:
    """Whether there is no Chromium."""
    return None if _program() else "no Chromium here"


def _program() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


class BrowserError(Exception):
    """The browser did not do what it was told, or not in time."""


class Page:
    """A browser with one page. A context manager.

    `requests` are the addresses the page asked for, `complaints` what it logged as
    warnings or errors, exceptions included.
    """

    def __init__(self, profile: Path) -> None:
        program = _program()
        assert program is not None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers = iter(range(1, 1 << 31))
        self._unread = b""
        self._session: str | None = None
        with ExitStack() as undo:
            theirs_in, self._commands = os.pipe()
            self._answers, theirs_out = os.pipe()
            for fd in (self._commands, self._answers):
                undo.callback(os.close, fd)
            # The browser wants them as 3 and 4, which may be in use here.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
            lent = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
            try:
                self._process = subprocess.Popen(
                    ["bash", "-c", lent, "sh", program, f"--user-data-dir={profile}", *_FLAGS],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=high,
                )
            finally:
                for fd in (theirs_in, theirs_out, *high):
                    os.close(fd)
            undo.callback(self._end)
            target = self.tell("Target.createTarget", url="about:blank")["targetId"]
            attached = self.tell("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.tell(f"{domain}.enable")
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol; its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _LIMIT_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def open(self, address: str) -> None:
        """Go to an address; returns when the page is there."""
        self.tell("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth in the page."""
        answer = self.tell(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, limit_s: float = _LIMIT_S) -> Any:
        """Wait until an expression is true; what it is then.

        One that cannot be evaluated is not true yet: the page may be changing.
        """
        deadline = time.monotonic() + limit_s
        failure: BrowserError | None = None
        while time.monotonic() < deadline:
            try:
                if value := self.value(expression):
                    return value
                failure = None
            except BrowserError as error:
                failure = error
            time.sleep(0.05)
        raise BrowserError(f"not true after {limit_s} s: {expression}") from failure

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key where the focus is."""
        known = {
            "key": key,
            "code": key if key in _KEYS else "",
            "windowsVirtualKeyCode": _KEYS.get(key, 0),
            "modifiers": 8 if shift else 0,
        }
        typed = _TYPED.get(key, "" if key in _KEYS else key)
        self.tell("Input.dispatchKeyEvent", type="keyDown", text=typed, **known)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **known)

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        """The page's size, in CSS pixels."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """Media features, as `prefers_color_scheme="dark"`."""
        wanted = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.tell("Emulation.setEmulatedMedia", features=wanted)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write a screenshot, of what is seen or of the whole page."""
        shot = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        found = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(found["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(found["args"]))
            case "Log.entryAdded" if found["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._answers], [], [], left_s)[0]:
                raise BrowserError("the browser does not answer")
            piece = os.read(self._answers, 1 << 20)
            if not piece:
                raise BrowserError("the browser has ended")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _end(self) -> None:
        self._session = None
        try:
            self.tell("Browser.close")
            self._process.wait(_END_S)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
