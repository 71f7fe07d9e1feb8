"""Checks of the daemon that runs with the same configuration, if one does."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from billingd.doctor.findings import Found, fine, look

Ask = Callable[[str, str], Awaitable[Mapping[str, Any]]]
"""A document of the admin listener's, by path and a key that it has, whatever its status."""

Listens = Literal["hangs", "another"] | None
"""What is at admin.listen where no daemon answers: one that hangs, something that is no billingd, nothing."""


class DaemonChecks:
    """What the daemon says over its admin listener; `away`: why none answers, None when one does.

    `listens`: what is there all the same. `holder` says which process has the store; `fix` mends both.
    `settings` are the public ones of who asks, by key.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        away: str | None,
        listens: Listens,
        holder: Callable[[], str | None],
        settings: Mapping[str, Any],
        fix: str,
    ) -> None:
        self._ask = ask
        self._away = away
        self._listens = listens
        self._settings = settings
        self._holder = holder
        self._fix = fix

    async def runs(self) -> Sequence[Found]:
        """It answers; none running is no fault of the installation."""
        if self._away is not None:
            process = self._holder()
            if process is not None:
                return [look(f"{self._away}, but process {process} holds the store", self._fix)]
            if self._listens == "hangs":
                return [look(f"{self._away}, but listens there", self._fix)]
            if self._listens == "another":
                return [look(self._away, "end what listens there, or set admin.listen to what is free")]
            return [fine(f"none answers ({self._away}); `billingd run` starts it")]
        return [fine(f"answers at {self._settings['admin.listen']}")]

    async def configuration(self) -> Sequence[Found]:
        """It runs with what is configured now, here and where it reads it."""
        told = await self._ask("/configuration", "runs_with")
        found = []
        if told["faults"]:
            why = f"it would not start again: {told['faults'][0]}"
            found.append(look(why, "billingd check-config    names every fault, as the daemon's user"))
        for key, fix in (("restart", "systemctl restart billingd"), ("reload", "billingd reload")):
            if told[key]:
                found.append(look(f"runs with another {', '.join(told[key])} than is configured now", fix))
        seen = {*told["restart"], *told["reload"]}
        runs = told["runs_with"]
        others = [
            key for key, value in self._settings.items() if runs.get(key, value) != value and key not in seen
        ]
        if others:
            says = f"runs with another {', '.join(others)} than this command"
            found.append(look(says, "name the configuration it runs with: billingd --config FILE doctor"))
        return found or [fine("runs with this configuration")]

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
