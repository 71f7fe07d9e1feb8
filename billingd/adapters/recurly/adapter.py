"""Recurly, as the flows use it: domain values in and out, outcomes as errors named by what to do next."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeVar, cast
from urllib.parse import quote

import structlog

from billingd.adapters.recurly import bodies, reading
from billingd.adapters.recurly.calls import Calls
from billingd.adapters.recurly.client import Client, locate
from billingd.adapters.recurly.probes import Probes
from billingd.domain.billing import (
    Account,
    BilledAddOn,
    BilledPlan,
    BilledSubscription,
    BilledUsage,
    NewSubscription,
    NewUsage,
)
from billingd.domain.errors import Misconfigured, NotDone, Retryable, Unknown
from billingd.domain.pricing import PLAN_CODES, AddOnSpec, MeasuredUnitSpec, PlanSpec

log = structlog.get_logger(__name__)

KEY_LENGTH_MAX: Final = 255

T = TypeVar("T")


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Recurly:
    """One Recurly site.

    Reads raise Retryable when they fail; "not found" is said only when Recurly says so itself.
    Writes return when clearly done, and else raise NotDone, Refused, NotFound, Misconfigured, or Unknown.
    Each speaks of this one request: what an earlier one with the same key led to stays as unknown as it was.
    Recurly may return a stored refusal for an hour, so what was refused for now is best sent under a new key.
    A write whose await was cancelled may have happened: its thread goes on.
    `retried` says that an earlier attempt with the same key was sent before.
    """

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str | None,
        region: str,
        timeout: timedelta,
        requests_per_minute: int,
        threads: int,
        observe: Callable[[str, float], None] | None = None,
        clock: Callable[[], datetime] = _utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not api_key or not api_key.isascii() or any(c.isspace() for c in api_key):
            raise ValueError("Recurly's API key must be ASCII without spaces")
        if timeout <= timedelta() or threads < 1:
            raise ValueError("Recurly needs a timeout above zero and at least one thread")
        address = locate(base_url, region)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if address.plain else ssl.create_default_context()

        def make_client() -> Client:
            return Client(api_key, address, timeout_seconds=timeout.total_seconds(), context=context)

        first = make_client()  # refuses at start an SDK whose inside we do not know
        self._calls = Calls(
            make_client,
            first,
            timeout=timeout,
            requests_per_minute=requests_per_minute,
            threads=threads,
            observe=observe,
            clock=clock,
            monotonic=monotonic,
            sleep=sleep,
        )
        self.probes = Probes(self._calls)

    @property
    def last_reached_at(self) -> datetime | None:
        """When Recurly last answered and let us in, whatever it said."""
        return self._calls.last_reached_at

    @property
    def last_error(self) -> str | None:
        """Why the latest call failed to reach Recurly or was not let in; None when it did."""
        return self._calls.last_error

    @property
    def attempt_max(self) -> timedelta:
        """How long one call may take at most, from asking for its turn to its last byte."""
        return self._calls.attempt_max

    def far_now(self) -> datetime:
        """The time by Recurly's own clock, to a second or two."""
        return self._calls.far_now()

    def take_doubt(self) -> str | None:
        """Which same-key retry succeeded without being marked as a replay since this was last asked.

        A suspicion, no proof: it also happens when the first attempt never arrived.
        """
        return self._calls.take_doubt()

    async def close(self, *, deadline: timedelta) -> None:
        """Finish calls under way until the deadline; those after it stay unknown."""
        await self._calls.close(deadline=deadline)

    # Reads.

    async def reach(self) -> None:
        """Ask for something cheap, to see that Recurly answers and lets us in."""
        await self._calls.read("reach Recurly", lambda c: c.page("/measured_units", {"limit": 1}))

    async def find_account(self, code: str) -> Account | None:
        """The account with this code."""
        return await self._calls.find(
            f"find account {code}", lambda c: reading.account(c.get_account(f"code-{code}"))
        )

    async def find_plan(self, code: str) -> BilledPlan | None:
        """The plan with this code, an inactive one too."""
        return await self._calls.find(f"find plan {code}", lambda c: reading.plan(c.get_plan(f"code-{code}")))

    async def list_plans(self) -> tuple[BilledPlan, ...]:
        """Every active plan of ours; one that cannot be read is left out."""
        read = await self._calls.pages(
            "list plans",
            "/plans",
            {"state": "active", "sort": "created_at", "order": "asc"},
            lambda item: reading.plan_of(item, PLAN_CODES),
        )
        return tuple(one for one in read if one is not None)

    async def list_add_ons(self, plan_code: str, currency: str) -> tuple[BilledAddOn, ...]:
        """A plan's add-ons, priced in this currency; raises NotFound when there is no such plan."""
        return await self._calls.pages(
            f"list add-ons of plan {plan_code}",
            f"/plans/{_code(plan_code)}/add_ons",
            {"sort": "created_at", "order": "asc"},
            lambda item: reading.add_on(item, currency),
        )

    async def find_add_on(self, plan_code: str, code: str, currency: str) -> BilledAddOn | None:
        """A plan's add-on with this code, an inactive one too, priced in this currency."""
        return await self._calls.find(
            f"find add-on {code} of plan {plan_code}",
            lambda c: reading.add_on(c.get_plan_add_on(f"code-{plan_code}", f"code-{code}"), currency),
        )

    async def find_measured_unit(self, name: str) -> str | None:
        """The id of the measured unit with this name."""
        return await self._calls.find(
            f"find measured unit {name}",
            lambda c: reading.measured_unit(c.get_measured_unit(f"name-{name}")),
        )

    async def list_subscriptions(self, account_code: str) -> tuple[BilledSubscription, ...]:
        """An account's subscriptions in every state; raises NotFound when there is no such account."""
        return await self._calls.pages(
            f"list subscriptions of account {account_code}",
            f"/accounts/{_code(account_code)}/subscriptions",
            {"sort": "created_at", "order": "asc"},
            reading.subscription,
        )

    async def list_live_subscriptions(self) -> tuple[BilledSubscription, ...]:
        """Every subscription of the site that bills, now or later; paused ones may be missing."""
        read = await self._calls.pages(
            "list live subscriptions",
            "/subscriptions",
            {"state": "live", "sort": "created_at", "order": "asc"},
            reading.subscription_if_readable,  # one of somebody else's may not hide all of ours
        )
        return tuple(one for one in read if one is not None)

    async def get_subscription(self, uuid: str) -> BilledSubscription:
        """The subscription, or NotFound."""
        return await self._calls.read(
            f"get subscription {uuid}", lambda c: reading.subscription(c.get_subscription(f"uuid-{uuid}"))
        )

    async def list_billed_edges(self, uuid: str, *, since: datetime) -> frozenset[datetime]:
        """Where the cycles begin and end that a subscription was invoiced for since a moment."""
        dates = await self._lines(uuid, since, reading.line_dates)
        return frozenset(date for each in dates for date in each)

    async def list_charged_starts(self, uuid: str, *, since: datetime) -> frozenset[datetime]:
        """Where the cycles begin whose base price a subscription was charged since a moment, usage apart."""
        starts = await self._lines(uuid, since, reading.charged_start)
        return frozenset(start for start in starts if start is not None)

    async def _lines(self, uuid: str, since: datetime, read: Callable[[object], T]) -> tuple[T, ...]:
        """What the line items say that were made since a moment; raises NotFound for no subscription."""
        return await self._calls.pages(
            f"list line items of subscription {uuid}",
            f"/subscriptions/uuid-{quote(uuid, safe='')}/line_items",
            {"sort": "created_at", "order": "asc", "begin_time": bodies.instant(since)},
            read,
        )

    async def list_usage(
        self,
        subscription_uuid: str,
        add_on_code: str,
        *,
        begin: datetime,
        end: datetime,
        status: Literal["all", "unbilled"] = "all",
    ) -> tuple[BilledUsage, ...]:
        """Usage whose time lies in [begin, end], billed or not unless `status` says so, oldest first.

        Whether Recurly counts `end` itself in is not certain: ask for a second more and compare.
        """
        return await self._calls.pages(
            f"list usage of add-on {add_on_code} on subscription {subscription_uuid}",
            f"/subscriptions/uuid-{quote(subscription_uuid, safe='')}/add_ons/{_code(add_on_code)}/usage",
            {
                "billing_status": status,  # Recurly's default hides what was billed, which then looks missing
                "sort": "usage_timestamp",
                "order": "asc",
                "begin_time": bodies.instant(begin),
                "end_time": bodies.instant(end),
            },
            reading.usage,
        )

    async def find_usage(self, usage_id: str) -> BilledUsage | None:
        """The usage record with this id, whatever was changed of it."""
        return await self._calls.find(
            f"find usage {usage_id}", lambda c: reading.usage(c.get_usage(usage_id))
        )

    async def list_recorded_usage(
        self, subscription_uuid: str, add_on_code: str, *, since: datetime
    ) -> tuple[BilledUsage, ...]:
        """Usage that was recorded (by its own `recording_timestamp`) since a moment, billed or not."""
        return await self._calls.pages(
            f"list usage of add-on {add_on_code} on subscription {subscription_uuid} by when it was recorded",
            f"/subscriptions/uuid-{quote(subscription_uuid, safe='')}/add_ons/{_code(add_on_code)}/usage",
            {
                "billing_status": "all",
                "sort": "recorded_timestamp",  # so spelt, while the field is `recording_timestamp`
                "order": "asc",
                "begin_time": bodies.instant(since),
            },
            reading.usage,
        )

    # Writes.

    async def create_measured_unit(self, spec: MeasuredUnitSpec, *, key: str, retried: bool = False) -> str:
        """Create a measured unit; its id."""
        body = bodies.measured_unit(spec)
        return await self._calls.write(
            f"create measured unit {spec.name}",
            lambda c: reading.identity(c.create_measured_unit(body, headers=_headers(key)), "measured_unit"),
            retried,
        )

    async def create_plan(self, spec: PlanSpec, *, key: str, retried: bool = False) -> str:
        """Create a plan with its add-ons, whose measured units exist already; its id."""
        body = bodies.plan(spec)
        return await self._calls.write(
            f"create plan {spec.code}",
            lambda c: reading.identity(c.create_plan(body, headers=_headers(key)), "plan"),
            retried,
        )

    async def create_add_on(
        self, plan_code: str, spec: AddOnSpec, currency: str, *, key: str, retried: bool = False
    ) -> str:
        """Create an add-on on an existing plan; its id."""
        body = bodies.add_on(spec, currency)
        return await self._calls.write(
            f"create add-on {spec.code} on plan {plan_code}",
            lambda c: reading.identity(
                c.create_plan_add_on(f"code-{plan_code}", body, headers=_headers(key)), "add_on"
            ),
            retried,
        )

    async def rename_plan(self, code: str, name: str, *, key: str, retried: bool = False) -> None:
        """Give a plan another name, on subscriptions that exist too; raises NotFound when there is none."""
        body = bodies.naming(name)
        await self._calls.write(
            f"rename plan {code}",
            lambda c: reading.identity(c.update_plan(f"code-{code}", body, headers=_headers(key)), "plan"),
            retried,
        )

    async def rename_add_on(
        self, plan_code: str, add_on_code: str, name: str, *, key: str, retried: bool = False
    ) -> None:
        """Give a plan's add-on another name, on subscriptions that exist too; raises NotFound for none."""
        body = bodies.naming(name)
        await self._calls.write(
            f"rename add-on {add_on_code} of plan {plan_code}",
            lambda c: reading.identity(
                c.update_plan_add_on(f"code-{plan_code}", f"code-{add_on_code}", body, headers=_headers(key)),
                "add_on",
            ),
            retried,
        )

    async def remove_plan(self, code: str, *, key: str, retried: bool = False) -> None:
        """Remove a plan; raises NotFound when there is none."""
        await self._calls.write(
            f"remove plan {code}",
            lambda c: reading.identity(c.remove_plan(f"code-{code}", headers=_headers(key)), "plan"),
            retried,
        )

    async def create_account(
        self,
        code: str,
        *,
        email: str | None = None,
        first_name: str | None = None,
        last_name: str | None = None,
        company: str | None = None,
        key: str,
        retried: bool = False,
    ) -> str:
        """Create an account; its id."""
        body = bodies.account(code, email=email, first_name=first_name, last_name=last_name, company=company)
        return await self._calls.write(
            f"create account {code}",
            lambda c: reading.identity(c.create_account(body, headers=_headers(key)), "account"),
            retried,
        )

    async def create_subscription(
        self, new: NewSubscription, *, key: str, retried: bool = False
    ) -> BilledSubscription:
        """Subscribe an account to a plan. Look for the marker first: Recurly would make a second one."""
        body = bodies.subscription(new)
        return await self._calls.write(
            f"create subscription of account {new.account_code} to plan {new.plan_code} for {new.marker}",
            lambda c: reading.subscription(c.create_subscription(body, headers=_headers(key))),
            retried,
        )

    async def add_to_subscription(
        self, uuid: str, add_on_codes: Sequence[str], *, key: str, retried: bool = False
    ) -> None:
        """Attach add-ons of its plan to a subscription from now on; those that it has stay as they are.

        The change takes the place of the whole set, and an add-on missing from it would be removed and its
        usage invoiced at once (recurly.md 4.6): so the set is read first, and nothing is sent when it cannot
        be read or has them all. What somebody else attaches between the reading and the sending is lost.
        """
        operation = f"add {', '.join(add_on_codes)} to subscription {uuid}"

        def look(c: Client) -> tuple[dict[str, str | None], str | None]:
            found = c.get_subscription(f"uuid-{uuid}")
            return reading.attached(found), reading.optional(found, "collection_method")

        try:
            present, collection = await self._calls.read(f"{operation}: get it", look)
        except Misconfigured:
            raise
        except Retryable as error:  # of this request nothing left, whatever became of the reading
            raise NotDone(str(error), retry_after=error.retry_after) from error
        missing = [code for code in dict.fromkeys(add_on_codes) if code not in present.values()]
        if not missing:
            return
        body = bodies.attachment(present, missing, collection)
        await self._calls.write(
            operation,
            lambda c: reading.identity(
                c.create_subscription_change(f"uuid-{uuid}", body, headers=_headers(key)),
                "subscription_change",
            ),
            retried,
        )

    async def mark_subscription(self, uuid: str, marker: str, *, key: str, retried: bool = False) -> None:
        """Write a marker on a subscription, over whatever stands there."""
        body = bodies.marking(marker)
        await self._calls.write(
            f"mark subscription {uuid} as {marker}",
            lambda c: reading.identity(
                c.update_subscription(f"uuid-{uuid}", body, headers=_headers(key)), "subscription"
            ),
            retried,
        )

    async def cancel_subscription(self, uuid: str, *, key: str, retried: bool = False) -> BilledSubscription:
        """Let a subscription end with its billing cycle."""
        body = bodies.cancellation()
        return await self._calls.write(
            f"cancel subscription {uuid}",
            lambda c: reading.subscription(
                c.cancel_subscription(f"uuid-{uuid}", body=body, headers=_headers(key))
            ),
            retried,
        )

    async def terminate_subscription(
        self,
        uuid: str,
        *,
        refund: Literal["none", "full"],
        charge: bool = True,
        key: str,
        retried: bool = False,
    ) -> BilledSubscription:
        """End a subscription at once; `charge` bills the usage that is not billed yet."""
        params = {"refund": refund, "charge": charge}
        return await self._calls.write(
            f"terminate subscription {uuid}",
            lambda c: reading.subscription(
                c.terminate_subscription(f"uuid-{uuid}", params=params, headers=_headers(key))
            ),
            retried,
        )

    async def create_usage(self, new: NewUsage, *, key: str, retried: bool = False) -> str:
        """Record usage; its id."""
        body = bodies.usage(new)
        subscription, add_on = f"uuid-{new.subscription_uuid}", f"code-{new.add_on_code}"
        operation = (
            f"create usage {new.merchant_tag} of {new.units} units of add-on {new.add_on_code} "
            f"on subscription {new.subscription_uuid}"
        )
        answer = await self._calls.send(
            operation,
            lambda c: reading.usage(c.create_usage(subscription, add_on, body, headers=_headers(key))),
            retried,
        )
        made = cast(BilledUsage, answer.value)
        if (made.merchant_tag, made.units) != (new.merchant_tag, new.units):
            # A used key brings back what it was first used for. On a first answer it is our record all the
            # same, only kept differently: sending it again would bill twice, the audit will show it.
            log.error("recurly.usage_differs", operation=operation, tag=made.merchant_tag, units=made.units)
            if answer.replayed:
                raise Unknown(f"{operation}: Recurly returned the stored answer of another", replayed=True)
        return made.id

    async def update_usage(
        self,
        usage_id: str,
        *,
        units: int,
        usage_timestamp: datetime,
        merchant_tag: str,
        key: str,
        retried: bool = False,
    ) -> str:
        """Set what an unbilled usage record says, absolutely; its id. Raises Refused for a billed one."""
        body = bodies.usage_change(units, usage_timestamp, merchant_tag)
        await self._calls.write(
            f"update usage {usage_id} to {units} units under {merchant_tag}",
            lambda c: reading.usage(c.update_usage(usage_id, body, headers=_headers(key))),
            retried,
        )
        return usage_id

    async def remove_usage(self, usage_id: str, *, key: str, retried: bool = False) -> None:
        """Remove a usage record that is not billed yet; raises NotFound when there is none."""
        await self._calls.write(
            f"remove usage {usage_id}",
            lambda c: reading.nothing(c.remove_usage(usage_id, headers=_headers(key))),
            retried,
        )


def _headers(key: str) -> dict[str, str]:
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise ValueError(f"an idempotency key has 1 to {KEY_LENGTH_MAX} printable ASCII characters")
    return {"Idempotency-Key": key}


def _code(code: str) -> str:
    return f"code-{quote(code, safe='')}"
