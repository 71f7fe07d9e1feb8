"""Checks of the daemon that runs with the same configuration, if one does."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from billingd.doctor.findings import Found, fine, look

Ask = Callable[[str, str], Awaitable[Mapping[str, Any]]]
"""A document of the admin listener's, by path and a key that it has, whatever its status."""


class DaemonChecks:
    """What the daemon says over its admin listener; `away`: why none answers, None when one does.

    `hangs`: it listens without answering. `holder` says which process has the store; `fix` mends both.
    """

    def __init__(
        self, ask: Ask, *, away: str | None, hangs: bool, holder: Callable[[], str | None], fix: str
    ) -> None:
        self._ask = ask
        self._away = away
        self._hangs = hangs
        self._holder = holder
        self._fix = fix

    async def runs(self) -> Sequence[Found]:
        """It answers; none running is no fault of the installation."""
        if self._away is not None:
            process = self._holder()
            if process is not None:
                return [look(f"{self._away}, but process {process} holds the store", self._fix)]
            if self._hangs:
                return [look(f"{self._away}, but listens there", self._fix)]
            return [fine(f"none answers ({self._away}); `billingd run` starts it")]
        return [fine("runs with this configuration")]

    async def progress(self) -> Sequence[Found]:
        """Its loops turn."""
        stuck = (await self._ask("/healthz", "stuck"))["stuck"]
        if stuck:
            return [
                look(
                    f"no progress lately: {', '.join(map(str, stuck))}",
                    "journalctl -u billingd -n 100    says why; systemctl restart billingd",
                )
            ]
        return [fine("every loop makes progress")]

    async def ready(self) -> Sequence[Found]:
        """It reaches what it needs."""
        document = await self._ask("/readyz", "ready")
        return [
            look(str(reason), "see the other checks here, then: billingd status")
            for reason in document.get("reasons", ())
        ] or [fine("it is ready")]
