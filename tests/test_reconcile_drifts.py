"""Drifts, planted at both far sides and in the store all at once: each is found, with its kind and units.

What a repair mends is gone from the next look; what it rightly refuses is still there.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import sqlalchemy as sa
from rig import HOUR, PER_UNIT, Json, Rig, a_rig

from billingd.sandbox import control_amplify, server
from billingd.sandbox.recurly.model import Usage
from billingd.store import held, schema

START = datetime(2026, 3, 2, 0, 35, tzinfo=UTC)
"""Just after the audits of that day, which would find much of it too."""

TIERS = [
    {"from": 1, "to": 100, "cost": 2, "flatFee": 0},
    {"from": 101, "to": 999_999_999, "cost": 1, "flatFee": 0},
]
VOLUME = {"type": "volume", "limit": {"type": "tiered", "tiers": TIERS}}
ACCEPT = {"Accept": "application/vnd.recurly.v2021-02-25"}


@dataclass(frozen=True)
class Planted:
    """What was done, and what has to be found of it; `left`: a repair rightly refuses it."""

    what: str
    kind: str
    units: int
    repairable: bool
    left: bool


def table(planted: list[Planted], found: list[Json], left: list[Json]) -> str:
    """For people: one line each."""
    lines = [f"{'planted':<74} {'kind':<20} {'units':>5}  found  repair"]
    had = Counter((one["kind"], one["units"]) for one in found)
    still = Counter((one["kind"], one["units"]) for one in left)
    for one in planted:
        key = (one.kind, one.units)
        outcome = "refused" if one.left and still[key] else "held" if not one.repairable else "mended"
        if not one.left and still[key]:
            outcome = "NOT MENDED"
        lines.append(
            f"{one.what:<74} {one.kind:<20} {one.units:>5}  {'yes' if had[key] else 'NO':<5}  {outcome}"
        )
    return "\n".join(lines)


class Plants:
    """Plants drifts, by plain calls to the sandbox, its control interface, and rows of the store."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.planted: list[Planted] = []

    def note(self, what: str, kind: str, units: int, *, repairable: bool, left: bool | None = None) -> None:
        self.planted.append(Planted(what, kind, units, repairable, not repairable if left is None else left))

    async def call(self, method: str, path: str, body: Json | None = None) -> Any:
        """One call to Recurly, as anybody may make it."""
        auth = aiohttp.BasicAuth(server.API_KEY, "")
        url = f"http://127.0.0.1:{self.rig.front.port}{path}"
        async with (
            aiohttp.ClientSession(auth=auth, headers=ACCEPT) as session,
            session.request(method, url, json=body) as answer,
        ):
            text = await answer.text()
            assert answer.status < 300, (path, answer.status, text)
            return await answer.json() if text else None

    async def post(self, like: Usage, *, units: int | None = None, tag: str | None = "") -> Json:
        """Another record beside that one."""
        uuid, code = like.subscription.uuid, like.add_on.add_on.code
        body: Json = {
            "amount": like.amount if units is None else units,
            "usage_timestamp": f"{like.usage_timestamp:%Y-%m-%dT%H:%M:%SZ}",
        }
        if tag is not None:
            body["merchant_tag"] = tag or like.merchant_tag
        made: Json = await self.call("POST", f"/subscriptions/uuid-{uuid}/add_ons/code-{code}/usage", body)
        return made

    async def serve(self, name: str, *units: int) -> None:
        """So many units, an hour after the other."""
        for one in units:
            await self.rig.traffic(name, one)

    def of(self, units: int) -> Usage:
        """The record at Recurly of so many units."""
        [one] = [each for each in self.rig.world.site.usages.values() if each.amount == units]
        return one

    async def sql(self, statement: Any) -> None:
        async with self.rig.store.write() as tx:
            await tx.execute(statement)


async def hourly(rig: Rig, served: dict[str, list[int]]) -> None:
    """Traffic in one window after the other, then all of it is reported."""
    for hour in range(max(map(len, served.values()))):
        for name, units in served.items():
            if hour < len(units):
                await rig.traffic(name, units[hour])
        rig.pass_(HOUR)
    await rig.report()


async def first_cycle(rig: Rig, plants: Plants) -> None:
    """What is billed at its end: records that nobody can change any more."""
    await hourly(rig, {"acme": [101, 102, 103], "vol": [201, 202], "beta": [50]})
    await plants.post(plants.of(101))
    plants.note("flat: a record posted twice, both billed", "double_record", 101, repairable=True)
    await plants.call("PUT", f"/usage/{plants.of(102).id}", {"amount": 112})
    plants.note("flat: 102 made 112, then billed", "wrong_amount", 10, repairable=True)
    moved = plants.of(103)
    at = moved.usage_timestamp - timedelta(minutes=20)
    body = {"usage_timestamp": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
    await plants.call("PUT", f"/usage/{moved.id}", body)
    plants.note("flat: a record moved by 20 minutes, then billed", "wrong_period", 103, repairable=False)
    await plants.post(plants.of(201))
    plants.note("volume: a record posted twice, both billed", "double_record", 201, repairable=False)
    wrong = plants.of(202)
    await plants.post(wrong, units=207)
    await plants.call("DELETE", f"/usage/{wrong.id}")
    plants.note("volume: 202 made 207, then billed", "wrong_amount", 5, repairable=False)
    await rig.renew()
    await rig.poll()
    await rig.drain()


async def second_cycle(rig: Rig, plants: Plants) -> None:
    """What is still unbilled, at Recurly and in the ledger."""
    await hourly(rig, {"acme": [3, 6, 7, 8], "beta": [13, 14], "gone": [9]})
    one = plants.of(3)
    await plants.call("DELETE", f"/usage/{one.id}")
    plants.note("a reported record removed at Recurly", "missing_record", 3, repairable=True)
    await plants.post(plants.of(6))
    plants.note("a record posted twice, unbilled", "double_record", 6, repairable=True)
    await plants.call("PUT", f"/usage/{plants.of(7).id}", {"amount": 9})
    plants.note("7 made 9, unbilled", "wrong_amount", 2, repairable=True)
    moved = plants.of(8)
    body = {"usage_timestamp": f"{START + HOUR:%Y-%m-%dT%H:%M:%SZ}"}
    await plants.call("PUT", f"/usage/{moved.id}", body)
    plants.note("a record moved into the cycle before, unbilled", "wrong_period", 8, repairable=True)
    like = plants.of(14)
    await plants.post(like, units=11, tag=None)
    plants.note("a record without a tag", "foreign_record", 11, repairable=False)
    await plants.post(like, units=12, tag="bd1:0123456789abcdef01234567:20260302T100000Z:3600:1")
    plants.note("a record with a tag like ours that nobody recorded", "foreign_record", 12, repairable=False)
    records = schema.usage_records
    await plants.sql(
        sa.update(records).where(records.c.units == 13).values(state="held", usage_id=None, reported_at=None)
    )
    plants.note("held in the ledger, and at Recurly after all", "foreign_record", 13, repairable=True)
    await never_sent(rig, plants)


async def never_sent(rig: Rig, plants: Plants) -> None:
    """Records whose report is dead, or gone."""
    await rig.traffic("acme", 4)
    rig.pass_(HOUR)
    await rig.traffic("acme", 5)
    rig.pass_(2 * HOUR)
    await rig.poll()
    actions, records = schema.outbox, schema.usage_records
    rows = {row["units"]: row for row in await rig.rows(records)}
    key = f"report_usage:{rows[4]['merchant_tag']}"
    dead = {"state": "dead", "error": "boom", "settled_at": rig.clock.now()}
    await plants.sql(sa.update(actions).where(actions.c.key == key).values(**dead))
    plants.note("a record whose report is a dead letter", "missing_record", 4, repairable=True)
    key = f"report_usage:{rows[5]['merchant_tag']}"
    await plants.sql(sa.delete(actions).where(actions.c.key == key))
    plants.note("a record whose report is gone", "missing_record", 5, repairable=True)
    await rig.drain()


async def at_amplify(rig: Rig, plants: Plants) -> None:
    """Traffic that comes late, or is counted no more."""
    now = rig.far.now()
    await rig.traffic("beta", 15, at=now - 3 * HOUR, arrives=now)  # within the horizon: no drift
    await rig.traffic("beta", 16, at=START + HOUR, arrives=now)
    plants.note("Amplify: late, beyond it; flat", "late_beyond_horizon", 16, repairable=True)
    await rig.traffic("vol", 17, at=START + HOUR, arrives=now)
    plants.note(
        "Amplify: late, beyond it; volume, cycle billed",
        "late_beyond_horizon",
        17,
        repairable=False,
        left=False,
    )
    traffic = rig.world.tenant.traffic
    seen = [
        (series, counts)
        for by_name in traffic._arrived.values()
        for by_series in by_name.values()
        for series, counts in by_series.items()
    ]
    [(series, at)] = [
        (series, at)
        for series, counts in seen
        for at, units in zip(counts.times, counts.units, strict=True)
        if units == 14
    ]
    traffic.count(series, datetime.fromtimestamp(at / 1000, START.tzinfo), -4, now, 0)
    plants.note("Amplify: 14 counted before, 10 now", "wrong_amount", 4, repairable=False)


async def of_links(rig: Rig, plants: Plants, ids: dict[str, str]) -> None:
    """Plans, prices and subscriptions; none has units."""
    site = rig.world.site
    uuids = {each.given.get("po_number"): each.uuid for each in site.subscriptions.values()}
    await plants.call("DELETE", f"/subscriptions/uuid-{uuids[ids['gone']]}?refund=none&charge=true")
    plants.note("a linked subscription terminated at Recurly", "link_missing", 0, repairable=False)
    plans = {each.name: each for each in site.plans.values()}
    flat, bulk = (
        next(one for name, one in plans.items() if name.lower() == title) for title in ("metered", "bulk")
    )
    site.create_account("stranger", billing_info=True)
    body: Json = {"plan_code": flat.code, "currency": "USD", "account": {"code": "stranger"}}
    await plants.call("POST", "/subscriptions", body)
    plants.note("a live subscription on a plan of ours, without marker", "link_orphaned", 0, repairable=False)
    body = {"code": "amplify-plan-nobody", "name": "x", "currencies": [{"currency": "USD", "unit_amount": 1}]}
    await plants.call("POST", "/plans", body)
    plants.note("a plan at Recurly that no product plan has", "link_orphaned", 0, repairable=False)
    await plants.call(
        "PUT", f"/plans/code-{bulk.code}", {"currencies": [{"currency": "USD", "unit_amount": 12}]}
    )
    plants.note("a plan's price changed at Recurly", "price_differs", 0, repairable=False)
    plants.note("... so a subscription pays another than its plan's", "price_differs", 0, repairable=False)
    await rig.play(control_amplify.add_quota, {"name": "more", "pricing": PER_UNIT}, name="metered")
    plants.note("a quota whose event was lost", "link_missing", 0, repairable=False)


async def reconciled(rig: Rig, *, repair: bool = False) -> Json:
    rig.pass_(timedelta(minutes=2))
    run = await rig.daemon.reconciler.start(since=START, repair=repair)
    await rig.daemon.reconciler.finish(run)
    found = await rig.daemon.reconciler.document(run)
    assert found is not None
    assert found["state"] == "done", found["error"]
    return found


def kinds(found: Json) -> Counter[tuple[str, int, bool]]:
    return Counter((one["kind"], one["units"], one["repairable"]) for one in found["drift"])


async def planted_and_mended(store_url: str) -> str:
    """Everything at once on one store; the table of it."""
    async with a_rig(store_url, start=START) as rig:
        rig.horizon = 6 * HOUR
        rig.start()
        await rig.poll()
        await rig.product()
        await rig.plan()
        await rig.plan("bulk", pricing=VOLUME)
        await rig.work(timedelta(minutes=4), rounds=2)  # both make the same measured unit: one tries again
        of_plan = {"acme": "metered", "beta": "metered", "gone": "metered", "vol": "bulk"}
        ids = {name: await rig.subscribe(name, plan) for name, plan in of_plan.items()}
        await rig.work()
        plants = Plants(rig)
        await first_cycle(rig, plants)
        await second_cycle(rig, plants)
        await at_amplify(rig, plants)
        await of_links(rig, plants, ids)

        found = await reconciled(rig)
        expected = Counter((one.kind, one.units, one.repairable) for one in plants.planted)
        assert kinds(found) == expected
        assert found["drift_units"] == sum(one.units for one in plants.planted)

        mending = await reconciled(rig, repair=True)
        assert mending["repaired_units"] == sum(one.units for one in plants.planted if one.repairable)
        for _ in range(10):
            rig.pass_(timedelta(minutes=2))
            await rig.drain()
        after = await reconciled(rig)
        left = Counter((one.kind, one.units, one.repairable) for one in plants.planted if one.left)
        assert kinds(after) == left
        assert after["held_units"] == 17, "late usage that its prices take no more is held"
        assert await rig.dead() == []
        async with rig.store.read() as tx:
            kept = Counter(row["kind"] for row in await held.standing(tx))
        refused = ["double_record", "wrong_amount", "wrong_period", "foreign_record", "late_usage"]
        refused += [each.kind for each in plants.planted if not each.units]
        seen = ["reading_shrank", "ended_at_recurly"]  # by the poll that a run begins with
        assert kept == Counter([*refused, *seen]), "what is refused waits for a person"
        [acme] = rig.billed(ids["acme"])
        [add_on] = acme["add_ons"].values()
        assert add_on["reported_units"] == 101 + 102 + 103 + 3 + 6 + 7 + 8 + 4 + 5
        [beta] = rig.billed(ids["beta"])
        [add_on] = beta["add_ons"].values()
        assert add_on["reported_units"] == 50 + 13 + 14 + 11 + 12 + 15 + 16, (
            "late traffic is booked on the way"
        )
        return table(plants.planted, found["drift"], after["drift"])


async def test_each_drift_is_found_and_what_is_safe_is_mended(
    store_url: str, record_property: Callable[[str, object], None]
) -> None:
    """`python tests/reconcile_bench.py --drifts` prints the table."""
    record_property("drifts", await planted_and_mended(store_url))
