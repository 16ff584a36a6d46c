"""Steering: controls that are set, and settings that SIGHUP has read again.

Owns the settings in effect, and how a changed control takes effect on the fleet; `Pace`
has the controls. Promises all or nothing: a request, or a file, with one bad value
changes nothing. Refuses settings that only a restart can change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vmdedup.controls import ONLY_UNSHARED, ControlFacts, Controls, change, initial
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.scouts import Scouts
from vmdedup.daemon.shortage import ShortageWatch
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.daemon.unmerge_request import unmerge
from vmdedup.engine.fleet import Fleet
from vmdedup.engine.terms import Limits
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.ipc.protocol import ControlValues
from vmdedup.linux import malloc
from vmdedup.settings import Settings

Reload = Callable[[], Settings]
"""Reads the settings again. Raises UsageError."""

_FIXED = (
    "runtime_dir",
    "store_dir",
    "state_dir",
    "history_interval_s",
    "history_days",
    "api_group",
    "api_tcp_port",
    "api_tls",
    "libvirt",
    "monitor",
    "sketch_secret",
)
"""Settings that a running daemon cannot change."""


def apply_controls(fleet: Fleet, settings: Settings, controls: Controls) -> None:
    """Hand these settings and controls to the engine. Raises StoreError."""
    fleet.use(settings.model_copy(update={"controls": controls}))
    fleet.engine.limit(
        Limits(
            max_kernel_pages=controls.max_kernel_pages or None,
            max_page_sharing=controls.max_page_sharing,
            smart_scan=bool(controls.smart_scan),
            merge_across_nodes=bool(controls.merge_across_nodes),
        )
    )


class Steering:
    """Changes of controls and settings."""

    def __init__(
        self,
        settings: Settings,
        reload: Reload,
        fleet: Fleet,
        scouts: Scouts,
        journal: Journal,
        pace: Pace,
        feed: SnapshotFeed,
        watch: ShortageWatch,
    ) -> None:
        self._settings = settings
        self._reload = reload
        self._fleet = fleet
        self._scouts = scouts
        self._journal = journal
        self._pace = pace
        self._feed = feed
        self._watch = watch

    @property
    def settings(self) -> Settings:
        """The settings as they were read last, without controls that were set by hand."""
        return self._settings

    def set(self, values: Mapping[str, str | int]) -> ControlValues:
        """Change controls, all of these or none; returns every control afterwards.

        Raises ControlError, and UnfinishedError as `_put_in_effect` does.
        """
        changed = change(self._pace.controls, values, self._facts(values, self._settings))
        names = ", ".join(f"{name}={value}" for name, value in values.items())
        self._journal.add("controls", None, names)
        self._put_in_effect(changed)
        if "run" in values and changed.run == 1:
            self._fleet.wake_all()
        return self._pace.values()

    def reread(self) -> None:
        """Take over the settings that can change while running. Raises VmdedupError."""
        self._feed.note_change()
        try:
            settings = self._reload()
            fixed = [
                name for name in _FIXED if getattr(settings, name) != getattr(self._settings, name)
            ]
            if fixed:
                raise UsageError(f"{', '.join(fixed)}: changes only with a new start")
            controls = self._reread_controls(settings)
        except VmdedupError as error:
            self._journal.add("reload-refused", None, f"nothing was changed: {error}")
            return
        self._settings = settings
        self._scouts.follow(settings.qmp)
        self._journal.add("reloaded", None, "")
        with self._journal.surviving():
            self._put_in_effect(controls)
        for name in self._fleet.follow_domains():
            self._journal.add("changed", name, "its trust domain changed")

    def _reread_controls(self, settings: Settings) -> Controls:
        """All controls: those that the settings name follow them, others stay as set by hand."""
        new, old = settings.controls.model_dump(), self._settings.controls.model_dump()
        named = settings.controls.model_fields_set
        wanted = {name: value for name, value in new.items() if name in named or value != old[name]}
        controls = self._pace.controls
        pages_to_scan = wanted.pop("pages_to_scan", controls.pages_to_scan)
        changed = change(controls, wanted, self._facts(wanted, settings))
        return initial({**changed.model_dump(), "pages_to_scan": pages_to_scan})

    def _facts(self, requested: Iterable[str], settings: Settings) -> ControlFacts:
        """The facts about the present state that the rules of these controls need."""
        pages_shared = 0
        if set(ONLY_UNSHARED) & set(requested):  # counting takes a while
            pages_shared = self._fleet.report(converged=None).host.pages_shared
        return ControlFacts(pages_shared, has_hook=bool(settings.memory_hook))

    def _put_in_effect(self, controls: Controls) -> None:
        """Make changed controls take effect; `run` 2 unmerges everything.

        Raises UnfinishedError if that left pages merged; `Upkeep.settle` tries them again.
        """
        before_run = self._pace.controls.run
        self._pace.use(controls)
        apply_controls(self._fleet, self._settings, controls)
        self._watch.use(self._fleet.settings)
        try:
            if controls.run == 2 and (before_run != 2 or self._fleet.left_to_unmerge_pages):
                malloc.keep()
                self._fleet.rest_all()
                unmerge(self._fleet, self._scouts, self._journal, None)
        finally:
            if controls.run != 1:
                self._feed.note_change()
                self._fleet.stop_dirty_tracking()
                malloc.give_back()
        if controls.run == 1 and before_run != 1:
            self._fleet.wake_all()
            self._pace.hurry()
