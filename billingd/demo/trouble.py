"""What goes wrong in the demo, on purpose: outages, lost answers, and the daemon killed in the act."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from billingd.demo.failure import InVain
from billingd.demo.processes import Stage
from billingd.demo.proof import Injected
from billingd.demo.story import Story
from billingd.demo.talk import Json, Talk

USAGE: Final = "/subscriptions/*/add_ons/*/usage"
SUBSCRIPTIONS: Final = "/subscriptions"
HOLD_SECONDS: Final = 2.5
"""How long Recurly sits on the call under which the daemon is killed."""
COMMIT_SECONDS: Final = 0.5
"""How long after that the call has surely taken effect."""
DOUBTED: Final = "idempotency_doubted"
CATCH_SECONDS: Final = 0.02
QUIET_SECONDS: Final = 20.0
EVIDENCE_SECONDS: Final = 30.0

STRIKES: Final[tuple[tuple[str, str, int, Mapping[str, Any]], ...]] = (
    ("lost", "the usage record is kept, the answer lost", 3, {}),
    ("500_committed", "the usage record is kept, the answer says 500", 2, {}),
    ("cut", "the usage record is kept, the answer breaks off", 1, {}),
    ("html_502_committed", "the usage record is kept, a gateway answers 502", 1, {}),
    ("500", "nothing is kept, the answer says 500", 1, {}),
    ("429", "nothing is kept, too many requests", 1, {"seconds": 2}),
)
"""Faults of single usage posts at Recurly: kind, what it means, how often, more."""


class Trouble:
    """Makes trouble, sees that it struck, and keeps account of it."""

    def __init__(self, stage: Stage, talk: Talk, story: Story) -> None:
        self._stage = stage
        self._talk = talk
        self._story = story
        self.injected: list[Injected] = []

    async def strike(self) -> None:
        """Usage posts go wrong in every way; returns when each has happened."""
        planned: dict[int, tuple[str, int]] = {}
        for kind, meaning, times, more in STRIKES:
            id_ = await self._arm(USAGE, kind, times, more)
            planned[id_] = (meaning, times)
            self._story.tell("fault", f"armed {times} time(s): {meaning}")

        async def all_fired() -> dict[int, int] | None:
            fired = await self._fired()
            return fired if all(fired[id_] >= times for id_, (_, times) in planned.items()) else None

        fired = await self._talk.until("every fault of a usage post has struck", all_fired)
        for id_, (meaning, times) in planned.items():
            self.injected.append(Injected(meaning, times, fired[id_]))
        self._story.tell("fault", f"all {sum(fired[id_] for id_ in planned)} have struck")

    async def outage(self, side: str, seconds: float) -> None:
        """One far side resets every connection for a while."""
        before = await self._struck("outage")
        await self._talk.control("POST", "outage", {"side": side, "on": True})
        self._story.tell("fault", f"{side.capitalize()} is down: every connection is reset, traffic goes on")
        await asyncio.sleep(seconds)

        async def hit() -> int | None:
            return (await self._struck("outage") - before) or None

        refused = await self._talk.until(f"{side}'s outage was noticed", hit)
        await self._talk.control("POST", "outage", {"side": side, "on": False})
        self._story.tell("fault", f"{side.capitalize()} is back; {refused} connections were reset")
        self.injected.append(Injected(f"outage of {side.capitalize()}", 1, 1))

    async def kill_after_commit(
        self, path: str, what: str, *, after: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """SIGKILL when Recurly has carried a call out and before the daemon could write that down.

        The daemon is stopped while Recurly sits on the call, and killed once Recurly has carried it out: its
        answer is in the dead daemon's socket. The next one proves it by finding at Recurly what it was about
        to send again; without that evidence the kill missed. `after` is what makes the daemon call.
        """
        await self._catch(path, what, after)
        self._stage.daemon.pause()
        await asyncio.sleep(HOLD_SECONDS + COMMIT_SECONDS)
        await self._stage.kill_daemon()
        self._story.tell("fault", f"SIGKILL: {what} is done at Recurly, and the daemon never heard of it")
        since = self._stage.daemon.log.stat().st_size
        await self.start_daemon()
        found = await self._evidence(path, since)
        if found is not None:
            self._story.tell("billingd", f"is back, finds {found} at Recurly and does not send it again")
        return found is not None

    async def kill_under_way(self, path: str, what: str) -> None:
        """SIGKILL while a call is under way that Recurly carries out only afterwards.

        The next daemon starts when that has happened. Started sooner, it looks in vain, and must sometimes
        wait for longer than anybody likes to watch.
        """
        await self._catch(path, what, None)
        await self._stage.kill_daemon()
        self._story.tell("fault", f"SIGKILL: {what} is on its way, and Recurly has yet to take it in")
        await asyncio.sleep(HOLD_SECONDS)
        await self.start_daemon()
        self._story.tell("billingd", "is back; it asks Recurly before it sends again")

    async def start_daemon(self) -> None:
        """Start it, and wait until it answers."""
        await self._stage.daemon.start()
        await self._talk.until("the daemon listens", lambda: self._talk.admin("/status"))

    async def _catch(self, path: str, what: str, after: Callable[[], Awaitable[None]] | None) -> None:
        """Return as soon as Recurly sits on the next such call, and no webhook is on its way."""

        async def quiet() -> Json | None:
            await self._rely_on_keys()
            status = await self._talk.admin("/status")
            return status if status and not status["traffic"]["unknown_outcomes"] else None

        with contextlib.suppress(InVain):
            await self._talk.until("no call of unknown outcome", quiet, seconds=QUIET_SECONDS)
        id_ = await self._arm(path, "slow", 1, {"seconds": HOLD_SECONDS})
        if after is not None:
            await after()

        async def fired() -> bool | None:
            return (await self._fired())[id_] > 0 or None

        await self._talk.until(f"{what} is on its way to Recurly", fired, every=CATCH_SECONDS)
        await self._talk.control("POST", "hooks/settle", {})

    async def _rely_on_keys(self) -> None:
        """After an outage billingd may doubt that Recurly heeds idempotency keys; an operator knows it does.

        In doubt it would wait for more than a minute after a kill, to be sure of what was under way then.
        """
        for item in await self._talk.held():
            if item["kind"] == DOUBTED:
                what = "Recurly heeds idempotency keys, the outage kept requests from it"
                self._story.tell("operator", f"billingd held release {item['id']}: {what}")
                await self._talk.act(f"/held/{item['id']}/release", {})

    async def _evidence(self, path: str, since: int) -> str | None:
        """The write that the restarted daemon found done, None if it found none."""
        prefix = "usage:" if path == USAGE else "subscription:"

        async def found() -> str | None:
            writes = [
                str(event.get("write"))
                for event in self._stage.daemon.logged(since)
                if event.get("event") == "write.found"
            ]
            return next((write for write in writes if write.startswith(prefix)), None)

        try:
            return await self._talk.until("evidence of the kill", found, seconds=EVIDENCE_SECONDS)
        except InVain:
            return None

    async def _arm(self, path: str, kind: str, times: int, more: Mapping[str, Any]) -> int:
        rule = {"side": "recurly", "method": "POST", "path": path, "kind": kind, "times": times, **more}
        return int((await self._talk.control("POST", "faults", rule))["fault"])

    async def _fired(self) -> dict[int, int]:
        faults = await self._talk.control("GET", "faults")
        return {each["id"]: each["fired"] for each in faults["faults"]}

    async def _struck(self, kind: str) -> int:
        return int((await self._talk.control("GET", "faults"))["struck"].get(kind, 0))
