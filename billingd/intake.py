"""Taking events in, whichever way they came: each is recorded with its actions in one transaction, once."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from billingd.domain.events import Event, actions_for
from billingd.loops import Clock
from billingd.store import events, links, outbox
from billingd.store.engine import Store, Tx

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of an event: whether it was new, and how many actions it led to.

    `repeated`: a webhook had brought it before; what only the feed had shown is not new either.
    """

    new: bool
    actions: int
    repeated: bool = False


class Intake:
    """Where webhooks and the feed meet: an event that both bring is taken once."""

    def __init__(self, store: Store, clock: Clock, wake_outbox: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._wake_outbox = wake_outbox

    async def take(self, event: Event) -> Taken:
        """Take one delivery of a webhook. Raises StoreUnavailable; what is sent again then may be known."""
        async with self._store.write() as tx:
            taken = await self._take(tx, event, "webhook")
            if not taken.new:
                taken = Taken(False, 0, repeated=not await events.delivered(tx, event))
        if taken.actions:
            self._wake_outbox()
        return taken

    async def take_all(
        self, found: Sequence[Event], keep: Callable[[Tx], Awaitable[None]]
    ) -> tuple[int, int]:
        """Take a page of the feed; how many were new, and how many actions they led to.

        `keep` writes the page's position in the same transaction, so that neither is kept without the other.
        """
        new = actions = 0
        led: list[Event] = []
        async with self._store.write() as tx:
            known = await events.known(tx, "amplify", [event.id for event in found]) if found else set()
            for event in found:
                if event.id in known:
                    continue
                taken = await self._take(tx, event, "feed")
                new, actions = new + taken.new, actions + taken.actions
                if taken.actions:
                    led.append(event)
            await keep(tx)
        for event in led:
            log.info(
                "event.caught_up",
                event_id=event.id,
                resource=f"{event.kind}/{event.name}",
                correlation=event.correlation_id or event.id,
            )
        if actions:
            self._wake_outbox()
        return new, actions

    async def _take(self, tx: Tx, event: Event, via: events.Via) -> Taken:
        now = self._clock.now()
        actions = actions_for(event)
        if actions and await _needs_nothing(tx, event):
            actions = ()
        new = await events.insert(tx, event, now=now, via=via)
        added = await outbox.insert(tx, actions, now=now, event_id=event.id) if new else 0
        return Taken(new, added)


async def _needs_nothing(tx: Tx, event: Event) -> bool:
    """Whether it tells of our own write, or of a product that is not ours and never was.

    Attributes are no subresource (amplify.md 2.6). Whether a subresource has versions of its own is not
    known, so an event of one is never taken for ours, whatever version it shows.
    """
    if event.kind == "Product":
        return event.labelled is False and not await links.plans_of_product(tx, event.name)
    if event.type != "ResourceUpdated" or not event.resource_id or not event.resource_version:
        return False
    return await links.is_own_write(
        tx, kind=event.kind, resource_id=event.resource_id, resource_version=event.resource_version
    )
