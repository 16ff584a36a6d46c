"""Destinations and reasons: nothing of a host's name reaches ssh or a shell but a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.cli import doctor, main, report, top
from vmdedup.errors import UsageError
from vmdedup.ssh import Destination, reason

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://host7", Destination("host7")),
        ("ssh://host7/", Destination("host7")),
        ("ssh://root@host7.example.org:2222", Destination("host7.example.org", "root", 2222)),
        ("ssh://a-b.c@10.0.0.7", Destination("10.0.0.7", "a-b.c")),
        ("ssh://[fe80::1%eth0]:22", Destination("fe80::1%eth0", None, 22)),
    ],
)
def test_destinations(url: str, expected: Destination) -> None:
    assert Destination.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host7",
        "ssh://",
        "ssh://-oProxyCommand=reboot",
        "ssh://-oProxyCommand=reboot@host",
        "ssh://root@-oProxyCommand=reboot",
        "ssh://a b",
        "ssh://a;reboot",
        "ssh://$(reboot)",
        "ssh://`reboot`@host",
        "ssh://host\n",
        "ssh://root:secret@host",
        "ssh://host:0",
        "ssh://host:65536",
        "ssh://host:-1",
        "ssh://host/run/vmdedup",
        "ssh://host?x",
        "ssh://höst",
        "http://host",
        "https://host",
    ],
)
def test_what_is_no_destination_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(UsageError, match=r"write ssh://\[user@\]host\[:port\]") as error:
        Destination.parse(url)
    assert str(error.value).isprintable()


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_part_of_a_destination_can_be_an_option_or_shell(user: str, host: str) -> None:
    try:
        found = Destination.parse(f"ssh://{user}@{host}")
    except UsageError:
        return
    words = found.command
    at = words.index("--")
    assert words[at + 1 :] == [found.host, "vmdedup", "bridge"]
    for word in (found.host, found.user or ""):
        assert not word.startswith("-")
        assert not set(word) & set(" \t\n\"'`$&|;<>()*?{}\\!#~=/")


@pytest.mark.parametrize(
    ("exit_code", "said", "told"),
    [
        (127, "sh: 1: vmdedup: not found\n", "no vmdedup there"),
        (1, "vmdedup: no service at /run/x there: start `vmdedup run`\n", "no service at"),
        (2, "vmdedup: No such command 'bridge'. (see vmdedup --help)\n", "No such command"),
        (3, "", "ended there (3)"),
        (255, "Host key verification failed.\n", "host key is not known"),
        (255, "u@h: Permission denied (publickey).\n", "accepts no key"),
        (-9, "", "it was ended by signal 9"),
    ],
)
def test_reasons(exit_code: int, said: str, told: str) -> None:
    assert told in reason(exit_code, said)


def test_a_reason_is_one_short_printable_line() -> None:
    line = reason(1, "first\n" + "\x1b[2J\u202e" * 1000 + "\n")
    assert line.isprintable()
    assert len(line) <= 300


def test_verbs_are_about_this_host_or_ask_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMDEDUP_HOST", "ssh://host7")
    with pytest.raises(UsageError, match="run it there"):
        main._require_right_host(doctor.doctor, {})
    with pytest.raises(UsageError, match="--runtime-dir is about this host"):
        main._require_right_host(report.report, {"runtime_dir": "/run/x"})
    with pytest.raises(UsageError, match="--replay is about this host"):
        main._require_right_host(top.top, {"replay": "1h"})
    main._require_right_host(report.report, {"qmp": None})
    monkeypatch.delenv("VMDEDUP_HOST")
    main._require_right_host(doctor.doctor, {})
