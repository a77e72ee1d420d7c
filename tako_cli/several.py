"""The servers of an environment as one app: what is in the store that they share, and what each has of its own.

The first of them answers for the shared store. The others are asked for what is local, runs and schedules, which are in
each one's own: they say of which `server` they are. Where nothing is shared, all are like that.
"""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tako_runtime.control import Json
from tako_runtime.errors import NotFound, Refused
from tako_runtime.feed import Event
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.run import Found
from tako_runtime.site import Schedules, Site

#: What is done to a whole store: only somebody who has said which can mean one that is not shared.
_OF_A_STORE = frozenset({"signal", "status"})


class Several:
    """A `Site` made of those of several servers, by their names."""

    development = False

    def __init__(self, sites: Mapping[str, Site], *, shared: bool = True) -> None:
        self._sites, self._shared = dict(sites), shared
        self._first = next(iter(sites.values()))
        self._server_of: dict[str, str] = {}  # by the id of a run that was found

    @property
    def where(self) -> str:
        return f"on {', '.join(self._sites)}"

    def __getattr__(self, name: str) -> Any:
        if name in _OF_A_STORE and not self._shared:
            raise self._which("each server has a store of its own")
        return getattr(self._first, name)

    def _which(self, what: str) -> Refused:
        return Refused(what, hint=f"Say which: --server {next(iter(self._sites))}")

    def find(self, prefix: str) -> Found:
        """As `Control.find`, on all of them."""
        found: dict[str, Found] = {}
        missing: NotFound | None = None
        for server, site in self._sites.items():
            try:
                run = site.find(prefix)
            except NotFound as error:
                missing = missing or error
                continue
            if run.id not in found:
                found[run.id] = run
                self._server_of[run.id] = server
        exact = found.get(prefix.strip().lower())
        if exact is None and len(found) > 1:
            raise Refused(f"{prefix} is part of several ids: {', '.join(found)}", hint="Give more of it.")
        if exact is None and not found and missing is not None:
            raise missing
        return exact or next(iter(found.values()))

    def list_runs(self, *, limit: int = 50, **filters: Any) -> list[Json]:
        found = []
        for server, site in self._sites.items():
            runs = site.list_runs(limit=limit, **filters)
            found += [self._marked(run, server) for run in runs if self._is_own(run) or site is self._first]
        return sorted(found, key=lambda run: str(run["id"]), reverse=True)[:limit]

    def signals(self, limit: int = 50) -> Json:
        found = self._first.signals(limit)
        if not self._shared:
            found["kept"] = [one for site in self._sites.values() for one in site.signals(limit)["kept"]][:limit]
        waiting = [
            self._marked(wait, server)
            for server, site in self._sites.items()
            for wait in (found if site is self._first else site.signals(limit))["waiting"]
            if self._is_own(wait) or site is self._first
        ]
        return {**found, "waiting": sorted(waiting, key=lambda wait: str(wait["signal"]))[:limit]}

    def timetables(self) -> list[tuple[str | None, Schedules]]:
        """The schedules of the shared store, and those that each server has of its own, under its name."""
        found: list[tuple[str | None, Schedules]] = []
        for server, site in self._sites.items():
            asked = site.schedules()
            own = [one for one in asked.records if one.workflow in asked.local or not self._shared]
            if self._shared and site is self._first:
                found.append((None, replace(asked, records=[one for one in asked.records if one not in own])))
            found.append((server, replace(asked, records=own)))
        return found

    def prunable(self, before: int, **which: Any) -> int:
        return sum(site.prunable(before, **{**which, **only}) for site, only in self._stores())

    def prune(self, before: int, **which: Any) -> int:
        return sum(site.prune(before, **{**which, **only}) for site, only in self._stores())

    def show(self, prefix: str) -> Json:
        run, site = self._of(prefix)
        return self._marked(site.show(run.id), self._server_of[run.id])

    def why(self, prefix: str) -> Json:
        run, site = self._of(prefix)
        return site.why(run.id)

    def retry(self, prefix: str, from_step: str | None = None) -> Json:
        run, site = self._of(prefix)
        return self._marked(site.retry(run.id, from_step), self._server_of[run.id])

    def cancel(self, prefix: str, reason: str) -> Json:
        run, site = self._of(prefix)
        return self._marked(site.cancel(run.id, reason), self._server_of[run.id])

    def start(self, flow: Declared, payload: str, **how: Any) -> Found:
        if flow.local or not self._shared:
            raise self._which(f"each server has runs of {flow.name} of its own")
        run = self._first.start(flow, payload, **how)
        self._server_of[run.id] = next(iter(self._sites))
        return run

    def wait(self, run: Found) -> Json:
        return self._marked(self._site_of(run.id).wait(run), self._server_of[run.id])

    def place(self, run: Found) -> str:
        return self._site_of(run.id).place(run)

    def folder(self, release: str) -> Path:
        return self._first.folder(release)

    def manifest(self) -> Manifest:
        return self._first.manifest()

    async def tail(self, run: str | None = None) -> AsyncIterator[Event]:
        """Of one run wherever it is; of all, those that the first of them hears of."""
        site = self._first if run is None else self._site_of(run)
        async for event in site.tail(run):
            yield event

    def _of(self, prefix: str) -> tuple[Found, Site]:
        run = self.find(prefix)
        return run, self._site_of(run.id)

    def _stores(self) -> list[tuple[Site, dict[str, Any]]]:
        """Each site, and of which of its stores it is asked: nobody is asked twice of the shared one."""
        once = {"local": True} if self._shared else {}
        return [(site, {} if site is self._first else once) for site in self._sites.values()]

    def _site_of(self, run: str) -> Site:
        return self._sites[self._server_of[run]]

    def _is_own(self, one: Json) -> bool:
        return one.get("local", False) or not self._shared

    def _marked(self, one: Json, server: str) -> Json:
        return {**one, "server": server} if self._is_own(one) else one


def timetables(site: Site | Several) -> list[tuple[str | None, Schedules]]:
    """The schedules of that app, by the server to which they belong; None for what belongs to no one of several."""
    return site.timetables() if isinstance(site, Several) else [(None, site.schedules())]
