"""Checks of Recurly: the key, the site, its currencies, the rate limit, accounts, times."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Protocol

from billingd.doctor.facts import Facts
from billingd.doctor.findings import Found, fine, look, skipped
from billingd.domain.billing import Account, Allowance, Site
from billingd.domain.catalog import Subscription
from billingd.domain.errors import NotDone
from billingd.domain.pricing import PlanSpec
from billingd.provisioning.owner import candidates, owner

MINUTES: Final = 5
"""Recurly counts requests over so many (recurly.md 3)."""
LOW: Final = 0.1
"""This part of the limit is little."""
PENDING_MAX: Final = 50
"""Subscriptions whose account is looked for; each may take three requests."""
NEEDED: Final = ("credit_memos", "only_bill_what_changed")
"""Sites from before May 2018 must switch these on, or refuse decimal prices (recurly.md 4.4)."""


class Probes(Protocol):
    """What Recurly can be asked that changes nothing."""

    @property
    def skew(self) -> timedelta | None: ...
    @property
    def allowance(self) -> Allowance | None: ...
    async def sites(self) -> tuple[Site, ...]: ...
    async def time_returns(self) -> bool | None: ...


class Accounts(Protocol):
    """Where they are."""

    async def find_account(self, code: str) -> Account | None: ...


class RecurlyChecks:
    """Each returns what it found, or raises what stood in the way."""

    def __init__(self, probes: Probes, accounts: Accounts, facts: Facts | None) -> None:
        self._probes = probes
        self._accounts = accounts
        self._facts = facts
        self._sites: tuple[Site, ...] = ()

    async def key(self) -> Sequence[Found]:
        """Recurly takes our key."""
        try:
            self._sites = await self._probes.sites()
        except NotDone as error:
            return [self._low(str(error))]
        return [fine("Recurly takes the key for reading (whether it may write is not tried)")]

    async def site(self) -> Sequence[Found]:
        """It opens a site that can do what billingd asks of it."""
        if not self._sites:
            return [
                look(
                    "the key opens no site",
                    "make a private API key at Recurly: Integrations, API Credentials",
                )
            ]
        found = []
        for site in self._sites:
            missing = [name for name in NEEDED if site.features and name not in site.features]
            if missing:
                found.append(
                    look(
                        f"site {site.subdomain} lacks {' and '.join(missing)}: it may refuse decimal prices",
                        f"ask Recurly's support to switch on {' and '.join(missing)} for {site.subdomain}",
                    )
                )
            else:
                real = "" if site.mode == "production" else ", charges nobody real money"
                found.append(fine(f"site {site.subdomain}, mode {site.mode}{real}"))
        return found

    async def currency(self) -> Sequence[Found]:
        """The site takes the currency of each active plan."""
        taken = frozenset(code for site in self._sites for code in site.currencies)
        if not taken:
            return [skipped("the site does not say which currencies it takes")]
        every = () if self._facts is None else await self._facts.plans()
        plans = [each.meaning for each in every if isinstance(each.meaning, PlanSpec)]
        found = [
            look(
                f"plan {plan.name} is priced in {plan.currency}, which the site does not take "
                f"(it takes {', '.join(sorted(taken))})",
                f"switch {plan.currency} on at Recurly: Configuration, Currencies",
            )
            for plan in plans
            if plan.currency not in taken
        ]
        used = ", ".join(sorted({plan.currency for plan in plans})) or "none yet"
        return found or [fine(f"the site takes every currency of the active plans ({used})")]

    async def rate_limit(self) -> Sequence[Found]:
        """There is room left under the limit."""
        allowance = self._probes.allowance
        if allowance is None:
            return [fine("Recurly states no rate limit")]
        said = f"{allowance.remaining} of {allowance.limit} requests per {MINUTES} minutes are left"
        if allowance.remaining < LOW * allowance.limit:
            return [self._low(f"only {said}; every program with a key of this site takes from them")]
        return [fine(said)]

    def _low(self, said: str) -> Found:
        allowance = self._probes.allowance
        at = None if allowance is None else allowance.resets_at
        until = "five minutes" if at is None else f"until {at:%H:%M:%S} UTC"
        return look(
            said,
            f"wait {until}; if it comes again, lower recurly.requests_per_minute, or find out what else uses "
            "a key of this site",
        )

    async def pace(self, requests_per_minute: int) -> Sequence[Found]:
        """The setting stays below the site's limit."""
        allowance = self._probes.allowance
        if allowance is None:
            return [skipped("Recurly states no rate limit")]
        allowed = max(1, allowance.limit // MINUTES)
        if requests_per_minute <= allowed:
            return [fine(f"{requests_per_minute} is within the {allowed} that the site allows")]
        return [
            look(
                f"recurly.requests_per_minute is {requests_per_minute}, and the site allows {allowed}",
                f"recurly.requests_per_minute = {allowed}",
            )
        ]

    async def accounts(self, missing: str) -> Sequence[Found]:
        """Somebody at Recurly pays for each subscription that waits for its approval."""
        pending = () if self._facts is None else await self._facts.pending()
        found = [
            fault
            for subscription in pending[:PENDING_MAX]
            if (fault := await self._account_fault(subscription, missing)) is not None
        ]
        if found:
            return found
        rest = (
            "" if len(pending) <= PENDING_MAX else f" ({len(pending) - PENDING_MAX} more were not looked for)"
        )
        return [fine(f"{min(len(pending), PENDING_MAX)} pending subscription(s), each with an account{rest}")]

    async def _account_fault(self, subscription: Subscription, missing: str) -> Found | None:
        codes = candidates(subscription)
        named = f"pending subscription {subscription.name}"
        for code in codes:
            account = await self._accounts.find_account(code)
            if account is not None:
                if account.state == "active":
                    return None
                return look(
                    f"{named}: account {code} is {account.state}", f"reopen account {code} at Recurly"
                )
        if missing == "create" and owner(subscription) is not None:
            return None
        return look(
            f"{named} has no account at Recurly (accounts.missing = {missing})",
            f"make an account at Recurly with the code {' or '.join(codes) or 'amplify-org-<id>'}",
        )

    async def times(self) -> Sequence[Found]:
        """A time that Recurly told means the same when it is sent back."""
        match await self._probes.time_returns():
            case None:
                return [skipped("there is no plan, measured unit or account at Recurly yet to try it with")]
            case True:
                return [fine("a time that Recurly told, sent back to it, means the same second")]
            case _:
                return [
                    look(
                        "Recurly does not list by time what it says was made then: a look before a resend "
                        "would miss what was sent",
                        "systemctl stop billingd    (or end it), and report this line",
                    )
                ]
