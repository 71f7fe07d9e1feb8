"""What comes later than one thinks: lists after a write, and the bill run after the bill date."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from recurly_side import (
    START,
    Json,
    RecurlySide,
    add_on,
    lines,
    path_of,
    recurly_side,
    stamp,
    usage_path,
)

from billingd.sandbox.faults import Rule

ENDS = datetime.fromisoformat("2026-02-28T12:00:00+00:00")


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


async def subscribed(far: RecurlySide, **changes: Any) -> Json:
    await far.make_plan(add_ons=[add_on(**changes)])
    return await far.subscribe()


async def listed(far: RecurlySide, path: str) -> list[str]:
    found = await far.call("GET", path)
    return [each["id"] for each in found["data"]]


async def test_lists_lag_after_a_write(far: RecurlySide) -> None:
    """Lists, counts, `ids` and single usage records; other single reads show all at once."""
    made = await subscribed(far)
    far.pass_(minutes=5)
    far.site.configure(list_lag_seconds=20)
    record = await far.use(made, 3)
    every = f"{usage_path(made)}?billing_status=all"
    chosen = f"{usage_path(made)}?ids={record['id']}"
    single = f"/usage/{record['id']}"
    for seconds in (0, 19):
        far.pass_(seconds=seconds)
        assert (await listed(far, every), await listed(far, chosen)) == ([], [])
        async with far.client.head(every) as counted:
            assert counted.headers["Recurly-Total-Records"] == "0"
        await far.refused("GET", single, status=404, type_="not_found")
        assert (await far.call("GET", path_of(made)))["id"] == made["id"]
    far.pass_(seconds=1)
    assert await listed(far, every) == await listed(far, chosen) == [record["id"]]
    assert (await far.call("GET", single))["amount"] == 3


async def test_lists_of_subscriptions_lag_too(far: RecurlySide) -> None:
    """Of an account, and of the site."""
    await far.make_plan()
    far.site.configure(list_lag_seconds=2.5)
    made = await far.subscribe()
    paths = ("/subscriptions", "/accounts/code-ann/subscriptions", "/subscriptions?sort=updated_at")
    assert [await listed(far, path) for path in paths] == [[]] * 3
    await far.call("GET", "/accounts/code-ann")
    far.pass_(seconds=3)
    assert [await listed(far, path) for path in paths] == [[made["id"]]] * 3


async def test_removed_usage_is_shown_for_the_lag_still(far: RecurlySide) -> None:
    """In its place among the others, though it can be neither changed nor removed again."""
    made = await subscribed(far)
    kept = await far.use(made, 1, far.pass_(minutes=1))
    gone = await far.use(made, 2, far.pass_(minutes=1))
    last = await far.use(made, 3, far.pass_(minutes=1))
    far.pass_(minutes=1)
    far.site.configure(list_lag_seconds=10)
    await far.call("DELETE", f"/usage/{gone['id']}", status=204)
    for query in ("", "?billing_status=all", "?sort=recorded_timestamp"):
        found = await listed(far, usage_path(made) + query)
        assert found == [last["id"], gone["id"], kept["id"]]
    assert await listed(far, f"{usage_path(made)}?ids={gone['id']}") == [gone["id"]]
    assert (await far.call("GET", f"/usage/{gone['id']}"))["amount"] == 2
    await far.refused("DELETE", f"/usage/{gone['id']}", status=404, type_="not_found")
    assert far.told(made)["add_ons"]["calls"]["reported_units"] == 4
    far.pass_(seconds=10)
    assert await listed(far, usage_path(made)) == [last["id"], kept["id"]]
    await far.refused("GET", f"/usage/{gone['id']}", status=404, type_="not_found")


async def test_the_longer_lag_counts(far: RecurlySide) -> None:
    """The fault of the same name goes beside the setting."""
    made = await subscribed(far)
    await far.use(made, 1)
    far.site.configure(list_lag_seconds=5)
    far.faults.add(Rule("recurly", "GET", "**", "list_lag", times=None, args={"seconds": 60}))
    far.pass_(seconds=30)
    assert await listed(far, usage_path(made)) == []
    far.faults.clear()
    assert len(await listed(far, usage_path(made))) == 1


@pytest.mark.parametrize("name", ["list_lag_seconds", "bill_run_lag_seconds"])
@pytest.mark.parametrize("value", [-1, "5", None, True])
async def test_a_lag_is_a_number_of_seconds(far: RecurlySide, name: str, value: Any) -> None:
    """Anything else changes nothing."""
    with pytest.raises(ValueError, match=name):
        far.site.configure(production=True, **{name: value})
    assert far.site.settings.production is False


async def test_the_old_period_is_open_until_the_bill_run(far: RecurlySide) -> None:
    """It is shown and takes usage as unbilled; later usage is of the new one once that is opened."""
    made = await subscribed(far, tier_type="volume")
    far.site.configure(bill_run_lag_seconds=3600)
    await far.use(made, 5)
    far.clock.set(ENDS + timedelta(minutes=30))
    told = await far.call("GET", path_of(made))
    assert (told["state"], told["current_period_ends_at"]) == ("active", stamp(ENDS))
    first = (await listed(far, usage_path(made)))[0]
    late = await far.use(made, 7, ENDS - timedelta(minutes=1))
    later = await far.use(made, 11, ENDS)
    latest = await far.use(made, 13, ENDS + timedelta(minutes=20))
    assert await listed(far, usage_path(made)) == [latest["id"], later["id"], late["id"], first]
    far.clock.set(ENDS + timedelta(hours=1))
    told = await far.call("GET", path_of(made))
    assert (told["current_period_started_at"], told["current_period_ends_at"]) == (
        stamp(ENDS),
        "2026-03-31T12:00:00Z",
    )
    assert lines(far.invoices(made)[1], usage=True) == [("calls", 12, "12.00")]
    assert far.invoices(made)[1]["created_at"] == ENDS.isoformat()
    assert await listed(far, usage_path(made)) == [latest["id"], later["id"]]
    await far.use(made, 1, ENDS - timedelta(minutes=1), status=422)
    far.pass_(days=40)
    assert lines(far.invoices(made)[2], usage=True) == [("calls", 24, "24.00")]


async def test_a_bill_run_may_lag_by_whole_periods(far: RecurlySide) -> None:
    """Each record is billed in the period that its timestamp lies in."""
    await far.make_plan(interval_unit="days", interval_length=1)
    made = await far.subscribe()
    far.site.configure(bill_run_lag_seconds=3 * 86_400)
    far.pass_(days=2, hours=12)
    for days, units in ((0, 1), (1, 2), (2, 4)):
        await far.use(made, units, START + timedelta(days=days, hours=6))
    far.pass_(days=4)
    assert [lines(each, usage=True) for each in far.invoices(made)[1:4]] == [
        [("calls", 1, "0.10")],
        [("calls", 2, "0.20")],
        [("calls", 4, "0.40")],
    ]


@pytest.mark.parametrize(
    ("method", "action", "body"),
    [("PUT", "/cancel", {"timeframe": "bill_date"}), ("DELETE", "", None), ("PUT", "/pause", None)],
)
async def test_whoever_changes_a_subscription_gets_it_billed_first(
    far: RecurlySide, method: str, action: str, body: Any
) -> None:
    """No unit is lost between a period's end and a late bill run."""
    made = await subscribed(far)
    far.site.configure(bill_run_lag_seconds=3600)
    far.clock.set(ENDS + timedelta(minutes=30))
    await far.use(made, 5, ENDS - timedelta(minutes=1))
    await far.use(made, 7, ENDS + timedelta(minutes=1))
    if action == "/pause":
        body = {"remaining_pause_cycles": 1}
    await far.call(method, path_of(made, action), body)
    assert lines(far.invoices(made)[1], usage=True) == [("calls", 5, "0.50")]
    far.pass_(days=60)
    assert far.told(made)["add_ons"]["calls"]["billed_units"] == 12


@pytest.mark.parametrize("ending", ["cancel", "pause"])
async def test_usage_after_the_end_waits_for_no_period(far: RecurlySide, ending: str) -> None:
    """Nothing, or a pause, follows: what was used after the period's end is refused."""
    made = await subscribed(far)
    bodies = {"cancel": {"timeframe": "bill_date"}, "pause": {"remaining_pause_cycles": 1}}
    await far.call("PUT", path_of(made, f"/{ending}"), bodies[ending])
    far.site.configure(bill_run_lag_seconds=3600)
    far.clock.set(ENDS + timedelta(minutes=30))
    await far.use(made, 5, ENDS - timedelta(minutes=1))
    await far.use(made, 7, ENDS, status=422)
    far.pass_(hours=1)
    assert far.told(made)["state"] == {"cancel": "expired", "pause": "paused"}[ending]
    assert far.told(made)["add_ons"]["calls"]["billed_units"] == 5


async def test_a_late_trial_end_and_a_late_start(far: RecurlySide) -> None:
    """What is used after the trial's end is paid for, and what after a start is of the first period."""
    await far.make_plan(trial_unit="days", trial_length=7)
    far.site.configure(bill_run_lag_seconds=3600)
    tried = await far.subscribe()
    starts = START + timedelta(days=7)
    future = await far.subscribe(account="bob", starts_at=stamp(starts), trial_ends_at=stamp(START))
    far.clock.set(starts + timedelta(minutes=30))
    for made in (tried, future):
        await far.use(made, 2, starts - timedelta(minutes=1))
        await far.use(made, 3, starts + timedelta(minutes=1))
    assert (await far.call("GET", path_of(future)))["state"] == "future"
    far.pass_(hours=1)
    assert (await far.call("GET", path_of(future)))["state"] == "active"
    assert lines(far.invoices(future)[0], usage=True) == [("calls", 2, "0.20")]
    far.pass_(days=40)
    assert lines(far.invoices(tried)[2], usage=True) == [("calls", 3, "0.30")]
    assert lines(far.invoices(future)[1], usage=True) == [("calls", 3, "0.30")]
    assert far.told(tried)["add_ons"]["calls"]["never_billed_units"] == 2
