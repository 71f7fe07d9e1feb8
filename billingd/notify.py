"""What a person is told. A notice is an action of its own, so a failing one never holds back billing."""

from typing import Protocol

import structlog

from billingd.domain.attempts import Leased, Wait
from billingd.domain.catalog import Person

log = structlog.get_logger()


class People(Protocol):
    """Where addresses are looked up."""

    async def find_person(self, user_id: str) -> Person | None: ...


class Channels(Protocol):
    """What carries a notice; False when nobody is configured to be told."""

    async def tell_provider(self, title: str, body: str) -> bool: ...

    async def tell_subscriber(self, email: str, title: str, body: str) -> bool: ...


class Notifier:
    """Handles the two kinds of notice."""

    def __init__(self, channels: Channels, people: People) -> None:
        self._channels = channels
        self._people = people

    async def provider(self, action: Leased) -> Wait | None:
        """Tell the provider."""
        told = await self._channels.tell_provider(action.args["title"], action.args["body"])
        log.info("notice.sent" if told else "notice.nobody_to_tell", title=action.args["title"])
        return None

    async def subscriber(self, action: Leased) -> Wait | None:
        """Mail the subscriber. A missing address is normal: many are service accounts."""
        person = await self._people.find_person(action.args["user_id"])
        if person is None or person.email is None:
            log.info("notice.no_address", title=action.args["title"])
            return None
        body = action.args["body"].replace("{name}", person.name or "subscriber")
        await self._channels.tell_subscriber(person.email, action.args["title"], body)
        return None
