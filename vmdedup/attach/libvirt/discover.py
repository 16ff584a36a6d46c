"""Finding running domains, and attaching to them through libvirt.

Owns the way from a running domain to an `Attachment`, and the reading of its
policy. Promises a reason for every running domain that could not be attached to.
Reads only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vmdedup.attach.discover import Attachment, Found, Unreachable
from vmdedup.attach.identity import VmPolicy, identify
from vmdedup.attach.libvirt.domain_xml import parse_policy
from vmdedup.attach.libvirt.link import POLICY_NAMESPACE, LibvirtLink, LinkDownError, bindings
from vmdedup.attach.libvirt.monitor import LibvirtMonitor
from vmdedup.attach.monitor import one_line
from vmdedup.errors import AttachError, VmdedupError, VmError, VmGoneError
from vmdedup.linux.process import Process

_PARALLEL = 16


@dataclass(frozen=True)
class Domain:
    """A running domain."""

    uuid: str
    name: str


def running_domains(link: LibvirtLink, timeout_s: float) -> list[Domain]:
    """Every running domain, including paused ones. Raises LinkDownError."""
    libvirt, _ = bindings()

    def ask(connection: Any) -> list[Domain]:
        found = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return [Domain(each.UUIDString(), one_line(each.name(), 120)) for each in found]

    try:
        return link.call(ask, timeout_s)
    except (TimeoutError, libvirt.libvirtError) as error:
        raise LinkDownError(f"libvirt {link.uri}: {one_line(str(error)) or 'no answer'}") from error


def attach_domain(link: LibvirtLink, domain: Domain, timeout_s: float) -> Attachment:
    """Attach to a running domain. Raises VmError."""
    monitor = LibvirtMonitor(link, domain.uuid, domain.name, timeout_s=timeout_s)
    try:
        policy = read_policy(link, domain, timeout_s)
        process = Process(domain.name, monitor.peer_pid)
        try:
            identity = identify(
                monitor,
                process,
                uuid=domain.uuid,
                monitor_address=monitor.address,
                policy=policy,
            )
            return Attachment(monitor, process, identity)
        except BaseException:
            process.close()
            raise
    except BaseException:
        monitor.close()
        raise


def read_policy(link: LibvirtLink, domain: Domain, timeout_s: float) -> VmPolicy:
    """The domain's current policy. Raises VmError."""
    libvirt, _ = bindings()

    def ask(handle: Any) -> str | None:
        try:
            return str(
                handle.metadata(
                    libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                    POLICY_NAMESPACE,
                    libvirt.VIR_DOMAIN_AFFECT_LIVE,
                )
            )
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return None
            raise

    try:
        return parse_policy(link.call_domain(domain.uuid, ask, timeout_s))
    except (TimeoutError, LinkDownError) as error:
        reason = str(error) or "libvirt does not answer"
        raise AttachError(domain.name, reason) from error
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise VmGoneError(domain.name, "the domain is not running") from error
        raise AttachError(domain.name, one_line(str(error))) from error


def attach_domains(link: LibvirtLink, timeout_s: float) -> Found:
    """Attach to every running domain of a connected link. Raises LinkDownError."""
    found = Found()
    domains = running_domains(link, timeout_s)
    if not domains:
        return found

    def attempt(domain: Domain) -> Attachment | Unreachable:
        try:
            return attach_domain(link, domain, timeout_s)
        except VmError as error:
            return Unreachable(domain.name, error.pid, error.reason)
        except VmdedupError as error:
            return Unreachable(domain.name, None, str(error))

    with ThreadPoolExecutor(min(_PARALLEL, len(domains))) as pool:
        for result in pool.map(attempt, domains):
            if isinstance(result, Unreachable):
                found.unreachable.append(result)
            else:
                found.attached.append(result)
    return found
