"""Reading the configuration again while the daemon runs: all is checked, then what can change changes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog
from aiohttp import web

from billingd import systemd, tls
from billingd.settings import ConfigurationError, Settings, flat, public

log = structlog.get_logger()

RELOADABLE: Final = frozenset(
    f"webhooks.{key}" for key in ("secret", "auth", "body_bytes_max", "tls_cert", "tls_key")
)
"""What changes without a restart: how requests are judged. Everything else is built into running work."""

CERTIFICATE_EVERY: Final = timedelta(minutes=1)
"""How often to see whether the certificate's files are others."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Keys that changed: those that are in effect now, and those that wait for a restart."""

    reloaded: list[str]
    restart: list[str]


class Reloader:
    """Knows what the daemon runs with, and takes over what may change."""

    def __init__(
        self, settings: Settings, read: Callable[[], Settings], apply: Callable[[Settings], None]
    ) -> None:
        self.wake = asyncio.Event()
        self._started = flat(settings)
        self._settings = settings
        self._read = read
        self._apply = apply
        self._requested = False
        self._one_at_a_time = asyncio.Lock()
        self._certificate = tls.stamps(settings.webhooks)

    def request(self) -> None:
        """Reload soon, as SIGHUP asks."""
        self._requested = True
        self.wake.set()

    async def reload(self) -> Reloaded:
        """Take over what the configuration says now. Raises ConfigurationError, and then nothing changed."""
        async with self._one_at_a_time:
            systemd.notify(systemd.reloading())
            try:
                settings = await asyncio.to_thread(self._read)
                self._certificate = tls.stamps(settings.webhooks)
                self._apply(settings)
            except ConfigurationError as error:
                log.error("configuration.refused", faults=[str(fault) for fault in error.faults])
                raise
            finally:
                systemd.notify("READY=1")
            before, now = flat(self._settings), flat(settings)
            self._settings = settings
        done = Reloaded(
            sorted(key for key in RELOADABLE if now[key] != before[key]),
            sorted(key for key in now if key not in RELOADABLE and now[key] != self._started[key]),
        )
        log.info("configuration.reloaded", changed=done.reloaded, waits_for_restart=done.restart)
        return done

    async def run_once(self) -> bool:
        """Do what SIGHUP asked for, and take a renewed certificate."""
        if self._requested:
            self._requested = False
            try:
                await self.reload()
            except ConfigurationError:  # said already; what was in effect stays
                return False
        elif (found := tls.stamps(self._settings.webhooks)) != self._certificate:
            self._certificate = found
            try:
                self._apply(self._settings)
            except ConfigurationError as error:  # half written, perhaps: the next change is looked at again
                log.error("certificate.refused", faults=[str(fault) for fault in error.faults])
            else:
                log.info("certificate.reloaded")
        return False

    async def answer(self, _request: web.Request) -> web.Response:
        """`POST /reload`: what became of it, or 422 with every fault."""
        try:
            done = await self.reload()
        except ConfigurationError as error:
            faults = [
                {"key": fault.key, "message": fault.message, "place": fault.place or None}
                for fault in error.faults
            ]
            message = "the configuration has faults; what was in effect stays"
            return web.json_response(
                {"error": {"code": "configuration", "message": message}, "faults": faults}, status=422
            )
        return web.json_response({"reloaded": done.reloaded, "restart": done.restart, "faults": []})

    async def tell(self, _request: web.Request) -> web.Response:
        """`GET /configuration`: what it runs with but for secrets, and what it would read otherwise."""
        runs = {**self._started, **{key: flat(self._settings)[key] for key in RELOADABLE}}
        now, faults = runs, list[str]()
        try:
            now = flat(await asyncio.to_thread(self._read))
        except ConfigurationError as error:
            faults = [str(fault) for fault in error.faults]
        changed = sorted(key for key in runs if now[key] != runs[key])
        return web.json_response(
            {
                "runs_with": public(runs),
                "reload": [key for key in changed if key in RELOADABLE],
                "restart": [key for key in changed if key not in RELOADABLE],
                "faults": faults,
            }
        )
