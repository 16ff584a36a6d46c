"""A domain's XML: the elements behind what was found, and our policy in it.

Pure. Owns the reading of `<metadata>`, and the way from a finding to the element of the
domain XML that causes it. A finding is a hazard of the table (`policy/hazards.py`) or a
backend's refusal (`attach/ranges.py`). A policy that cannot be understood excludes
the domain, with the reason: a typing error must not mean "share with everyone".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

from pydantic import ValidationError

from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.monitor import one_line
from vmdedup.settings import DomainRule

_SWITCH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_MOST_PRIORITY = 1000
_ATTRIBUTES = ("trust-domain", "exclude", "priority", "cold")
_COLD = {"auto": False, "never": True}

Element = ElementTree.Element


class DomainWords:
    """Names the elements of one domain's XML. Raises ValueError if it is not XML."""

    def __init__(self, xml: str) -> None:
        try:
            self._root = ElementTree.fromstring(xml)
        except ElementTree.ParseError as error:
            raise ValueError(f"not a domain's XML: {error}") from error

    def element_of(self, key: str, reason: str) -> str | None:
        """The element behind a finding (its `key`) or a backend's refusal (key ""), if any."""
        if key:
            found = next((e for e in _FINDERS.get(key, _nothing)(self._root)), None)
        else:
            found = next(
                (
                    element
                    for start, path in _BACKING
                    if reason.startswith(start)
                    and self._root.find(f"memoryBacking/{path}") is not None
                    for element in [f"<memoryBacking><{path}{_BACKING_REST.get(path, '')}/>"]
                ),
                None,
            )
        return found

    def tell(self, key: str, reason: str) -> str:
        """The reason, with libvirt's own element if one causes it."""
        element = self.element_of(key, reason)
        return reason if element is None else f"{reason} (in the domain XML: {element})"


_BACKING = (
    ("merge=off", "nosharepages"),
    ("huge pages", "hugepages"),
    ("locked memory", "locked"),
    ("prealloc=on", "allocation"),
)
"""How a refusal of `attach/ranges.py` begins, and the part of <memoryBacking> that causes it."""
_BACKING_REST = {"allocation": " mode='immediate'"}


def _nothing(_root: Element) -> Iterator[str]:
    return iter(())


def _with(path: str, **wanted: str) -> Callable[[Element], Iterator[str]]:
    """Elements at `path` whose attributes have the wanted values, as written in the XML."""

    def find(root: Element) -> Iterator[str]:
        for element in root.iterfind(path):
            if all(element.get(name) == value for name, value in wanted.items()):
                yield _open_tag(element, wanted)

    return find


def _inside(parent: str, child: str, **wanted: str) -> Callable[[Element], Iterator[str]]:
    """Like `_with`, for a child of the element that the user knows."""

    def find(root: Element) -> Iterator[str]:
        for outer in root.iterfind(parent):
            for inner in outer.iterfind(child):
                if all(inner.get(name) == value for name, value in wanted.items()):
                    yield f"<{outer.tag}>{_open_tag(inner, wanted, closed=True)}"

    return find


def _open_tag(element: Element, shown: dict[str, str], *, closed: bool = False) -> str:
    names = [*shown, *(name for name in ("mode", "type", "model") if name not in shown)]
    pairs = [
        f" {name}='{one_line(v, 60)}'" for name in names if (v := element.get(name)) is not None
    ]
    return f"<{element.tag}{''.join(pairs)}{'/' if closed else ''}>"


def _any(*finders: Callable[[Element], Iterator[str]]) -> Callable[[Element], Iterator[str]]:
    def find(root: Element) -> Iterator[str]:
        for finder in finders:
            yield from finder(root)

    return find


_vhost_user = _any(
    _inside("devices/filesystem", "driver", type="virtiofs"),
    _with("devices/interface", type="vhostuser"),
    _with("devices/disk", type="vhostuser"),
    _inside("devices/video", "driver", name="vhostuser"),
    _with("devices/rng/backend", model="vhostuser"),
)
_host_device = _any(
    _with("devices/hostdev"),
    _with("devices/interface", type="hostdev"),
    _with("devices/interface", type="vdpa"),
    _with("devices/disk", type="vhostvdpa"),
)

_FINDERS: dict[str, Callable[[Element], Iterator[str]]] = {
    "free-page-reporting": _with("devices/memballoon", freePageReporting="on"),
    "pinned-device": _host_device,
    "vhost-user": _vhost_user,
    "other-mapper": _vhost_user,
    "pinned-drive": _with("devices/disk", type="nvme"),
    "gpu-blob": _inside("devices/video", "model", blob="on"),
    "9p-remote": _with("devices/filesystem", type="mount"),
    "pinned-memory": _host_device,
    "confidential": _with("launchSecurity"),
    "nested": _with("cpu"),
    "ordinary-filesystem": _inside("memoryBacking", "source", type="file"),
    "virtio-mem": _with("devices/memory", model="virtio-mem"),
    "preallocated": _with("memoryBacking/allocation", mode="immediate"),
    "persistent-memory": _any(
        _with("devices/memory", model="nvdimm"), _with("devices/memory", model="virtio-pmem")
    ),
    "ivshmem": _with("devices/shmem"),
}
"""Elements that can cause a hazard, by the hazard's key."""


def parse_policy(xml: str | None) -> VmPolicy:
    """The policy in our element of <metadata>; `None` is a domain without one.

    <policy trust-domain='NAME' exclude='yes|no' priority='NUMBER' cold='auto|never'/>, all
    optional.
    """
    if xml is None:
        return VmPolicy()
    try:
        return _policy_of(ElementTree.fromstring(xml))
    except ElementTree.ParseError:
        problem = "it is not XML"
    except ValidationError as error:
        problem = f"trust-domain: {one_line(error.errors()[0]['msg'], 120)}"
    except ValueError as error:
        problem = str(error)
    return VmPolicy(exclude=True, problem=f"policy in its metadata: {problem}")


def _policy_of(element: Element) -> VmPolicy:
    """The policy of an element. Raises ValueError."""
    tag = element.tag.rpartition("}")[2]
    if tag != "policy":
        raise ValueError(f"<{one_line(tag, 40)}> is not <policy>")
    for unknown in sorted(set(element.attrib) - set(_ATTRIBUTES)):
        known = ", ".join(_ATTRIBUTES)
        raise ValueError(f"unknown attribute {one_line(unknown, 40)} (there are {known})")
    exclude = _SWITCH.get(element.get("exclude", "no"))
    if exclude is None:
        raise ValueError(f"exclude='{one_line(element.get('exclude', ''), 40)}': write yes or no")
    domain = element.get("trust-domain")
    if domain is not None:
        DomainRule(domain=domain)
    cold_never = _COLD.get(element.get("cold", "auto"))
    if cold_never is None:
        raise ValueError(f"cold='{one_line(element.get('cold', ''), 40)}': write auto or never")
    priority = _priority_of(element.get("priority", "0"))
    return VmPolicy(domain, exclude, priority, cold_never)


def _priority_of(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,4}", text) or abs(int(text)) > _MOST_PRIORITY:
        raise ValueError(f"priority: write a number from -{_MOST_PRIORITY} to {_MOST_PRIORITY}")
    return int(text)
