"""Checks of Amplify: the token, the roles, the version, each permission, the clock, the pricing."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Final, Protocol

from billingd.doctor.facts import Facts
from billingd.doctor.findings import Found, fine, look, skipped
from billingd.domain.catalog import Marketplace
from billingd.domain.errors import Misconfigured
from billingd.domain.pricing import Inexpressible, NotOurs, PlanSpec

SKEW_MAX: Final = timedelta(seconds=10)
"""More than whole seconds and a slow answer explain."""
NAMES_MAX: Final = 5


class Probes(Protocol):
    """What Amplify can be asked that changes nothing."""

    @property
    def skew(self) -> timedelta | None: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    async def token(self) -> timedelta: ...
    async def collection(self, plural: str) -> None: ...
    async def hidden(self, plural: str) -> int | None: ...
    async def users(self, user_id: str | None) -> None: ...


class Marketplaces(Protocol):
    """Where they are listed."""

    async def list_marketplaces(self) -> tuple[Marketplace, ...]: ...


class AmplifyChecks:
    """Each returns what it found, or raises what stood in the way."""

    def __init__(self, probes: Probes, marketplaces: Marketplaces, facts: Facts, *, client_id: str) -> None:
        self._probes = probes
        self._marketplaces = marketplaces
        self._facts = facts
        self._client_id = client_id

    async def token(self) -> Sequence[Found]:
        """The login takes our credentials."""
        length = await self._probes.token()
        return [fine(f"the login gives {self._client_id} a token, used for {length.total_seconds():.0f} s")]

    async def collection(self, plural: str) -> Sequence[Found]:
        """A collection of the catalog can be read."""
        await self._probes.collection(plural)
        return [fine(f"{plural} can be read")]

    async def roles(self) -> Sequence[Found]:
        """The account sees everything, not only what belongs to its teams."""
        found = {plural: await self._probes.hidden(plural) for plural in ("products", "subscriptions")}
        hidden = [f"{number} of the {plural}" for plural, number in found.items() if number]
        if hidden:
            return [
                look(
                    f"{self._client_id} does not see {' and '.join(hidden)}: it sees only what its teams own",
                    engage_admin(self._client_id),
                )
            ]
        if None in found.values():
            return [fine("reads what it asks for; Amplify does not say whether that is all there is")]
        return [fine("the account sees all there is (writing takes the same role, and is not tried)")]

    async def users(self, *, why: str | None) -> Sequence[Found]:
        """Users of the platform can be read, where somebody is to be written to."""
        if why is None:
            return [
                skipped("no setting makes billingd read users (accounts.missing, notifications.subscriber)")
            ]
        known = [one.created_by for one in await self._facts.pending() if one.created_by is not None]
        try:
            await self._probes.users(known[0] if known else None)
        except Misconfigured as error:
            return [look(f"{error} ({why} needs it)", administrator(self._client_id))]
        return [fine(f"users can be read, for {why}")]

    async def api_version(self, wanted: str) -> Sequence[Found]:
        """The collections answer under the configured version."""
        versions = self._probes.versions
        others = {plural: version for plural, version in versions.items() if version != wanted}
        if not others:
            return [fine(f"every collection answers under {wanted}")]
        if len(others) == len(versions):
            return [
                look(
                    f"no collection answers under {wanted}, all under {min(others.values())}: "
                    "the first call of a process to each is made in vain",
                    f'amplify.api_version = "{min(others.values())}"',
                )
            ]
        named = ", ".join(f"{plural} under {version}" for plural, version in sorted(others.items()))
        return [fine(f"{wanted}, but {named}: billingd falls back by itself")]

    async def native_billing(self) -> Sequence[Found]:
        """No Marketplace charges the consumers by itself too."""
        every = await self._marketplaces.list_marketplaces()
        found = [
            look(
                f"Marketplace {one.title} bills by itself ({one.payment_type}): consumer organisations would "
                "be charged twice",
                f"switch billing off in the settings of Marketplace {one.title} ({one.name}) at Amplify",
            )
            for one in every
            if one.payment_type
        ]
        return found or [fine(f"none of {len(every)} Marketplace(s) bills by itself")]

    async def products(self) -> Sequence[Found]:
        """Something is labelled as billed here."""
        products = await self._facts.products()
        if not products:
            return [
                look(
                    "no product has the attribute billingSystem=recurly, so that nothing is billed",
                    "set the attribute billingSystem to recurly on each product that is to be billed",
                )
            ]
        return [
            fine(f"{len(products)} product(s) with billingSystem=recurly: {_some(p.name for p in products)}")
        ]

    async def quotas(self) -> Sequence[Found]:
        """The quotas of a plan can be read."""
        plans = await self._facts.plans()
        if not plans:
            return [skipped("there is no active plan of a billed product to read quotas of")]
        return [
            fine(f"{sum(len(each.quotas) for each in plans)} quota(s) of {len(plans)} active plan(s) read")
        ]

    async def pricing(self) -> Sequence[Found]:
        """Recurly can charge what each active plan charges."""
        plans = await self._facts.plans()
        found = [
            look(reason, f"change plan {each.plan.name} at Amplify, or make another plan and migrate to it")
            for each in plans
            if isinstance(each.meaning, Inexpressible)
            for reason in each.meaning.reasons
        ]
        if found:
            return found
        billed = sum(isinstance(each.meaning, PlanSpec) for each in plans)
        others = [each.meaning.reason for each in plans if isinstance(each.meaning, NotOurs)]
        said = f"{billed} active plan(s) can be billed exactly"
        return [fine("; ".join([said, *(f"not billed: {reason}" for reason in others)]))]


def clock(side: str, skew: timedelta | None) -> Sequence[Found]:
    """Our clock goes with theirs."""
    if skew is None:
        return [skipped(f"{side} states no time (no Date in its answers)")]
    seconds = skew.total_seconds()
    if abs(skew) <= SKEW_MAX:
        return [fine(f"goes with {side}'s, to {abs(seconds):.0f} s")]
    way = "behind" if seconds > 0 else "ahead of"
    return [
        look(
            f"this machine's clock is {abs(seconds):.0f} s {way} {side}'s",
            "timedatectl set-ntp true    (or: chronyc makestep), then look at `timedatectl`",
        )
    ]


def engage_admin(client_id: str) -> str:
    """How the role is given that Central asks for."""
    return (
        f"give the service account {client_id} the role Engage Admin (Amplify: Organization, Service "
        f"Accounts; or: axway service-account update {client_id} --role api_central_admin)"
    )


def administrator(client_id: str) -> str:
    """How the role is given that the platform asks for."""
    return (
        f"give the service account {client_id} the role Administrator (Amplify: Organization, Service "
        f"Accounts; or: axway service-account update {client_id} --role administrator)"
    )


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:NAMES_MAX]) + (", …" if len(every) > NAMES_MAX else "")
