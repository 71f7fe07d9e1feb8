"""Checks of the daemon that runs with the same configuration, if one does."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from billingd.doctor.findings import Found, fine, look

Ask = Callable[[str, str], Awaitable[Mapping[str, Any]]]
"""A document of the admin listener's, by path and a key that it has, whatever its status."""


class DaemonChecks:
    """What the daemon says over its admin listener; `away`: why none answers, None when one does."""

    def __init__(self, ask: Ask, *, away: str | None) -> None:
        self._ask = ask
        self._away = away

    async def runs(self) -> Sequence[Found]:
        """It answers; none running is no fault of the installation."""
        if self._away is not None:
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
