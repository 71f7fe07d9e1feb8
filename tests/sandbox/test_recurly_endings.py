"""How subscriptions end: cancel, terminate, refund (recurly.md 6)."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from recurly_side import (
    START,
    RecurlySide,
    lines,
    path_of,
    recurly_side,
    stamp,
    subscription,
    usage_path,
)

SUBSCRIPTIONS = "/subscriptions"


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        await side.make_plan()
        yield side


@pytest.mark.parametrize("timeframe", ["bill_date", "term_end"])
async def test_cancel_runs_to_the_bill_date_or_the_term(far: RecurlySide, timeframe: str) -> None:
    """`canceled` and billing until then, then `expired` with a final usage invoice (6)."""
    made = await far.subscribe(total_billing_cycles=2, auto_renew=True)
    canceled = await far.call("PUT", path_of(made, "/cancel"), {"timeframe": timeframe})
    assert canceled["state"] == "canceled"
    assert canceled["expires_at"] == (
        "2026-02-28T12:00:00Z" if timeframe == "bill_date" else "2026-03-31T12:00:00Z"
    )
    await far.refused("PUT", path_of(made, "/cancel"), {})
    far.pass_(days=20)
    await far.use(made, 5)
    far.pass_(days=100)
    told = await far.call("GET", path_of(made))
    assert (told["state"], told["expires_at"]) == ("expired", canceled["expires_at"])
    invoices = far.invoices(made)
    assert len(invoices) == (2 if timeframe == "bill_date" else 3)
    assert lines(invoices[1], usage=True) == [("calls", 5, "0.50")]
    assert lines(invoices[-1], usage=False) == []


async def test_a_cancellation_can_be_taken_back(far: RecurlySide) -> None:
    """Until it expires, and not twice (6)."""
    made = await far.subscribe()
    await far.refused("PUT", path_of(made, "/reactivate"))
    await far.call("PUT", path_of(made, "/cancel"))
    back = await far.call("PUT", path_of(made, "/reactivate"))
    assert (back["state"], back["canceled_at"], back["expires_at"]) == ("active", None, None)


async def test_a_future_subscription_fails_when_canceled(far: RecurlySide) -> None:
    """`failed` is final; it cannot be terminated either (6)."""
    made = await far.subscribe(starts_at=stamp(START + timedelta(days=3)))
    assert (made["state"], made["activated_at"]) == ("future", None)
    error = await far.refused("DELETE", path_of(made))
    assert error["message"] == "Cannot expire an inactive subscription."
    assert (await far.call("PUT", path_of(made, "/cancel")))["state"] == "failed"
    error = await far.refused("PUT", path_of(made, "/cancel"))
    assert error["message"] == "Only active and future subscriptions can be canceled"
    far.pass_(days=5)
    assert far.told(made)["state"] == "failed"
    assert far.invoices(made) == []


async def test_terminate_bills_what_is_unbilled(far: RecurlySide) -> None:
    """`charge=true` is the default: on the final invoice; then nothing is possible any more (6)."""
    made = await far.subscribe()
    far.pass_(hours=2)
    await far.use(made, 7)
    ended = await far.call("DELETE", path_of(made))
    assert (ended["state"], ended["expires_at"]) == ("expired", stamp(far.clock.now()))
    assert lines(far.invoices(made)[-1]) == [("calls", 7, "0.70")]
    await far.refused("DELETE", path_of(made))
    await far.use(made, 1, status=422)
    await far.refused("PUT", path_of(made), {"po_number": "x"}, type_="immutable_subscription")


async def test_terminate_without_charge_makes_a_negative_record(far: RecurlySide) -> None:
    """One negative, untagged record brings the cycle to 0; corrections are billed all the same (UBB:157)."""
    made = await far.subscribe()
    early = far.pass_(hours=2)
    await far.use(made, 7)
    far.pass_(hours=1)
    far.site.renew(made["uuid"])
    far.pass_(hours=2)
    await far.use(made, 5)
    await far.use(made, 3, early)
    await far.call("DELETE", path_of(made) + "?charge=false&refund=none")
    assert lines(far.invoices(made)[-1]) == [("calls", 0, "0.00"), ("calls", 3, "0.30")]
    listed = await far.call("GET", usage_path(made) + "?billing_status=all")
    assert (listed["data"][0]["amount"], listed["data"][0]["merchant_tag"]) == (-5, None)
    assert all(each["billed_at"] for each in listed["data"])


async def test_terminate_refuses_unknown_parameters(far: RecurlySide) -> None:
    """422 "Please provide valid values for these parameters: refund." (OAS:21808 ff.)."""
    made = await far.subscribe()
    error = await far.refused("DELETE", path_of(made) + "?refund=all")
    assert error["message"] == "Please provide valid values for these parameters: refund."
    await far.refused("DELETE", path_of(made) + "?charge=maybe")
    await far.refused("DELETE", path_of(made) + "?reason=x", status=400)


@pytest.mark.parametrize(("refund", "credit"), [("full", "-20.00"), ("partial", "-10.00"), ("none", None)])
async def test_a_refund_leaves_usage_out(far: RecurlySide, refund: str, credit: str | None) -> None:
    """Of the last invoice, if paid: all of it, or by the time that remains (OAS:21808)."""
    await far.make_plan(code="paid", setup_fees=[{"currency": "USD", "unit_amount": 5}], interval_unit="days")
    far.site.configure(require_billing_info_for_automatic=False)
    made = await far.subscribe(plan_code="paid", collection_method="automatic")
    await far.use(made, 5)
    far.site.renew(made["uuid"])
    far.pass_(hours=12)
    await far.call("DELETE", path_of(made) + f"?refund={refund}")
    credits_ = [each["total"] for each in far.invoices(made) if each["origin"] == "refund"]
    assert credits_ == ([] if credit is None else [credit])


async def test_an_account_that_closes_cancels_its_subscriptions(far: RecurlySide) -> None:
    """They run to the end of the cycle; a closed account takes no new one."""
    made = await far.subscribe()
    await far.call("DELETE", "/accounts/code-ann")
    assert (await far.call("GET", path_of(made)))["state"] == "canceled"
    far.pass_(minutes=5)
    await far.make_plan(code="other")
    await far.refused("POST", SUBSCRIPTIONS, subscription(plan_code="other"))
