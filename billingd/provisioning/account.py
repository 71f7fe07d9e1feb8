"""The Recurly account that pays for a subscription: found, made, or why there is none."""

from dataclasses import dataclass
from typing import Final, Protocol

from billingd.domain.billing import Account
from billingd.domain.catalog import Person, Subscription
from billingd.once import Once
from billingd.provisioning.owner import candidates, owner

MISSING: Final = "account_missing"
CLOSED: Final = "account_closed"


@dataclass(frozen=True, slots=True)
class NoAccount:
    """Why nobody can be billed: `kind` is MISSING or CLOSED, `reason` a sentence that says how to mend it."""

    kind: str
    reason: str


class People(Protocol):
    """Who subscribed."""

    async def find_person(self, user_id: str) -> Person | None: ...


class Billing(Protocol):
    """The accounts at Recurly."""

    async def find_account(self, code: str) -> Account | None: ...
    async def create_account(
        self, code: str, *, email: str | None = None, key: str, retried: bool = False
    ) -> str: ...


class Accounts:
    """Finds accounts by their codes; makes the owner's own when `create_missing`."""

    def __init__(self, people: People, billing: Billing, once: Once, *, create_missing: bool) -> None:
        self._people = people
        self._billing = billing
        self._once = once
        self._create_missing = create_missing

    async def find(self, subscription: Subscription) -> str | NoAccount:
        """The code of the first account that exists (contract: user, team, organisation)."""
        codes = candidates(subscription)
        for code in codes:
            account = await self._billing.find_account(code)
            if account is None:
                continue
            if account.state == "active":
                return code
            return NoAccount(
                CLOSED,
                f"Subscription {subscription.title}: Recurly's account {code} is {account.state}. "
                "Reopen it at Recurly.",
            )
        own = owner(subscription)
        if self._create_missing and own is not None:
            return await self._create(subscription, own)
        return NoAccount(
            MISSING,
            f"Subscription {subscription.title} ({subscription.name}) has no account at Recurly. "
            f"Create one with the code {' or '.join(codes) or 'amplify-org-<id>'}.",
        )

    async def _create(self, subscription: Subscription, code: str) -> str:
        person = None
        if subscription.created_by is not None:
            person = await self._people.find_person(subscription.created_by)
        email = None if person is None else person.email

        async def send(key: str, *, retried: bool) -> str:
            return await self._billing.create_account(code, email=email, key=key, retried=retried)

        async def find() -> str | None:
            account = await self._billing.find_account(code)
            return None if account is None else account.code

        await self._once.write(f"account:{code}", {"code": code}, send=send, find=find, look_first=True)
        return code
