"""Usage records over HTTP: bounds, lists, pages, changes."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from recurly_side import START, RecurlySide, add_on, recurly_side, stamp, usage_path

from billingd.sandbox.recurly.metering import create_usage
from billingd.sandbox.recurly.model import Usage
from billingd.sandbox.recurly.paging import page, read_query

CREATED = stamp(START)


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan()
        yield side


async def filled(far: RecurlySide, count: int) -> dict[str, Any]:
    """A subscription with `count` records of 1, one a minute, tagged t0, t1, …"""
    made = await far.subscribe()
    for number in range(count):
        at = stamp(far.pass_(minutes=1))
        body = {"amount": 1, "merchant_tag": f"t{number}", "usage_timestamp": at}
        await far.call("POST", usage_path(made), body, status=201)
    return made


def tags(listed: dict[str, Any]) -> list[str]:
    return [each["merchant_tag"] for each in listed["data"]]


async def test_a_record_reads_back_with_the_subscriptions_price(far: RecurlySide) -> None:
    """`billed_at` null until billed; `recording_timestamp` defaults to the usage timestamp (4.7)."""
    made = await far.subscribe()
    far.pass_(hours=1)
    body = {"amount": 1250, "merchant_tag": "bd1:x", "usage_timestamp": "2026-01-31T12:30:00Z"}
    record = await far.call("POST", usage_path(made), body, status=201)
    assert record == await far.call("GET", f"/usage/{record['id']}")
    assert record["object"] == "usage"
    assert (record["amount"], record["merchant_tag"]) == (1250, "bd1:x")
    assert record["recording_timestamp"] == record["usage_timestamp"] == "2026-01-31T12:30:00Z"
    assert record["created_at"] == "2026-01-31T13:00:00Z"
    assert (record["unit_amount"], record["unit_amount_decimal"], record["billed_at"]) == (None, "0.1", None)
    far.site.renew(made["uuid"])
    assert (await far.call("GET", f"/usage/{record['id']}"))["billed_at"] == "2026-01-31T13:00:00Z"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "amount"),
        ({"amount": None}, 422, "amount"),
        ({"amount": "1"}, 400, "amount"),
        ({"amount": True}, 400, "amount"),
        ({"amount": 1_000_000_000}, 422, "amount"),
        ({"amount": -1_000_000_000}, 422, "amount"),
        ({"amount": 1, "usage_timestamp": "yesterday"}, 400, "usage_timestamp"),
        ({"amount": 1, "usage_timestamp": 1_700_000_000}, 400, "usage_timestamp"),
        ({"amount": 1, "usage_timestamp": stamp(START + timedelta(hours=1, seconds=1))}, 422, "usage_times"),
        ({"amount": 1, "usage_timestamp": stamp(START - timedelta(seconds=1))}, 422, "usage_timestamp"),
        ({"amount": 1, "merchant_tag": "x" * 256}, 422, "merchant_tag"),
        ({"amount": 1, "merchant_tag": 7}, 400, "merchant_tag"),
        ({"amount": 1, "quantity": 1}, 400, "quantity"),
    ],
)
async def test_a_wrong_record_is_refused_and_named(
    far: RecurlySide, body: dict[str, Any], status: int, param: str
) -> None:
    """Not in the future, not before the add-on was there, 9 digits, an amount (4.7, 5.3)."""
    made = await far.subscribe()
    far.pass_(hours=1)
    error = await far.refused("POST", usage_path(made), body, status=status)
    assert param in error["params"][0]["param"]
    assert not far.site.usages


async def test_the_bounds_themselves_are_in(far: RecurlySide) -> None:
    """The add-on's first second, and now."""
    made = await far.subscribe()
    now = far.pass_(hours=1)
    await far.use(made, 999_999_999, START)
    await far.use(made, -999_999_999, now)
    await far.use(made, 0)


@pytest.mark.parametrize(("amount", "kept"), [(1.9, 1), (-1.9, -1), (0.5, 0), (2.0, 2)])
async def test_digits_after_the_point_are_stripped(far: RecurlySide, amount: float, kept: int) -> None:
    """Without the Decimal Quantity feature (4.7)."""
    made = await far.subscribe()
    record = await far.call("POST", usage_path(made), {"amount": amount}, status=201)
    assert record["amount"] == kept


async def test_tags_are_not_unique(far: RecurlySide) -> None:
    """Posted twice is billed twice: only an idempotency key or a look-up helps (0.3)."""
    made = await far.subscribe()
    for _ in range(2):
        await far.call("POST", usage_path(made), {"amount": 5, "merchant_tag": "same"}, status=201)
    assert far.told(made)["add_ons"]["calls"]["tags"] == {"same": 2}
    assert far.told(made)["add_ons"]["calls"]["reported_units"] == 10


async def test_lists_show_only_what_is_unbilled_unless_asked(far: RecurlySide) -> None:
    """The default of `billing_status` hides what was billed a moment ago (0.4)."""
    made = await filled(far, 2)
    far.pass_(minutes=1)
    far.site.renew(made["uuid"])
    await far.use(made, 1)
    path = usage_path(made)
    assert tags(await far.call("GET", path)) == [None]
    assert tags(await far.call("GET", path + "?billing_status=billed")) == ["t1", "t0"]
    assert tags(await far.call("GET", path + "?billing_status=all")) == [None, "t1", "t0"]
    await far.refused("GET", path + "?billing_status=open", status=400)


async def test_windows_are_inclusive_and_follow_the_sort_field(far: RecurlySide) -> None:
    """On `usage_timestamp`, or on the field the parameter calls `recorded_timestamp` (4.7)."""
    made = await filled(far, 5)
    path = usage_path(made) + "?order=asc&begin_time=2026-01-31T12:02:00Z&end_time=2026-01-31T12:04:00Z"
    assert tags(await far.call("GET", path)) == ["t1", "t2", "t3"]
    body = {"amount": 1, "merchant_tag": "old", "usage_timestamp": "2026-01-31T12:03:00Z"}
    body["recording_timestamp"] = "2020-01-01T00:00:00Z"
    await far.call("POST", usage_path(made), body, status=201)
    assert tags(await far.call("GET", path)) == ["t1", "t2", "old", "t3"]
    assert tags(await far.call("GET", path + "&sort=recorded_timestamp")) == ["t1", "t2", "t3"]
    await far.refused("GET", path + "&sort=recording_timestamp", status=400)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_hold_every_record_once_while_more_come(far: RecurlySide, order: str) -> None:
    """`next` is a relative path with every parameter; HEAD counts all pages."""
    made = await filled(far, 45)
    next_, seen, sizes = f"{usage_path(made)}?limit=10&order={order}&billing_status=all", [], []
    async with await far.send("HEAD", next_) as answer:
        assert answer.headers["Recurly-Total-Records"] == "45"
        assert await answer.read() == b""
    while next_:
        page = await far.call("GET", next_)
        assert page["has_more"] is (page["next"] is not None)
        assert page["next"] is None or page["next"].startswith("/subscriptions/uuid-")
        seen += tags(page)
        sizes.append(len(page["data"]))
        next_ = page["next"]
        if len(sizes) == 2:
            await far.use(made, 1, START)
    assert sizes[:4] == [10, 10, 10, 10]
    assert [tag for tag in seen if tag] == [
        f"t{n}" for n in (range(45) if order == "asc" else range(44, -1, -1))
    ]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "order=up", "begin_time=x", "cursor=x", "tag=x", "ids=a&limit=1"],
)
async def test_wrong_list_parameters_are_refused(far: RecurlySide, query: str) -> None:
    """400 for values out of range, unknown names, and `ids` with any other (4.7)."""
    made = await far.subscribe()
    await far.refused("GET", f"{usage_path(made)}?{query}", status=400)


async def test_ids_choose_records_billed_or_not(far: RecurlySide) -> None:
    """Unknown ids are ignored; more than 200 are refused."""
    made = await filled(far, 3)
    other = await far.subscribe(account="bob")
    listed = (await far.call("GET", usage_path(made)))["data"]
    path = f"{usage_path(made)}?ids={listed[0]['id']},nothere,{listed[2]['id']}"
    far.site.renew(made["uuid"])
    assert tags(await far.call("GET", path)) == ["t2", "t0"]
    assert tags(await far.call("GET", f"{usage_path(other)}?ids={listed[0]['id']}")) == []
    many = ",".join(["x"] * 201)
    await far.refused("GET", f"{usage_path(made)}?ids={many}", status=400)


async def test_records_change_and_go_while_unbilled_only(far: RecurlySide) -> None:
    """Afterwards only `merchant_tag`; a second delete is a 404 (4.7)."""
    made = await filled(far, 2)
    first, second = (await far.call("GET", usage_path(made) + "?order=asc"))["data"]
    path = f"/usage/{first['id']}"
    changed = await far.call("PUT", path, {"amount": 9, "usage_timestamp": CREATED})
    assert (changed["amount"], changed["usage_timestamp"]) == (9, CREATED)
    assert changed["merchant_tag"] == "t0"
    await far.refused("PUT", path, {"usage_timestamp": "2036-01-01T00:00:00Z"})
    await far.call("DELETE", f"/usage/{second['id']}", status=204)
    await far.refused("DELETE", f"/usage/{second['id']}", status=404, type_="not_found")
    far.pass_(minutes=1)
    far.site.renew(made["uuid"])
    await far.refused("PUT", path, {"amount": 1})
    await far.refused("DELETE", path)
    assert (await far.call("PUT", path, {"merchant_tag": "new"}))["merchant_tag"] == "new"
    told = far.told(made)["add_ons"]["calls"]
    assert (told["reported_units"], told["billed_units"], told["tags"]) == (9, 9, {"new": 1})


@pytest.mark.parametrize("tier_type", ["volume", "stairstep"])
async def test_records_of_volume_and_stairstep_are_not_edited(far: RecurlySide, tier_type: str) -> None:
    """Reference and training page differ; the stricter one holds here, removal stays possible (11.16)."""
    await far.make_plan(code=tier_type, add_ons=[add_on(tier_type=tier_type)])
    made = await far.subscribe(plan_code=tier_type)
    record = await far.use(made, 1)
    await far.refused("PUT", f"/usage/{record['id']}", {"amount": 2})
    await far.call("PUT", f"/usage/{record['id']}", {"merchant_tag": "x"})
    await far.call("DELETE", f"/usage/{record['id']}", status=204)


async def test_no_usage_without_the_subscription_or_add_on(far: RecurlySide) -> None:
    """404 in Rails' words."""
    made = await far.subscribe()
    for path in (usage_path({"uuid": "0" * 32}), usage_path(made, "other")):
        for method, body in (("POST", {"amount": 1}), ("GET", None)):
            await far.refused(method, path, body, status=404, type_="not_found")


class Counted(list[tuple[datetime, int, Usage]]):
    """Counts how often an entry is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


async def test_many_records_stay_cheap(far: RecurlySide) -> None:
    """A page and a narrow window out of 20,000 records look at a few of them only."""
    made = await far.subscribe()
    subscription = far.site.subscription_by_uuid[made["uuid"]]
    (attached,) = subscription.add_ons.values()
    far.pass_(days=20)
    for number in range(20_000):
        at = stamp(START + timedelta(seconds=number * 60 % 1_000_003))
        create_usage(far.site, subscription, attached, {"amount": 1, "usage_timestamp": at})
    window = {
        "begin_time": stamp(START + timedelta(days=3)),
        "end_time": stamp(START + timedelta(days=3, minutes=5)),
    }
    for given in ({}, {"cursor": f"9999:{int(START.timestamp()) + 500_000}"}, window):
        entries = Counted(attached.book.all_by_usage)
        found = page(read_query("/x", given, sorts=["usage_timestamp"]), entries)
        assert found.items
        assert entries.looks < 100
