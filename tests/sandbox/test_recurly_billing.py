"""Bill runs: what is on which invoice, when periods end, and that every unit is billed once."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from recurly_side import START, RecurlySide, add_on, lines, recurly_side, tier, usage_path

from billingd.sandbox.recurly.periods import boundary

FEE = [{"currency": "USD", "unit_amount": 5}]


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


@pytest.mark.parametrize(
    ("anchor", "unit", "length", "ends"),
    [
        ("2026-01-31", "months", 1, ["2026-02-28", "2026-03-31", "2026-04-30"]),
        ("2028-01-30", "months", 1, ["2028-02-29", "2028-03-30"]),
        ("2026-11-30", "months", 3, ["2027-02-28", "2027-05-30"]),
        ("2028-02-29", "months", 12, ["2029-02-28", "2030-02-28", "2031-02-28", "2032-02-29"]),
        ("2026-12-31", "days", 7, ["2027-01-07", "2027-01-14"]),
    ],
)
def test_months_are_clamped_from_the_original_day(
    anchor: str, unit: str, length: int, ends: list[str]
) -> None:
    """The 31st bills on the 28th of February and again on the 31st of March."""
    start = datetime.fromisoformat(anchor).replace(tzinfo=UTC)
    found = [boundary(start, unit, length, count + 1).date().isoformat() for count in range(len(ends))]
    assert found == ends


async def test_usage_is_billed_in_arrears_and_shows_even_at_zero(far: RecurlySide) -> None:
    """First invoice: plan and setup fee, no usage line; from the second on one per add-on (UBB:114-122)."""
    await far.make_plan(setup_fees=FEE, add_ons=[add_on(), add_on("idle")])
    made = await far.subscribe(add_ons=[{"code": "calls"}, {"code": "idle"}])
    await far.use(made, 12)
    far.pass_(days=60)
    first, second, third = far.invoices(made)
    assert lines(first) == [("plan", 1, "20.00"), ("setup_fee", 1, "5.00")]
    assert lines(second) == [("calls", 12, "1.20"), ("idle", 0, "0.00"), ("plan", 1, "20.00")]
    assert lines(third) == [("calls", 0, "0.00"), ("idle", 0, "0.00"), ("plan", 1, "20.00")]
    assert (first["origin"], second["origin"]) == ("purchase", "renewal")
    assert second["created_at"] == "2026-02-28T12:00:00+00:00"
    assert third["created_at"] == "2026-03-31T12:00:00+00:00"
    assert second["total"] == "21.20"


@pytest.mark.parametrize(
    ("tier_type", "amount"),
    [("flat", "15.00"), ("tiered", "125.00"), ("volume", "75.00"), ("stairstep", "0.50")],
)
async def test_each_tier_type_is_charged_as_its_own(far: RecurlySide, tier_type: str, amount: str) -> None:
    """150 units over 100 at 1 and the rest at 0.5."""
    await far.make_plan(add_ons=[add_on(tier_type=tier_type)])
    made = await far.subscribe()
    for units in (100, 50):
        await far.use(made, units)
    far.site.renew(made["uuid"])
    assert lines(far.invoices(made)[1], usage=True) == [("calls", 150, amount)]


async def test_last_in_period_counts_the_latest_record_only(far: RecurlySide) -> None:
    """By its usage timestamp; the others are billed with it, at nothing."""
    await far.make_plan(add_ons=[add_on(usage_calculation_type="last_in_period")])
    made = await far.subscribe()
    now = far.pass_(hours=3)
    await far.use(made, 9, now)
    await far.use(made, 4, now - timedelta(hours=1))
    far.site.renew(made["uuid"])
    assert lines(far.invoices(made)[1], usage=True) == [("calls", 9, "0.90")]
    assert far.told(made)["add_ons"]["calls"]["unbilled_units"] == 0


async def test_term_usage_climbs_the_tiers_over_several_cycles(far: RecurlySide) -> None:
    """`usage_timeframe=subscription_term` goes on where the last cycle stopped, until the term ends."""
    tiers = [tier(100, "1"), tier(None, "0.5")]
    body = add_on(tier_type="tiered", tiers=tiers, usage_timeframe="subscription_term")
    await far.make_plan(add_ons=[body])
    made = await far.subscribe(total_billing_cycles=2, renewal_billing_cycles=2)
    for _ in range(3):
        await far.use(made, 80)
        far.site.renew(made["uuid"])
    charged = [lines(each, usage=True) for each in far.invoices(made)[1:]]
    assert charged == [[("calls", 80, "80.00")], [("calls", 80, "50.00")], [("calls", 80, "80.00")]]


@pytest.mark.parametrize(("tier_type", "amount"), [("flat", "6.00"), ("tiered", "50.00")])
async def test_late_usage_is_a_correction_on_the_next_invoice(
    far: RecurlySide, tier_type: str, amount: str
) -> None:
    """On a line of its own per cycle, priced on top of the tiers already billed there (UBB:425-429)."""
    await far.make_plan(add_ons=[add_on(tier_type=tier_type)])
    made = await far.subscribe()
    used = far.pass_(hours=1)
    await far.use(made, 60, used)
    far.pass_(hours=1)
    far.site.renew(made["uuid"])
    far.pass_(hours=1)
    await far.use(made, 60, used)
    far.site.renew(made["uuid"])
    invoice = far.invoices(made)[2]
    assert lines(invoice, usage=True) == [("calls", 0, "0.00"), ("calls", 60, amount)]
    correction = invoice["lines"][1]
    assert (correction["correction"], correction["start_date"]) == (True, START.isoformat())


async def test_a_net_negative_correction_is_a_credit(far: RecurlySide) -> None:
    """The units go back at the tier they were billed at."""
    await far.make_plan(add_ons=[add_on(tier_type="tiered")])
    made = await far.subscribe()
    used = far.pass_(hours=1)
    await far.use(made, 120, used)
    far.pass_(hours=1)
    far.site.renew(made["uuid"])
    far.pass_(hours=1)
    await far.use(made, -30, used)
    far.site.renew(made["uuid"])
    assert lines(far.invoices(made)[2], usage=True) == [("calls", 0, "0.00"), ("calls", -30, "-20.00")]
    listed = await far.call("GET", f"/subscriptions/{made['id']}/line_items?type=credit")
    assert [(each["quantity"], each["amount"]) for each in listed["data"]] == [(30, -20.0)]


@pytest.mark.parametrize(
    "changes",
    [
        {"tier_type": "volume"},
        {"tier_type": "stairstep"},
        {"tier_type": "tiered", "usage_timeframe": "subscription_term"},
        {"usage_calculation_type": "last_in_period"},
    ],
    ids=str,
)
async def test_corrections_are_refused_where_recurly_takes_none(
    far: RecurlySide, changes: dict[str, Any]
) -> None:
    """Volume, stairstep, term usage (UBB:430-431); under `last_in_period` too, which is not documented."""
    await far.make_plan(add_ons=[add_on(**changes)])
    made = await far.subscribe()
    used = far.pass_(hours=1)
    await far.use(made, 5, used)
    far.pass_(hours=1)
    far.site.renew(made["uuid"])
    far.pass_(hours=1)
    await far.use(made, 5, used, status=422)
    await far.use(made, 5)


async def test_lines_are_rounded_once_to_the_currencys_minor_unit(far: RecurlySide) -> None:
    """Half up; whole yen; dinars to hundredths (DOC decimal-pricing.md)."""
    currencies = ("USD", "JPY", "KWD")
    prices = [{"currency": each, "unit_amount": 0} for each in currencies]
    units = [{"currency": each, "unit_amount_decimal": "0.0015"} for each in currencies]
    await far.make_plan(currencies=prices, add_ons=[add_on(currencies=units)])
    for currency, expected in (("USD", "1.51"), ("JPY", "2"), ("KWD", "1.51")):
        made = await far.subscribe(account=currency.lower(), currency=currency)
        await far.use(made, 1_005)
        far.site.renew(made["uuid"])
        assert lines(far.invoices(made)[1], usage=True) == [("calls", 1_005, expected)]


async def test_fixed_add_ons_are_charged_in_advance(far: RecurlySide) -> None:
    """Quantity times price with the plan, no usage taken."""
    fixed = {"code": "seats", "name": "Seats", "currencies": [{"currency": "USD", "unit_amount": 3}]}
    await far.make_plan(add_ons=[fixed])
    made = await far.subscribe(add_ons=[{"code": "seats", "quantity": 4}])
    assert lines(far.invoices(made)[0]) == [("plan", 1, "20.00"), ("seats", 4, "12.00")]
    assert (made["add_ons_total"], made["total"]) == (12.0, 32.0)
    await far.refused("POST", usage_path(made, "seats"), {"amount": 1})


async def test_every_unit_is_billed_once_whatever_the_clock_does(far: RecurlySide) -> None:
    """The oracle: reported = billed + unbilled, and the lines add up to what is billed."""
    await far.make_plan()
    made = await far.subscribe()
    for step in range(40):
        at = far.pass_(hours=37 + step)
        await far.use(made, step, max(START, at - timedelta(hours=100)))
    told = far.told(made)
    units = told["add_ons"]["calls"]
    on_lines = [line for each in told["invoices"] for line in each["lines"] if line["add_on"]]
    assert units["reported_units"] == sum(range(40)) == units["billed_units"] + units["unbilled_units"]
    assert sum(line["quantity"] for line in on_lines) == units["billed_units"] > 0
    assert sum(Decimal(line["amount"]) for line in on_lines) == units["billed_units"] * Decimal("0.1")
    assert any(line["correction"] for line in on_lines)
