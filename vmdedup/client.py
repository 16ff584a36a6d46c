"""`Client` and `AsyncClient`: the running service, as typed calls.

    with Client() as service:
        report = service.merge(timeout_s=60)
        assert report.host.saved_bytes > 0

    with Client("ssh://root@host7") as service:  # that of another host, through `ssh`
        print(service.health().version)

    with Client("https://host7:9118") as service:  # with certificates; only reads
        print(service.report().host.saved_bytes)

Owns the step from a call to its typed result. Promises that every failure is a
ServiceError of one line, that no call waits for ever, and that no answer is read beyond
`MAX_ANSWER_BYTES`. Additional fields of a newer server do no harm. Both clients have the
same calls.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

import httpx
from pydantic import ValidationError

from vmdedup import tls
from vmdedup.closing import Closing
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.ipc.protocol import (
    MAX_EVENTS,
    SOCKET_NAME,
    Attach,
    ControlValue,
    ControlValues,
    Detach,
    Detached,
    EventList,
    Health,
    MergeNow,
    ReadContentSources,
    ReadSketch,
    Register,
    Registration,
    SetControls,
    UnmergeVms,
    Unregister,
)
from vmdedup.models import (
    ContentSources,
    History,
    Model,
    SharingReport,
    Unmerged,
    VmList,
    VmListing,
    VmSketch,
)
from vmdedup.ssh import Destination, SshWay, host_in_environment, is_remote
from vmdedup.units import DEFAULT_RATE

_CONNECTIONS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=2.0)
"""Limits for connections. An idle one is closed well before the server closes it (uvicorn:
after 5 s): a request on a connection that is just being closed would fail."""

_SSH_CONNECTIONS = httpx.Limits(
    max_connections=4, max_keepalive_connections=4, keepalive_expiry=4.0
)
"""The same through ssh, where each is a login: sshd refuses some beyond ten at once."""

MAX_ANSWER_BYTES = 64 << 20
"""Longest answer that is read. A report of 1,000 VMs has 8 MiB, nearly all of it the matrix."""

_CONNECT_LIMIT_S = 5.0
_READ_LIMIT_S = 30.0
_WORK_LIMIT_S = 600.0
"""Limit for a request that changes memory, seconds: an unmerge of large VMs is slow."""

_Result = TypeVar("_Result", bound=Model)


class ServiceError(VmdedupError):
    """The service could not be reached, or did not fulfil the request.

    `status` is the HTTP status, `None` if there was no answer; `kind` is the kind
    of refusal (see `protocol.ErrorKind`), "" if there was none.
    """

    def __init__(self, message: str, *, status: int | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class ServiceUnreachableError(ServiceError):
    """Nothing answers at the socket: the service does not run, or is not for this user."""


class ServiceUsageError(ServiceError, UsageError):
    """The request makes no sense: bad input, or no such VM or backend."""


class ServiceConflictError(ServiceError):
    """The request is refused in the present state, and nothing was changed; retry later."""


class ServiceBusyError(ServiceError):
    """The service is busy, and nothing was changed: try again."""


class ServiceUnfinishedError(ServiceError):
    """The work began and is not done: the service goes on until it is done or revoked.

    `unmerged` says what was unmerged and what is left, `None` if the service did not say.
    """

    unmerged: Unmerged | None = None


_ERRORS: dict[str, type[ServiceError]] = {
    "usage": ServiceUsageError,
    "not-found": ServiceUsageError,
    "conflict": ServiceConflictError,
    "busy": ServiceBusyError,
    "unfinished": ServiceUnfinishedError,
}


def default_socket() -> Path:
    """The socket in VMDEDUP_RUNTIME_DIR, else in /run/vmdedup."""
    return Path(os.environ.get("VMDEDUP_RUNTIME_DIR") or "/run/vmdedup") / SOCKET_NAME


def require_url(url: str) -> None:
    """Raise UsageError unless the URL is one of another host's daemon."""
    if url.startswith(tls.SCHEME):
        tls.require_url(url)
    else:
        Destination.parse(url)


@dataclass(frozen=True)
class _Call(Generic[_Result]):
    """One request and the model of its answer."""

    result: type[_Result]
    method: str
    path: str
    body: Model | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    limit_s: float = _READ_LIMIT_S

    def options(self) -> dict[str, Any]:
        """Arguments for httpx."""
        timeout = httpx.Timeout(self.limit_s, connect=_CONNECT_LIMIT_S)
        # The bound of `_Answer` holds for what is received, too.
        headers = {"Accept-Encoding": "identity"}
        options: dict[str, Any] = {"params": self.parameters, "timeout": timeout}
        if self.body is not None:
            options["content"] = self.body.model_dump_json()
            headers["Content-Type"] = "application/json"
        return options | {"headers": headers}

    def outcome(self, status: int, content: bytes) -> _Result:
        """The typed answer. Raises ServiceError."""
        if status != 200:
            raise _refusal(status, content)
        try:
            return _tolerant(self.result, content)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in problem["loc"])
            raise ServiceError(
                f"{self.path}: not an answer of this version: {where}: {problem['msg']}",
                status=200,
            ) from error


def _tolerant(model: type[_Result], content: bytes) -> _Result:
    """The model in `content`, without fields that only a newer service knows."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if any(problem["type"] != "extra_forbidden" for problem in problems):
            raise
    import json

    document = json.loads(content)
    for problem in problems:
        *path, name = problem["loc"]
        place = document
        for step in path:
            place = place[step]
        del place[name]
    return model.model_validate(document)


def _refusal(status: int, content: bytes) -> ServiceError:
    import json

    try:
        answer = json.loads(content)
        message, kind = str(answer["error"]), str(answer["kind"])
    except (ValueError, TypeError, KeyError):
        return ServiceError(f"the service answered with status {status}", status=status)
    refusal = _ERRORS.get(kind, ServiceError)(message, status=status, kind=kind)
    if isinstance(refusal, ServiceUnfinishedError) and answer.get("unmerged") is not None:
        unmerged = json.dumps(answer["unmerged"]).encode()
        with suppress(ValidationError):  # a service that gives `unmerged` another meaning
            refusal.unmerged = _tolerant(Unmerged, unmerged)
    return refusal


def _report(fresh: bool) -> _Call[SharingReport]:
    parameters = {"fresh": "true"} if fresh else {}
    return _Call(SharingReport, "GET", "/v1/report", parameters=parameters)


def _vms() -> _Call[VmList]:
    return _Call(VmList, "GET", "/v1/vms")


def _controls() -> _Call[ControlValues]:
    return _Call(ControlValues, "GET", "/v1/controls")


def _health() -> _Call[Health]:
    return _Call(Health, "GET", "/v1/health")


def _sketch(vm: str, rate: int) -> _Call[VmSketch]:
    _checked(ReadSketch, vm=vm, rate=rate)
    return _Call(VmSketch, "GET", "/v1/sketch", parameters={"vm": vm, "rate": str(rate)})


def _content_sources(
    known: Sequence[str | os.PathLike[str]], *, elsewhere: bool
) -> _Call[ContentSources]:
    # The service has another working directory than the caller.
    paths = [os.fspath(each) if elsewhere else os.path.abspath(each) for each in known]
    body = _checked(ReadContentSources, known=paths)
    return _work(ContentSources, "/v1/content-sources", body)


def _compare_with_ksm() -> _Call[SharingReport]:
    return _Call(SharingReport, "GET", "/v1/ksm-comparison", limit_s=_WORK_LIMIT_S)


def _events(since: int, limit: int, wait_s: float) -> _Call[EventList]:
    parameters = {"since": str(since), "limit": str(limit), "wait_s": str(wait_s)}
    limit_s = wait_s + _READ_LIMIT_S
    return _Call(EventList, "GET", "/v1/events", parameters=parameters, limit_s=limit_s)


def _history(since_s: int, max_points: int, vm: str | None) -> _Call[History]:
    parameters = {"since_s": str(since_s), "max_points": str(max_points)}
    if vm is not None:
        parameters["vm"] = vm
    return _Call(History, "GET", "/v1/history", parameters=parameters)


def _work(result: type[_Result], path: str, body: Model, limit_s: float = 0) -> _Call[_Result]:
    return _Call(result, "POST", path, body, limit_s=limit_s + _WORK_LIMIT_S)


def _set(values: dict[str, ControlValue]) -> _Call[ControlValues]:
    numbers = {name: int(it) if isinstance(it, bool) else it for name, it in values.items()}
    return _work(ControlValues, "/v1/controls", _checked(SetControls, values=numbers))


def _merge(vms: Sequence[str] | None, timeout_s: float) -> _Call[SharingReport]:
    body = _checked(MergeNow, vms=_names(vms), timeout_s=timeout_s)
    return _work(SharingReport, "/v1/merge-now", body, timeout_s)


def _unmerge(vms: Sequence[str] | None) -> _Call[Unmerged]:
    return _work(Unmerged, "/v1/unmerge", _checked(UnmergeVms, vms=_names(vms)))


def _register(
    vm: str, backend: str, offset_bytes: int, length_bytes: int | None
) -> _Call[Registration]:
    span = {"offset_bytes": offset_bytes, "length_bytes": length_bytes}
    body = _checked(Register, vm=vm, backend=backend, **span)
    return _work(Registration, "/v1/register", body)


def _unregister(
    vm: str, backend: str, offset_bytes: int, length_bytes: int | None
) -> _Call[Registration]:
    span = {"offset_bytes": offset_bytes, "length_bytes": length_bytes}
    body = _checked(Unregister, vm=vm, backend=backend, **span)
    return _work(Registration, "/v1/unregister", body)


def _attach(qmp: str | os.PathLike[str], *, elsewhere: bool) -> _Call[VmListing]:
    # The service has another working directory than the caller. A bare word that names no
    # file here is a libvirt domain's name.
    path = os.fspath(qmp)
    if not elsewhere and ("/" in path or os.path.exists(path)):
        path = os.path.abspath(path)
    return _work(VmListing, "/v1/attach", _checked(Attach, qmp=path))


def _detach(vm: str) -> _Call[Detached]:
    return _work(Detached, "/v1/detach", _checked(Detach, vm=vm))


def _names(vms: Sequence[str] | None) -> list[str] | None:
    return None if vms is None else list(vms)


def _checked(model: type[_Result], **values: object) -> _Result:
    """The body, checked here by the service's own rules. Raises ServiceUsageError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in problem["loc"])
        raise ServiceUsageError(f"{where}: {problem['msg']}", kind="usage") from error


class _Answer:
    """An answer as it is received. Raises httpx.HTTPError where it has no end."""

    def __init__(self, limit_s: float) -> None:
        self._end_by_monotonic_s = time.monotonic() + limit_s + _CONNECT_LIMIT_S
        self.content = bytearray()

    def add(self, some: bytes) -> None:
        self.content += some
        if len(self.content) > MAX_ANSWER_BYTES:
            raise httpx.HTTPError(f"its answer has over {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > self._end_by_monotonic_s:
            raise httpx.ReadTimeout("the answer does not end")


class _Base:
    """The base of both clients."""

    def __init__(self, socket: str | os.PathLike[str] | None = None) -> None:
        """`socket`: the path of a Unix socket, or a URL.

        `ssh://[user@]host[:port]`, or `https://host[:port]` with VMDEDUP_CERT_PATH.
        """
        place = host_in_environment() or default_socket() if socket is None else socket
        self.place = os.fspath(place)
        self._has_tls = self.place.startswith(tls.SCHEME)
        if self._has_tls:
            tls.require_url(self.place)
        is_ssh = is_remote(place) and not self._has_tls
        self._ssh = SshWay(self.place) if is_ssh else None
        self.socket = Path(self._ssh.path if self._ssh else place)
        self._base_url = self.place if self._has_tls else "http://vmdedup"
        self._transport: dict[str, Any] = {"limits": _SSH_CONNECTIONS if is_ssh else _CONNECTIONS}
        if self._has_tls:
            self._transport["verify"] = tls.client_context()
        else:
            # No TLS on a Unix socket, so no certificates to load either.
            self._transport |= {"uds": str(self.socket), "verify": False}

    def _fail(self, error: httpx.HTTPError | httpx.InvalidURL) -> NoReturn:
        """Raise one clear line for a failed exchange."""
        failure = None
        if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
            if self._has_tls:
                failure = tls.failure(error)
            elif self._ssh is not None:
                failure = self._ssh.failure()
        if failure is not None:
            raise ServiceUnreachableError(f"{self.place}: {failure}") from error
        if isinstance(error, httpx.ConnectError):
            raise ServiceUnreachableError(self._unreachable()) from error
        if isinstance(error, httpx.TimeoutException):
            raise ServiceError(f"{self.place}: the service did not answer in time") from error
        if isinstance(error, httpx.TransportError):
            raise ServiceError(
                f"{self.place}: the connection ended before the answer; ask for the state"
                " before trying again"
            ) from error
        raise ServiceError(f"{self.place}: {error}") from error

    def _unreachable(self) -> str:
        if self._ssh is not None:
            return f"{self.place}: this client is closed"
        try:
            there = self.socket.exists()
        except PermissionError:
            there = True
        if not there:
            return f"no service at {self.socket}: start `vmdedup run`"
        if not os.access(self.socket, os.W_OK):
            return f"no permission for {self.socket}: be root, or of the socket's group"
        return f"no service answers at {self.socket}: start `vmdedup run`"


class Client(_Base, Closing):
    """The service at a Unix socket, or of another host. A context manager.

    By default that of `VMDEDUP_HOST`, or else at `default_socket()`.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None) -> None:
        super().__init__(socket)
        transport = httpx.HTTPTransport(**self._transport)
        self._http = httpx.Client(transport=transport, base_url=self._base_url, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        if self._ssh is not None:
            self._ssh.close()

    def _do(self, call: _Call[_Result]) -> _Result:
        answer = _Answer(call.limit_s)
        try:
            with self._http.stream(call.method, call.path, **call.options()) as response:
                for some in response.iter_bytes():
                    answer.add(some)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._fail(error)
        return call.outcome(response.status_code, bytes(answer.content))

    def report(self, *, fresh: bool = False) -> SharingReport:
        """The sharing of each VM; `fresh` has it read from the kernel now."""
        return self._do(_report(fresh))

    def vms(self) -> VmList:
        """The VMs found, and for each that is not merged the reason."""
        return self._do(_vms())

    def controls(self) -> ControlValues:
        """Every control with its value."""
        return self._do(_controls())

    def health(self) -> Health:
        """The health of the service, and the age of its knowledge."""
        return self._do(_health())

    def events(self, since: int = 0, *, limit: int = MAX_EVENTS, wait_s: float = 0.0) -> EventList:
        """Events after `since`; waits up to `wait_s` for the first of them."""
        return self._do(_events(since, limit, wait_s))

    def history(
        self, since_s: int = 3600, *, max_points: int = 500, vm: str | None = None
    ) -> History:
        """The savings over the last `since_s` seconds, in at most `max_points` samples.

        Of all VMs together, or of the one named.
        """
        return self._do(_history(since_s, max_points, vm))

    def content_sources(self, known: Sequence[str | os.PathLike[str]]) -> ContentSources:
        """Where the contents of the VMs' memory come from: which of these files and folders.

        All memory of the VMs is read once; that may take minutes. One client at a time.
        """
        return self._do(_content_sources(known, elsewhere=is_remote(self.place)))

    def compare_with_ksm(self) -> SharingReport:
        """The sharing now, and what the kernel's KSM would save on the same VMs.

        As long, and for one client at a time, as `content_sources`.
        """
        return self._do(_compare_with_ksm())

    def sketch(self, vm: str, *, rate: int = DEFAULT_RATE) -> VmSketch:
        """A sample of one VM's contents: one in `rate`, or fewer if these are too many."""
        return self._do(_sketch(vm, rate))

    def set(self, **values: ControlValue) -> ControlValues:
        """Change controls, all of them or none; returns every control."""
        return self._do(_set(values))

    def merge(self, vms: Sequence[str] | None = None, *, timeout_s: float = 120.0) -> SharingReport:
        """Merge until the VMs named, or all, have converged or `timeout_s` is over."""
        return self._do(_merge(vms, timeout_s))

    def unmerge(self, vms: Sequence[str] | None = None) -> Unmerged:
        """Unmerge the VMs named, or all: their pages get their own memory again.

        Raises ServiceUnfinishedError when pages stay merged for now.
        """
        return self._do(_unmerge(vms))

    def register(
        self, vm: str, backend: str, *, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> Registration:
        """Make a range of a memory backend mergeable; by default all of it."""
        return self._do(_register(vm, backend, offset_bytes, length_bytes))

    def unregister(
        self, vm: str, backend: str, *, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> Registration:
        """Unmerge a range of a memory backend and leave it alone; by default all of it."""
        return self._do(_unregister(vm, backend, offset_bytes, length_bytes))

    def attach(self, qmp: str | os.PathLike[str]) -> VmListing:
        """Attach to the VM behind a QMP socket."""
        return self._do(_attach(qmp, elsewhere=is_remote(self.place)))

    def detach(self, vm: str) -> Detached:
        """Detach from a VM; merged pages stay merged."""
        return self._do(_detach(vm))


class AsyncClient(_Base):
    """`Client` for asyncio: the same calls, awaited. An async context manager."""

    def __init__(self, socket: str | os.PathLike[str] | None = None) -> None:
        super().__init__(socket)
        transport = httpx.AsyncHTTPTransport(**self._transport)
        self._http = httpx.AsyncClient(
            transport=transport, base_url=self._base_url, trust_env=False
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        if self._ssh is not None:
            await asyncio.to_thread(self._ssh.close)

    async def _do(self, call: _Call[_Result]) -> _Result:
        answer = _Answer(call.limit_s)
        try:
            async with self._http.stream(call.method, call.path, **call.options()) as response:
                async for some in response.aiter_bytes():
                    answer.add(some)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            await asyncio.to_thread(self._fail, error)
        return call.outcome(response.status_code, bytes(answer.content))

    async def report(self, *, fresh: bool = False) -> SharingReport:
        """See `Client.report`."""
        return await self._do(_report(fresh))

    async def vms(self) -> VmList:
        """See `Client.vms`."""
        return await self._do(_vms())

    async def controls(self) -> ControlValues:
        """See `Client.controls`."""
        return await self._do(_controls())

    async def health(self) -> Health:
        """See `Client.health`."""
        return await self._do(_health())

    async def events(
        self, since: int = 0, *, limit: int = MAX_EVENTS, wait_s: float = 0.0
    ) -> EventList:
        """See `Client.events`."""
        return await self._do(_events(since, limit, wait_s))

    async def history(
        self, since_s: int = 3600, *, max_points: int = 500, vm: str | None = None
    ) -> History:
        """See `Client.history`."""
        return await self._do(_history(since_s, max_points, vm))

    async def content_sources(self, known: Sequence[str | os.PathLike[str]]) -> ContentSources:
        """See `Client.content_sources`."""
        return await self._do(_content_sources(known, elsewhere=is_remote(self.place)))

    async def compare_with_ksm(self) -> SharingReport:
        """See `Client.compare_with_ksm`."""
        return await self._do(_compare_with_ksm())

    async def sketch(self, vm: str, *, rate: int = DEFAULT_RATE) -> VmSketch:
        """See `Client.sketch`."""
        return await self._do(_sketch(vm, rate))

    async def set(self, **values: ControlValue) -> ControlValues:
        """See `Client.set`."""
        return await self._do(_set(values))

    async def merge(
        self, vms: Sequence[str] | None = None, *, timeout_s: float = 120.0
    ) -> SharingReport:
        """See `Client.merge`."""
        return await self._do(_merge(vms, timeout_s))

    async def unmerge(self, vms: Sequence[str] | None = None) -> Unmerged:
        """See `Client.unmerge`."""
        return await self._do(_unmerge(vms))

    async def register(
        self, vm: str, backend: str, *, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> Registration:
        """See `Client.register`."""
        return await self._do(_register(vm, backend, offset_bytes, length_bytes))

    async def unregister(
        self, vm: str, backend: str, *, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> Registration:
        """See `Client.unregister`."""
        return await self._do(_unregister(vm, backend, offset_bytes, length_bytes))

    async def attach(self, qmp: str | os.PathLike[str]) -> VmListing:
        """See `Client.attach`."""
        return await self._do(_attach(qmp, elsewhere=is_remote(self.place)))

    async def detach(self, vm: str) -> Detached:
        """See `Client.detach`."""
        return await self._do(_detach(vm))
