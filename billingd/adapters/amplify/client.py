"""Amplify as the flows see it: domain values in, domain values out."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar

import aiohttp
import structlog

from billingd.adapters.amplify import resources
from billingd.adapters.amplify.answers import Call, json_of
from billingd.adapters.amplify.catalog import ApiVersion, Catalog
from billingd.adapters.amplify.encoding import Json, encode, equals, pointer, query_string, segment
from billingd.adapters.amplify.feed import Feed
from billingd.adapters.amplify.http import Http, Observe
from billingd.adapters.amplify.management import Management
from billingd.adapters.amplify.probes import Probes
from billingd.adapters.amplify.reader import dig
from billingd.domain.catalog import (
    Marketplace,
    Person,
    Product,
    ProductPlan,
    Quota,
    Subscription,
    Unreadable,
)
from billingd.domain.errors import Conflict, Misconfigured, NotFound, Permanent, Refused, Replaced
from billingd.domain.feed import PAGE_SIZE, FeedPage

log = structlog.get_logger(__name__)

PUTS_MAX: Final = 4
PATCH_REFUSED: Final = frozenset({*range(400, 500), 501} - {401, 403, 408, 429})
"""Answers that say "not by PATCH" (open question 16): the whole resource is PUT instead."""

Linked = Literal["productplans", "subscriptions"]
T = TypeVar("T")


class Amplify:
    """One Amplify organization, as the service account of `client_id` sees it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        central_url: str,
        login_url: str,
        platform_url: str,
        api_version: ApiVersion,
        organization_id: str,
        client_id: str,
        client_secret: str,
        timeout: timedelta,
        clock: Callable[[], datetime],
        observe: Observe | None = None,
    ) -> None:
        self._http = Http(
            session,
            login_url=login_url,
            organization_id=organization_id,
            client_id=client_id,
            client_secret=client_secret,
            timeout=timeout,
            clock=clock,
            observe=observe,
        )
        self._catalog = Catalog(self._http, central_url, api_version)
        self.management = Management(self._http, central_url, api_version)
        self._feed = Feed(self._http, central_url, api_version)
        self.probes = Probes(self._http, self._catalog, self.management, platform_url)
        self._traceability = f"{central_url.rstrip('/')}/api/traceability/v1/traceability"
        self._platform = f"{platform_url.rstrip('/')}/api/v1"
        self._hidden_told = False

    @property
    def last_reached_at(self) -> datetime | None:
        """When Amplify last gave an answer of its own; for readiness."""
        return self._http.last_reached_at

    @property
    def last_error(self) -> str | None:
        """Why the latest call did not reach Amplify; None after one that did."""
        return self._http.last_error

    async def reach(self) -> None:
        """A cheap authenticated read, to see whether Amplify is there and takes us."""
        reply, call = await self._catalog.ask(
            "products", lambda base: Call("GET", f"{base}?pageSize=1", "a test read of products")
        )
        json_of(call, reply)

    async def find_product(self, name: str) -> Product | None:
        """The product of that name, or None when there is none."""
        raw = await self._catalog.find("products", name)
        return None if raw is None else resources.product(raw)

    async def find_product_plan(self, name: str) -> ProductPlan | None:
        """The product plan of that name, or None when there is none."""
        raw = await self._catalog.find("productplans", name)
        return None if raw is None else resources.product_plan(raw)

    async def find_subscription(self, name: str) -> Subscription | None:
        """The subscription of that name, or None when there is none."""
        raw = await self._catalog.find("subscriptions", name)
        return None if raw is None else resources.subscription(raw)

    async def list_quotas(self, plan_name: str) -> tuple[Quota, ...]:
        """All quotas of a product plan, oldest first; NotFound when there is no such plan."""
        # Through the plan, so the plan's version counts: quotas had v1 before plans did (amplify.md 2.1).
        rows = await self._catalog.rows("productplans", f"/{segment(plan_name)}/quotas", "Quota")
        return tuple(map(resources.quota, rows))

    async def list_products(self, billing_system: str | None = None) -> tuple[Product, ...]:
        """All products, or those whose attribute `billingSystem` is that."""
        where = [] if billing_system is None else [equals("attributes.billingSystem", billing_system)]
        return tuple(map(resources.product, await self._catalog.rows("products", "", "Product", where)))

    async def list_product_plans(self, product_id: str | None = None) -> tuple[ProductPlan, ...]:
        """All product plans, or those of one product."""
        where = [] if product_id is None else [equals("metadata.references.id", product_id)]
        return tuple(
            map(resources.product_plan, await self._catalog.rows("productplans", "", "ProductPlan", where))
        )

    async def list_subscriptions(
        self,
        *,
        plan_id: str | None = None,
        product_id: str | None = None,
        approval: str | None = None,
        state: str | None = None,
    ) -> tuple[Subscription, ...]:
        """All subscriptions, or those of a plan or product, of an approval state, of a state."""
        asked = [
            ("metadata.references.id", plan_id),
            ("metadata.references.id", product_id),
            ("approval.state", approval),
            ("state.name", state),
        ]
        where = [equals(field, value) for field, value in asked if value is not None]
        rows = await self._catalog.rows("subscriptions", "", "Subscription", where)
        return tuple(map(resources.subscription, rows))

    async def survey_product_plans(self) -> tuple[ProductPlan | Unreadable, ...]:
        """All product plans, each on its own: one that cannot be understood hides none of the others."""
        read = _if_readable("ProductPlan", resources.product_plan)
        return await self._catalog.read_rows("productplans", "", "ProductPlan", read)

    async def survey_subscriptions(self) -> tuple[Subscription | Unreadable, ...]:
        """All subscriptions, each on its own: one that cannot be understood hides none of the others."""
        read = _if_readable("Subscription", resources.subscription)
        return await self._catalog.read_rows("subscriptions", "", "Subscription", read)

    async def has_subscription(self, subscription_id: str) -> bool:
        """Whether there is a subscription with this id, whatever its name is."""
        where = [equals("metadata.id", subscription_id)]
        rows = await self._catalog.rows("subscriptions", "", "Subscription", where)
        return any(resources.identity("Subscription", row) == subscription_id for row in rows)

    async def has_product_plan(self, plan_id: str) -> bool:
        """Whether there is a product plan with this id, whatever its name is."""
        where = [equals("metadata.id", plan_id)]
        rows = await self._catalog.rows("productplans", "", "ProductPlan", where)
        return any(resources.identity("ProductPlan", row) == plan_id for row in rows)

    async def list_marketplaces(self) -> tuple[Marketplace, ...]:
        """All Marketplaces; Misconfigured or NotFound when we may not see them."""
        return await self._catalog.read_rows("marketplaces", "", "Marketplace", resources.marketplace)

    async def find_watch_topic(self, name: str) -> str | None:
        """The id of the watch topic of that name, or None when there is none."""
        raw = await self.management.find("WatchTopic", name, None)
        return None if raw is None else resources.identity("WatchTopic", raw)

    async def newest_position(self, topic: str) -> int | None:
        """The highest number in a watch topic's feed, or None when it keeps no event; NotFound."""
        return next(iter(await self._feed.newest(topic, 1)), None)

    async def recent_positions(self, topic: str) -> tuple[int, ...]:
        """The newest numbers of the feed, the highest first; fewer than a page: there are no others."""
        return await self._feed.newest(topic, PAGE_SIZE)

    async def read_feed(self, topic: str, after: int) -> FeedPage:
        """The first page of the feed behind a number (amplify.md 4.5).

        Raises Gone when what is behind it is no longer kept, NotFound when there is no such topic.
        """
        return await self._feed.read(topic, after)

    async def set_attributes(
        self, kind: Linked, name: str, attributes: Mapping[str, str], *, resource_id: str | None = None
    ) -> str | None:
        """Make a resource carry these attributes too; its resourceVersion then (amplify.md 2.6).

        1. Read it: nothing is written when it carries them already, for every write comes back as an event.
        2. PATCH only what differs. 3. Where PATCH is refused, or taken without effect: read, PUT the whole
        with the resourceVersion that was read, and begin again when that is stale.

        `resource_id` is which one is meant: Replaced, and nothing is written, when the name is another's.
        """
        raw = await self._read(kind, name, resource_id)
        if _carries(raw, attributes):
            return resources.resource_version(raw)
        patched = await self._patch(kind, name, raw, attributes)
        if _carries(patched, attributes):
            return resources.resource_version(patched)
        for _ in range(PUTS_MAX):
            raw = await self._read(kind, name, resource_id)
            if _carries(raw, attributes):
                return resources.resource_version(raw)
            whole = {**raw, "attributes": {**resources.attributes(raw), **attributes}}
            call = Call(
                "PUT",
                self._catalog.url(kind, name),
                f"the attributes of {kind}/{name}",
                encode(whole),
                writes=True,
            )
            try:
                put = await self._http.send_for_json(call)
            except Conflict:
                continue
            if not _carries(put, attributes):
                raise Refused(f"Amplify took the attributes of {kind}/{name} and did not keep them")
            return resources.resource_version(put)
        raise Conflict(
            f"{kind}/{name} changed at Amplify under each of {PUTS_MAX} attempts to write its attributes"
        )

    async def decide(
        self,
        subscription_name: str,
        state: Literal["approved", "rejected"],
        reason: str,
        *,
        resource_id: str | None = None,
    ) -> None:
        """Approve or reject a subscription (amplify.md 5). Whether it is to be decided is the flow's to know.

        `resource_id` is which one is meant: Replaced, and nothing is decided, when the name is another's.
        """
        if resource_id is not None:
            await self._read("subscriptions", subscription_name, resource_id)
        body = encode({"approval": {"state": state, "reason": reason}})
        path = f"/{segment(subscription_name)}/approval"
        what = f"making subscription {subscription_name} {state}"
        reply, call = await self._catalog.ask(
            "subscriptions", lambda base: Call("PUT", base + path, what, body, writes=True)
        )
        json_of(call, reply)

    async def find_person(self, user_id: str) -> Person | None:
        """A user of the platform, or None when there is none or we may not see them (amplify.md 7)."""
        call = Call(
            "GET",
            f"{self._platform}/user/{segment(user_id)}",
            "reading a user",
            handles=frozenset({403, 404}),
            platform=True,
        )
        reply = await self._http.send(call)
        if reply.status == 403:
            # Users of consumer organizations may be hidden from a provider's account (open question 18), and
            # mail to them is a courtesy: not an error, but worth one line.
            if not self._hidden_told:
                self._hidden_told = True
                log.warning(
                    "amplify.user_hidden", fix="give the service account the platform role Administrator"
                )
            return None
        answer = json_of(call, reply)
        if reply.status == 404:
            return None
        if not isinstance(user := dig(answer, "result"), dict):
            raise Permanent("Amplify's platform answered for a user: result is missing")
        return resources.person(user)

    async def ask_traceability(
        self, path: str, *, params: Sequence[tuple[str, str]] = (), body: Mapping[str, object] | None = None
    ) -> Json:
        """One Traceability read (amplify.md 6.2): POST with a body, else GET. Traffic sources call this."""
        call = Call(
            "GET" if body is None else "POST",
            f"{self._traceability}/{path}{query_string(params)}",
            f"reading traffic ({path})",
            None if body is None else encode(body),
        )
        try:
            return await self._http.send_for_json(call)
        except NotFound as error:  # an endpoint, not a resource: something for an operator to mend
            raise Misconfigured(f"{error}: check amplify.central_url and traffic.source") from None

    async def _read(self, kind: Linked, name: str, resource_id: str | None) -> dict[str, Json]:
        """The resource of that name. Raises Replaced when it is not the one that is meant."""
        raw = await self._catalog.read(kind, name)
        if resource_id is not None and (found := resources.identity(kind, raw)) != resource_id:
            raise Replaced(f"{kind}/{name} is another one by now: {found}, where {resource_id} was meant")
        return raw

    async def _patch(self, kind: Linked, name: str, raw: Json, attributes: Mapping[str, str]) -> Json:
        """The patched resource, or None when Amplify does not take the PATCH."""
        present = resources.attributes(raw)
        operations: list[dict[str, str]] = [{"op": "x-build-object-tree", "path": "/attributes"}]
        operations += [
            {"op": "add", "path": pointer("attributes", key), "value": value}
            for key, value in attributes.items()
            if present.get(key) != value
        ]
        call = Call(
            "PATCH",
            self._catalog.url(kind, name),
            f"the attributes of {kind}/{name}",
            encode(operations),
            "application/json-patch+json",
            writes=True,
            handles=PATCH_REFUSED,
        )
        reply = await self._http.send(call)
        return json_of(call, reply) if reply.ok else None


def _if_readable(kind: str, read: Callable[[Json], T]) -> Callable[[dict[str, Json]], T | Unreadable]:
    def reading(raw: dict[str, Json]) -> T | Unreadable:
        try:
            return read(raw)
        except Permanent as error:
            return Unreadable(resources.identity(kind, raw), str(error))

    return reading


def _carries(raw: Json, attributes: Mapping[str, str]) -> bool:
    present = resources.attributes(raw)
    return all(present.get(key) == value for key, value in attributes.items())
