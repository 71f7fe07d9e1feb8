"""Reading, listing and writing catalog resources: versions, pages, attributes, decisions."""

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from amplify_bench import CENTRAL, Bench, a_bench, sample
from structlog.testing import capture_logs

from billingd.adapters.amplify.catalog import Catalog
from billingd.domain.catalog import Marketplace, Subscription, Unreadable
from billingd.domain.errors import (
    Conflict,
    Misconfigured,
    NotFound,
    Permanent,
    Refused,
    Replaced,
    Retryable,
    Unknown,
)

V1 = f"{CENTRAL}/apis/catalog/v1"
ALPHA = f"{CENTRAL}/apis/catalog/v1alpha1"
MISSING = sample("not_found.json")


def rows(numbers: Sequence[int]) -> str:
    """Products that were created in the order of their numbers."""
    return json.dumps(
        [
            {
                "name": f"p{n}",
                "metadata": {
                    "id": f"id{n}",
                    "audit": {"createTimestamp": f"2026-03-02T{n // 60:02}:{n % 60:02}:00.000+0000"},
                },
            }
            for n in numbers
        ]
    )


def a_page(bench: Bench, numbers: Sequence[int], total: int | None) -> None:
    """Scripts one page of products."""
    headers = None if total is None else {"X-Axway-Total-Count": str(total)}
    bench.answer("GET", f"{V1}/products*", rows(numbers), headers=headers)


async def names(bench: Bench) -> list[str]:
    """What the listing makes of it."""
    return [product.name for product in await bench.amplify.list_products()]


def queries(bench: Bench) -> list[dict[str, list[str]]]:
    """The query of each GET."""
    return [parse_qs(urlsplit(url).query) for way, url, _ in bench.asked if way == "GET"]


# Versions


async def test_v1_is_asked_first_and_believed_once_it_has_answered() -> None:
    """A collection that has answered under v1 is never asked again, and its 404 means the resource."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/products/weather-pro", sample("product.json"))
        bench.answer("GET", f"{V1}/products/other", MISSING, status=404)
        assert await bench.amplify.find_product("weather-pro") is not None
        assert await bench.amplify.find_product("other") is None
        assert len(bench.sent("GET")) == 2


async def test_a_first_404_asks_the_collection_once() -> None:
    """Version there: the resource is missing. Asked once per collection, not per resource."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/subscriptions/a", MISSING, status=404, times=2)
        bench.answer("GET", f"{V1}/subscriptions?pageSize=1", b"[]")
        assert await bench.amplify.find_subscription("a") is None
        assert await bench.amplify.find_subscription("a") is None
        assert bench.paths().count("GET /apis/catalog/v1/subscriptions?pageSize=1") == 1


async def test_it_falls_back_to_v1alpha1_per_collection() -> None:
    """Plans only as v1alpha1, products as v1: the state of December 2025 (amplify.md 2.1)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/productplans*", MISSING, status=404, times=2)
        bench.answer("GET", f"{ALPHA}/productplans?pageSize=1", b"[]")
        bench.answer("GET", f"{ALPHA}/productplans/weather", sample("product_plan.json"), times=2)
        bench.answer("GET", f"{V1}/products/weather-pro", sample("product.json"))
        with capture_logs() as logs:
            assert await bench.amplify.find_product_plan("weather") is not None
            assert await bench.amplify.find_product_plan("weather") is not None
        assert await bench.amplify.find_product("weather-pro") is not None
        assert bench.paths() == [
            "GET /apis/catalog/v1/productplans/weather",
            "GET /apis/catalog/v1/productplans?pageSize=1",
            "GET /apis/catalog/v1alpha1/productplans?pageSize=1",
            "GET /apis/catalog/v1alpha1/productplans/weather",
            "GET /apis/catalog/v1alpha1/productplans/weather",
            "GET /apis/catalog/v1/products/weather-pro",
        ]
        assert [entry["event"] for entry in logs if entry["event"] != "amplify.call"] == [
            "amplify.version_fell_back"
        ]


async def test_a_listing_falls_back_too() -> None:
    """A listing is the collection itself."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/subscriptions?*", b"404: Not Found", status=404, times=2)
        bench.answer("GET", f"{ALPHA}/subscriptions?*", b"[]", headers={"X-Axway-Total-Count": "0"}, times=2)
        assert await bench.amplify.list_subscriptions() == ()


async def test_a_decision_falls_back_too() -> None:
    """404 means the write did nothing, so it may go to the other version."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("PUT", f"{V1}/subscriptions/s/approval", MISSING, status=404)
        bench.answer("GET", f"{V1}/subscriptions?*", MISSING, status=404)
        bench.answer("GET", f"{ALPHA}/subscriptions?*", b"[]")
        bench.answer("PUT", f"{ALPHA}/subscriptions/s/approval", sample("subscription_pending.json"))
        await bench.amplify.decide("s", "rejected", 'no "account"')
        sent = json.loads(bench.sent("PUT")[1]["data"])
        assert sent == {"approval": {"state": "rejected", "reason": 'no "account"'}}


async def test_the_configured_version_comes_first() -> None:
    """api_version = "v1alpha1" asks v1 only when v1alpha1 is gone."""
    async with a_bench("v1alpha1") as bench:
        bench.token()
        bench.answer("GET", f"{ALPHA}/products*", MISSING, status=404, times=2)
        bench.answer("GET", f"{V1}/products?*", b"[]", times=2)
        await bench.amplify.reach()


async def test_a_wrong_address_deletes_nothing() -> None:
    """With no version of a collection there, nothing is "not found": the address is wrong."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{CENTRAL}/*", MISSING, status=404, times=3)
        with pytest.raises(Misconfigured, match=r"amplify\.central_url"):
            await bench.amplify.find_subscription("s")


async def test_a_gateways_404_is_not_amplifys() -> None:
    """Amplify says "not found" in JSON; a page of HTML is somebody else's."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/subscriptions/s", b"<h1>no route</h1>", status=404)
        bench.answer("GET", f"{V1}/subscriptions?*", b"[]")
        with pytest.raises(Retryable, match="before Amplify"):
            await bench.amplify.find_subscription("s")


async def test_a_resource_must_be_one() -> None:
    """A list in the place of a resource is nothing to guess about; a name cannot ask for one."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/products/p", b"[]")
        with pytest.raises(Permanent, match="not a resource"):
            await bench.amplify.find_product("p")
        with pytest.raises(Permanent, match="cannot be the name"):
            await bench.amplify.find_product("")


# Listings


async def test_pages_are_read_to_the_stated_total() -> None:
    """Also when Amplify gives smaller pages than asked for (open question 17)."""
    async with a_bench() as bench:
        bench.token()
        for part in (range(50), range(50, 100), range(100, 120)):
            a_page(bench, part, 120)
        assert await names(bench) == [f"p{n}" for n in range(120)]
        assert [query["page"] for query in queries(bench)] == [["1"], ["2"], ["3"]]
        assert queries(bench)[0]["pageSize"] == ["100"]
        assert queries(bench)[0]["sort"] == ["metadata.audit.createTimestamp,ASC"]


async def test_without_a_total_a_short_page_ends() -> None:
    """A gateway may have eaten the header."""
    async with a_bench() as bench:
        bench.token()
        a_page(bench, range(100), None)
        a_page(bench, range(100, 103), None)
        assert len(await names(bench)) == 103


async def test_pages_that_never_change_end() -> None:
    """An Amplify that ignores `page` does not keep us for ever."""
    async with a_bench() as bench:
        bench.token()
        a_page(bench, range(100), None)
        a_page(bench, range(100), None)
        assert len(await names(bench)) == 100


async def test_rows_are_taken_once_and_in_order() -> None:
    """A row that moved to the next page is one row; order is by creation whatever comes."""
    async with a_bench() as bench:
        bench.token()
        a_page(bench, [2, 0, 1], 5)
        a_page(bench, [1, 4, 3], 5)
        assert await names(bench) == ["p0", "p1", "p2", "p3", "p4"]


async def test_a_list_that_shrank_is_read_again() -> None:
    """A deletion while reading moves rows up over the page's edge: p3 was never shown (amplify.md 2.3)."""
    async with a_bench() as bench:
        bench.token()
        a_page(bench, [0, 1, 2], 6)
        a_page(bench, [4, 5], 5)
        a_page(bench, [1, 2, 3], 5)
        a_page(bench, [4, 5], 5)
        assert await names(bench) == ["p1", "p2", "p3", "p4", "p5"]


async def test_a_total_that_counts_the_invisible_is_accepted_when_two_readings_agree() -> None:
    """Should the total count what we may not see, a listing must not fail for ever."""
    async with a_bench() as bench:
        bench.token()
        for _ in range(2):
            a_page(bench, [0, 1], 5)
            a_page(bench, [], 5)
        assert await names(bench) == ["p0", "p1"]


async def test_a_list_that_keeps_changing_is_an_error() -> None:
    """Never part of a listing: the flow would take what is missing for deleted."""
    async with a_bench() as bench:
        bench.token()
        for first in range(4):
            a_page(bench, [first], 3)
            a_page(bench, [], 3)
        with pytest.raises(Retryable, match="kept changing"):
            await names(bench)


@pytest.mark.parametrize("body", [b"{}", b'[{"name": "p"}]', b"[1]"])
async def test_a_list_must_be_one(body: bytes) -> None:
    """An object, a row without an id, a row that is no object."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", f"{V1}/products*", body, headers={"X-Axway-Total-Count": "1"})
        with pytest.raises(Permanent):
            await names(bench)


async def test_filters() -> None:
    """Literal comparisons only, joined by "and" (amplify.md 2.4)."""
    async with a_bench() as bench:
        bench.token()
        for plural in ("products", "productplans", "subscriptions"):
            bench.answer("GET", f"{V1}/{plural}*", b"[]", headers={"X-Axway-Total-Count": "0"})
        await bench.amplify.list_products("recurly")
        await bench.amplify.list_product_plans("8ac9bb00")
        await bench.amplify.list_subscriptions(plan_id="8ac9aa00", approval="pending")
        assert [query["query"] for query in queries(bench)] == [
            ["attributes.billingSystem===recurly"],
            ["metadata.references.id===8ac9bb00"],
            ["metadata.references.id===8ac9aa00;approval.state===pending"],
        ]
        assert re.search(r"query=[\w.%-]+&", str(bench.asked[1][1]))  # nothing but escapes


async def test_a_survey_reads_each_row_on_its_own() -> None:
    """What cannot be understood is there all the same, with what is wrong; a listing fails for it."""
    async with a_bench() as bench:
        bench.token()
        good = sample("subscription_pending.json").decode()
        bad = '{"name": "odd", "metadata": {"id": "id1"}, "spec": {"plan": {"name": "p"}}}'
        for _ in range(2):
            bench.answer("GET", f"{V1}/subscriptions*", f"[{good}, {bad}]")
        first, second = await bench.amplify.survey_subscriptions()
        assert isinstance(first, Unreadable)
        assert first == Unreadable("id1", "Amplify's Subscription odd: spec.product is missing")
        assert isinstance(second, Subscription)
        with pytest.raises(Permanent, match="odd"):
            await bench.amplify.list_subscriptions()
        bench.answer("GET", f"{V1}/productplans*", f"[{sample('product_plan.json').decode()}, {bad}]")
        assert len(await bench.amplify.survey_product_plans()) == 2


async def test_marketplaces() -> None:
    """Only `billing.payment.type` tells whether one bills by itself (amplify.md 3.7)."""
    async with a_bench() as bench:
        bench.token()
        body = [
            {
                "name": "m1",
                "title": "One",
                "metadata": {"id": "1"},
                "billing": {"payment": {"type": "stripe"}},
            },
            {"name": "m2", "metadata": {"id": "2"}, "billing": {}},
            {"name": "m3", "metadata": {"id": "3"}},
        ]
        bench.answer("GET", f"{V1}/marketplaces*", json.dumps(body))
        assert await bench.amplify.list_marketplaces() == (
            Marketplace("m1", "One", "stripe"),
            Marketplace("m2", "m2", None),
            Marketplace("m3", "m3", None),
        )


@pytest.mark.parametrize("status", [403, 404])
async def test_marketplaces_that_may_not_be_seen(status: int) -> None:
    """No list at all, and no empty one."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", "*/marketplaces*", MISSING, status=status, times=4)
        with pytest.raises((Misconfigured, NotFound)):
            await bench.amplify.list_marketplaces()


async def test_quotas_come_oldest_first() -> None:
    """Of the plan, by creation; a quota a plan does not price is no error."""
    newer = sample("quota.json").replace(b"10:16:00", b"10:17:00").replace(b"8ac9cc00", b"8ac9cc01")
    async with a_bench() as bench:
        bench.token()
        body = b"[" + newer.replace(b"graduated", b"auction") + b"," + sample("quota.json") + b"]"
        bench.answer("GET", f"{V1}/productplans/w%252Fx/quotas*", body, headers={"X-Axway-Total-Count": "2"})
        bench.answer("GET", f"{V1}/productplans/w%2Fx/quotas*", body, headers={"X-Axway-Total-Count": "2"})
        quotas = await bench.amplify.list_quotas("w/x")
        assert [quota.id[:8] for quota in quotas] == ["8ac9cc00", "8ac9cc01"]


# Attributes

PLAN = f"{V1}/productplans/p"
WANTED = {"billingSystem": "recurly", "recurly/Plan~Code": "amplify-plan-1"}


def a_plan(attributes: dict[str, Any] | None, version: str = "3") -> str:
    """The sample plan with other attributes."""
    raw = json.loads(sample("product_plan.json"))
    raw["metadata"]["resourceVersion"] = version
    raw["attributes"] = attributes
    return json.dumps(raw)


async def test_attributes_that_are_there_are_not_written() -> None:
    """A write would come back as an event (amplify.md 2.6)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({**WANTED, "more": "x"}))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "3"
        assert len(bench.paths()) == 1


async def test_one_that_was_made_anew_under_its_name_is_not_written_to() -> None:
    """Neither attributes nor a decision: another id means another resource."""
    mine = json.loads(a_plan({}))["metadata"]["id"]
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        bench.answer("PATCH", PLAN, a_plan(WANTED, "4"))
        with pytest.raises(Replaced, match=f"another one by now: {mine}, where old was meant"):
            await bench.amplify.set_attributes("productplans", "p", WANTED, resource_id="old")
        assert await bench.amplify.set_attributes("productplans", "p", WANTED, resource_id=mine) == "4"
        bench.answer("GET", f"{V1}/subscriptions/s", sample("subscription_pending.json"), times=2)
        bench.answer("PUT", f"{V1}/subscriptions/s/approval", sample("subscription_pending.json"))
        with pytest.raises(Replaced):
            await bench.amplify.decide("s", "approved", "", resource_id="old")
        theirs = json.loads(sample("subscription_pending.json"))["metadata"]["id"]
        await bench.amplify.decide("s", "approved", "", resource_id=theirs)
        assert (len(bench.sent("PATCH")), len(bench.sent("PUT"))) == (1, 1)


async def test_one_that_is_made_anew_between_patch_and_put_is_not_written_to() -> None:
    async with a_bench() as bench:
        bench.token()
        mine = json.loads(a_plan({}))["metadata"]["id"]
        bench.answer("GET", PLAN, a_plan({}))
        bench.answer("PATCH", PLAN, "{}", status=405)
        bench.answer("GET", PLAN, a_plan({}).replace(mine, "another"))
        with pytest.raises(Replaced):
            await bench.amplify.set_attributes("productplans", "p", WANTED, resource_id=mine)
        assert bench.sent("PUT") == []


async def test_only_what_differs_is_patched() -> None:
    """JSON patch with Amplify's own tree builder; keys escaped per RFC 6901."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({"billingSystem": "recurly"}))
        bench.answer("PATCH", PLAN, a_plan(WANTED, "4"))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "4"
        (sent,) = bench.sent("PATCH")
        assert sent["headers"]["Content-Type"] == "application/json-patch+json"
        assert json.loads(sent["data"]) == [
            {"op": "x-build-object-tree", "path": "/attributes"},
            {"op": "add", "path": "/attributes/recurly~1Plan~0Code", "value": "amplify-plan-1"},
        ]


@pytest.mark.parametrize("status", [400, 404, 405, 409, 415, 422, 428, 501])
async def test_a_refused_patch_becomes_a_put_of_the_whole(status: int) -> None:
    """With the resourceVersion that was read, everything else as it was, prices digit for digit."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan(None), times=1)
        bench.answer("PATCH", PLAN, b"", status=status)
        bench.answer("GET", PLAN, sample("product_plan.json"))
        bench.answer("PUT", PLAN, a_plan({**WANTED, "color": "blue"}, "5"))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "5"
        (sent,) = bench.sent("PUT")
        whole = json.loads(sent["data"])
        assert whole["attributes"] == {"color": "blue", **WANTED}
        assert whole["metadata"]["resourceVersion"] == "3"
        assert '"price": 10.10,' in sent["data"].decode()
        assert whole["spec"] == json.loads(sample("product_plan.json"))["spec"]


async def test_a_patch_without_effect_becomes_a_put() -> None:
    """200 is believed only when the answer carries the attributes (open question 16)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        bench.answer("PATCH", PLAN, a_plan({}))
        bench.answer("PUT", PLAN, a_plan(WANTED, "6"))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "6"


async def test_a_stale_put_reads_again() -> None:
    """428: somebody was faster; their change is kept, and ours added to it."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        bench.answer("PATCH", PLAN, b"", status=405)
        bench.answer("PUT", PLAN, b"{}", status=428)
        bench.answer("GET", PLAN, a_plan({"theirs": "1"}, "4"))
        bench.answer("PUT", PLAN, a_plan({"theirs": "1", **WANTED}, "5"))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "5"
        last = json.loads(bench.sent("PUT")[1]["data"])
        assert last["attributes"] == {"theirs": "1", **WANTED}
        assert last["metadata"]["resourceVersion"] == "4"


async def test_somebody_else_may_have_written_them() -> None:
    """After a 428 the attributes may be there already: no further write."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        bench.answer("PATCH", PLAN, b"", status=405)
        bench.answer("PUT", PLAN, b"{}", status=428)
        bench.answer("GET", PLAN, a_plan(WANTED, "9"))
        assert await bench.amplify.set_attributes("productplans", "p", WANTED) == "9"


async def test_a_put_is_retried_a_bounded_number_of_times() -> None:
    """A resource that changes under every attempt is a Conflict."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=5)
        bench.answer("PATCH", PLAN, b"", status=405)
        bench.answer("PUT", PLAN, b"{}", status=428, times=4)
        with pytest.raises(Conflict, match="under each"):
            await bench.amplify.set_attributes("productplans", "p", WANTED)
        assert len(bench.sent("PUT")) == 4


async def test_attributes_that_are_dropped_are_refused() -> None:
    """200 to the PUT and still not there."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        bench.answer("PATCH", PLAN, b"", status=405)
        bench.answer("PUT", PLAN, a_plan({}))
        with pytest.raises(Refused, match="did not keep"):
            await bench.amplify.set_attributes("productplans", "p", WANTED)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_lost_write_is_unknown(method: str) -> None:
    """The caller comes again, and the first read tells (style.md 2.8)."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}), times=2)
        if method == "PUT":
            bench.answer("PATCH", PLAN, b"", status=405)
        bench.answer(method, PLAN, exception=aiohttp.ServerDisconnectedError())
        with pytest.raises(Unknown):
            await bench.amplify.set_attributes("productplans", "p", WANTED)


async def test_a_resource_that_went_away() -> None:
    """Nothing to write to: NotFound, before the write and between read and write."""
    async with a_bench() as bench:
        bench.token()
        bench.answer("GET", PLAN, a_plan({}))
        bench.answer("PATCH", PLAN, MISSING, status=404)
        bench.answer("GET", PLAN, MISSING, status=404)
        with pytest.raises(NotFound):
            await bench.amplify.set_attributes("productplans", "p", WANTED)


def test_url_before_anything_is_known() -> None:
    """The configured version is the first guess."""
    catalog = Catalog(None, "http://c/", "v1alpha1")  # type: ignore[arg-type]
    assert catalog.url("subscriptions", "s") == "http://c/apis/catalog/v1alpha1/subscriptions/s"
