"""Trials, future starts, terms and pauses: when what is billed, and when it ends."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from recurly_side import START, RecurlySide, add_on, lines, recurly_side, stamp, usage_path

from billingd.sandbox.recurly.periods import boundary

FEE = [{"currency": "USD", "unit_amount": 5}]


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


@pytest.mark.parametrize(("tier_type", "amount"), [("flat", "0.30"), ("volume", "3.00")])
async def test_usage_of_a_trial_is_never_billed(far: RecurlySide, tier_type: str, amount: str) -> None:
    """Logged, shown at 0 on the trial's invoice, and not on the first payment nor ever after (UBB).

    Late usage of a trial is no correction, as the trial was never billed, so volume takes it too.
    """
    add_ons = [add_on(tier_type=tier_type)]
    await far.make_plan(trial_unit="days", trial_length=14, setup_fees=FEE, add_ons=add_ons)
    made = await far.subscribe()
    assert (made["trial_ends_at"], made["state"]) == ("2026-02-14T12:00:00Z", "active")
    in_trial = far.pass_(days=1)
    await far.use(made, 50, in_trial)
    far.pass_(days=20)
    await far.use(made, 3)
    await far.use(made, 4, in_trial)
    far.pass_(days=30)
    trial, first, second = far.invoices(made)
    assert lines(trial) == [("plan_trial", 1, "0.00"), ("calls", 0, "0.00")]
    assert lines(first) == [("plan", 1, "20.00"), ("setup_fee", 1, "5.00")]
    assert lines(second, usage=True) == [("calls", 3, amount)]
    told = far.told(made)["add_ons"]["calls"]
    assert (told["reported_units"], told["billed_units"], told["never_billed_units"]) == (57, 3, 54)
    assert second["created_at"] == "2026-03-14T12:00:00+00:00"


async def test_a_trial_given_or_taken_away_by_the_subscription(far: RecurlySide) -> None:
    """`trial_ends_at` in the future sets one, in the past takes the plan's away; `in_trial` lists them."""
    await far.make_plan(trial_unit="months", trial_length=1)
    without = await far.subscribe(trial_ends_at=stamp(START))
    given = await far.subscribe(account="bob", trial_ends_at="2026-02-05T00:00:00Z")
    assert (without["trial_ends_at"], given["trial_ends_at"]) == (None, "2026-02-05T00:00:00Z")
    listed = await far.call("GET", "/subscriptions?state=in_trial")
    assert [each["id"] for each in listed["data"]] == [given["id"]]


async def test_usage_before_a_future_start_is_on_the_first_invoice(far: RecurlySide) -> None:
    """No invoice until then; what was logged since the creation is on it (UBB, "First invoice")."""
    await far.make_plan()
    starts = START + timedelta(days=10)
    made = await far.subscribe(starts_at=stamp(starts))
    other = await far.subscribe(account="bob", starts_at=stamp(starts))
    far.pass_(days=1)
    await far.use(made, 8)
    assert far.invoices(made) == []
    far.pass_(days=10)
    assert lines(far.invoices(made)[0]) == [("calls", 8, "0.80"), ("plan", 1, "20.00")]
    assert lines(far.invoices(other)[0]) == [("plan", 1, "20.00")]
    assert far.told(made)["current_period_ends_at"] == "2026-03-10T12:00:00+00:00"


async def test_a_term_that_does_not_renew_expires(far: RecurlySide) -> None:
    """`total_billing_cycles` reached with `auto_renew` false: a last usage invoice, then expired."""
    await far.make_plan(total_billing_cycles=3, auto_renew=False)
    made = await far.subscribe()
    assert (made["total_billing_cycles"], made["remaining_billing_cycles"]) == (3, 2)
    assert made["current_term_ends_at"] == "2026-04-30T12:00:00Z"
    far.pass_(days=200)
    told = await far.call("GET", f"/subscriptions/{made['id']}")
    assert (told["state"], told["expires_at"]) == ("expired", "2026-04-30T12:00:00Z")
    assert [lines(each, usage=False) for each in far.invoices(made)] == [[("plan", 1, "20.00")]] * 3 + [[]]
    assert lines(far.invoices(made)[-1]) == [("calls", 0, "0.00")]


async def test_a_term_that_renews_begins_another(far: RecurlySide) -> None:
    """With `renewal_billing_cycles`, else the plan's total (OAS:35214 ff.)."""
    await far.make_plan(total_billing_cycles=2)
    made = await far.subscribe(renewal_billing_cycles=3)
    far.pass_(days=60)
    told = await far.call("GET", f"/subscriptions/{made['id']}")
    assert (told["total_billing_cycles"], told["remaining_billing_cycles"]) == (3, 2)
    assert told["current_term_started_at"] == "2026-03-31T12:00:00Z"
    assert told["current_term_ends_at"] == "2026-06-30T12:00:00Z"


async def test_a_pause_takes_no_usage_and_bills_nothing(far: RecurlySide) -> None:
    """From the next bill date; what was used before is billed then; it ends by itself (5.1)."""
    await far.make_plan()
    made = await far.subscribe()
    await far.use(made, 5)
    pausing = await far.call("PUT", f"/subscriptions/{made['id']}/pause", {"remaining_pause_cycles": 2})
    assert (pausing["state"], pausing["paused_at"]) == ("active", "2026-02-28T12:00:00Z")
    paused_at = far.pass_(days=30)
    error = await far.refused("POST", usage_path(made), {"amount": 1})
    assert "paused" in error["message"]
    assert lines(far.invoices(made)[1]) == [("calls", 5, "0.50")]
    far.pass_(days=70)
    told = await far.call("GET", f"/subscriptions/{made['id']}")
    assert (told["state"], told["current_period_started_at"]) == ("active", "2026-04-30T12:00:00Z")
    assert lines(far.invoices(made)[2]) == [("plan", 1, "20.00")]
    await far.use(made, 1, paused_at, status=422)
    await far.use(made, 1, START, status=201)


async def test_the_owner_can_pause_resume_renew_and_expire_at_once(far: RecurlySide) -> None:
    """Beside the API, for rehearsals; what the state forbids is a ValueError."""
    await far.make_plan()
    made = await far.subscribe()
    uuid = made["uuid"]
    far.site.pause(uuid)
    await far.use(made, 1, status=422)
    far.pass_(hours=1)
    far.site.resume(uuid)
    with pytest.raises(ValueError, match="Unable to resume active subscription"):
        far.site.resume(uuid)
    used = far.pass_(hours=1)
    await far.use(made, 2, used)
    far.site.renew(uuid)
    assert far.told(made)["current_period_ends_at"] == boundary(used, "months", 1, 1).isoformat()
    far.site.expire(uuid)
    charged = [lines(each) for each in far.invoices(made)]
    base = ("plan", 1, "20.00")
    assert charged == [
        [base],
        [("calls", 0, "0.00")],
        [base],
        [("calls", 2, "0.20"), base],
        [("calls", 0, "0.00")],
    ]
    assert far.told(made)["state"] == "expired"
    for act in (far.site.renew, far.site.expire, far.site.pause):
        with pytest.raises(ValueError, match="expired"):
            act(uuid)
    with pytest.raises(ValueError, match="no subscription"):
        far.site.renew("unknown")


async def test_a_first_period_cut_short_is_prorated_but_never_usage(far: RecurlySide) -> None:
    """`next_bill_date` at creation: the plan pro rata, usage in full."""
    await far.make_plan(interval_unit="days", interval_length=10)
    made = await far.subscribe(next_bill_date=stamp(START + timedelta(days=5)))
    await far.use(made, 10)
    far.pass_(days=6)
    first, second = far.invoices(made)
    assert lines(first) == [("plan", 1, "10.00")]
    assert lines(second) == [("calls", 10, "1.00"), ("plan", 1, "20.00")]
