"""A write that takes effect once, whatever is lost, refused, replayed or killed; both databases."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from manual_clock import ManualClock

from billingd.daemon import take_over
from billingd.domain.errors import Misconfigured, NotDone, NotFound, Permanent, Refused, Retryable, Unknown
from billingd.domain.sending import KEY_WINDOW, SECOND_LOOK
from billingd.once import KEYS, Once
from billingd.store import held, history, intents, outbox, schema
from billingd.store.engine import Store, Tx

SETTLING = timedelta(seconds=60)
ATTEMPT = timedelta(seconds=150)
SECOND = timedelta(seconds=1)
FORGOTTEN = timedelta(hours=1)


class FarSide:
    """Recurly reduced to what the protocol leans on: keys are remembered for an hour, failures too.

    `plan` says what the next requests meet; the default is a good answer.
    """

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.plan: list[str] = []
        self.made: list[str] = []
        self.answers: dict[str, tuple[datetime, str | Exception]] = {}
        self.sent: list[tuple[str, bool]] = []
        self.looks = 0
        self.blind: Exception | None = None
        self.heeds_keys = True
        self.doubt: str | None = None

    async def send(self, key: str, *, retried: bool) -> str:
        self.sent.append((key, retried))
        await asyncio.sleep(0)
        fate = self.plan.pop(0) if self.plan else "ok"
        if fate == "never arrives":
            raise Unknown("timed out")
        if fate == "try later":
            raise NotDone("429")
        if fate == "locked out":
            raise Misconfigured("401")
        stored = self.answers.get(key) if self.heeds_keys else None
        if stored is not None and self.clock.now() - stored[0] < FORGOTTEN:
            answer = stored[1]
            if isinstance(answer, Unknown):
                raise Unknown("the stored 500", replayed=True)
        else:
            answer = self._perform(fate)
            self.answers[key] = (self.clock.now(), answer)
            if retried and isinstance(answer, str):
                self.doubt = "create w"
        if fate == "lost":
            raise Unknown("no answer")
        if isinstance(answer, Exception):
            raise answer
        await asyncio.sleep(0)
        return answer

    def _perform(self, fate: str) -> str | Exception:
        failures: dict[str, Exception] = {
            "refused": Refused("422"),
            "no such thing": NotFound("404"),
            "broken": Unknown("500"),
            "bug": KeyError("error"),
        }
        if fate == "bug":
            self.made.append(f"id-{len(self.made) + 1}")
        if fate in failures:
            return failures[fate]
        self.made.append(f"id-{len(self.made) + 1}")
        return self.made[-1]

    def take_doubt(self) -> str | None:
        doubt, self.doubt = self.doubt, None
        return doubt

    async def find(self) -> str | None:
        self.looks += 1
        await asyncio.sleep(0)
        if self.blind is not None:
            raise self.blind
        return self.made[0] if self.made else None


def an_once(store: Store, clock: ManualClock, far: FarSide) -> Once:
    return Once(store, clock, settling=SETTLING, attempt=ATTEMPT, doubt=far.take_doubt)


class Bench:
    """Once in front of a far side."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock
        self.far = FarSide(clock)
        self.once = an_once(store, clock, self.far)
        self.kept: list[str] = []

    async def write(self, body: dict[str, Any] | None = None, **options: Any) -> str:
        far = self.far
        return await self.once.write(
            "w", body or {"n": 1}, send=far.send, find=far.find, about="s1", **options
        )

    async def fails(self, error: type[Exception], body: dict[str, Any] | None = None) -> Any:
        with pytest.raises(error) as caught:
            await self.write(body)
        return caught.value

    def restart(self) -> None:
        """Another process: it remembers nothing but what is on disk."""
        self.once = an_once(self.store, self.clock, self.far)

    async def settle(self, body: dict[str, Any] | None = None) -> None:
        """Waits the settling time out, and the first of the two looks, which find nothing."""
        self.clock.advance(SETTLING)
        error = await self.fails(Unknown, body)
        assert error.retry_after == SECOND_LOOK
        self.clock.advance(SECOND_LOOK)

    async def intent(self) -> Any:
        async with self.store.read() as tx:
            return await intents.find(tx, "w")

    async def history(self) -> list[history.Entry]:
        async with self.store.read() as tx:
            return await history.of(tx, "w")

    def keys(self) -> list[str]:
        return [key for key, _ in self.far.sent]


@pytest.fixture
def bench(store: Store, clock: ManualClock) -> Bench:
    return Bench(store, clock)


async def test_a_write_is_sent_once_and_remembered(bench: Bench) -> None:
    """The second call returns the first one's id without a word to the far side."""
    assert await bench.write() == "id-1"
    assert await bench.write() == "id-1"
    assert (len(bench.far.sent), bench.far.looks) == (1, 0)
    assert (await bench.intent()).state == "done"


async def test_the_intent_is_on_disk_before_the_request_leaves(bench: Bench) -> None:
    """What the store says at the moment of sending: open, with this key and time."""
    seen: list[Any] = []

    async def send(key: str, *, retried: bool) -> str:
        async with bench.store.read() as tx:
            seen.append((await tx.execute(sa.select(schema.intents))).mappings().one())
        return await bench.far.send(key, retried=retried)

    await bench.once.write("w", {}, send=send, find=bench.far.find)
    [row] = seen
    assert (row["state"], row["idempotency_key"], row["first_sent_at"]) == (
        "open",
        bench.keys()[0],
        bench.clock.now(),
    )


async def test_looking_first_finds_what_somebody_else_made(bench: Bench) -> None:
    """Adopted: nothing is sent, and from then on it is known."""
    bench.far.made.append("theirs")
    assert await bench.write(look_first=True) == "theirs"
    assert await bench.write() == "theirs"
    assert (bench.far.sent, bench.far.looks) == ([], 1)


async def test_lost_after_the_commit_it_is_found_not_resent(bench: Bench) -> None:
    """The look comes before any second request."""
    bench.far.plan = ["lost"]
    await bench.fails(Unknown)
    bench.clock.advance(SECOND)
    assert await bench.write() == "id-1"
    assert (len(bench.far.sent), bench.far.made) == (1, ["id-1"])


async def test_lost_before_the_commit_the_same_key_is_sent_while_it_is_remembered(bench: Bench) -> None:
    """Under the same key even a look-up that lags could make no second one."""
    bench.far.plan = ["never arrives", "never arrives"]
    await bench.fails(Unknown)
    bench.clock.advance(KEY_WINDOW / 2)
    await bench.fails(Unknown)
    bench.clock.advance(KEY_WINDOW / 2 - SECOND)
    assert await bench.write() == "id-1"
    assert len(set(bench.keys())) == 1
    assert [retried for _, retried in bench.far.sent] == [False, True, True]
    assert (await bench.intent()).epoch == 1


async def test_a_look_that_lags_is_covered_by_the_key(bench: Bench) -> None:
    """Made, not yet listed, sent again: the far side returns the first answer."""
    bench.far.plan = ["lost"]
    await bench.fails(Unknown)
    made, bench.far.made = bench.far.made, []
    assert await bench.write() == "id-1"
    assert made == ["id-1"]
    assert bench.far.made == []


async def test_after_the_key_is_forgotten_it_settles_and_takes_a_new_one(bench: Bench) -> None:
    """The last request may still be running: two looks after the settling time, then epoch 2."""
    bench.far.plan = ["never arrives", "never arrives"]
    await bench.fails(Unknown)
    bench.clock.advance(KEY_WINDOW - SECOND)
    await bench.fails(Unknown)
    bench.clock.advance(SECOND)
    error = await bench.fails(Unknown)
    assert error.retry_after == SETTLING - SECOND
    bench.clock.advance(SETTLING - SECOND)
    error = await bench.fails(Unknown)
    assert error.retry_after == SECOND_LOOK
    bench.clock.advance(SECOND_LOOK - SECOND)
    error = await bench.fails(Unknown)
    assert error.retry_after == SECOND, "a look that is too soon is not the second"
    assert len(bench.far.sent) == 2, "nothing was sent meanwhile"
    bench.clock.advance(SECOND)
    assert await bench.write() == "id-1"
    assert len(set(bench.keys())) == 2
    assert bench.far.sent[-1][1] is False
    assert bench.far.looks == 5, "looked before each"


async def test_what_takes_effect_between_the_two_looks_is_found(bench: Bench) -> None:
    """A list that lags behind its writes costs a look, not a double."""
    bench.far.plan = ["broken"]
    await bench.fails(Unknown)
    await bench.fails(Unknown)
    bench.clock.advance(SETTLING)
    await bench.fails(Unknown)
    bench.far.made.append("id-late")
    bench.clock.advance(SECOND_LOOK)
    assert await bench.write() == "id-late"
    assert len(bench.far.sent) == 2


async def test_no_sending_is_forgotten_when_another_takes_its_place(bench: Bench) -> None:
    """Keys, epochs and times of all that were sent: the last in the intent, the others in the history."""
    bench.far.plan = ["never arrives", "never arrives", "refused"]
    began = bench.clock.now()
    await bench.fails(Unknown)
    bench.clock.advance(SECOND)
    await bench.fails(Unknown)  # the same key
    bench.clock.advance(FORGOTTEN)
    await bench.settle()
    await bench.fails(Refused)
    bench.clock.advance(SECOND)
    await bench.write()
    entries = await bench.history()
    kept = [entry.detail for entry in entries if entry.kind == "superseded"]
    assert [detail["key"] for detail in kept] == bench.keys()[:3]
    assert [(one["epoch"], one["sends"], one["outcome"]) for one in kept] == [
        (1, 1, "open"),
        (1, 2, "open"),
        (2, 3, "refused"),
    ]
    times = [history.text_of(began), history.text_of(began + SECOND)]
    assert [(one["first_sent_at"], one["last_sent_at"]) for one in kept[:2]] == [
        (times[0], times[0]),
        (times[0], times[1]),
    ]
    [refused] = [entry.detail for entry in entries if entry.kind == "refused"]
    assert (refused["key"], refused["epoch"], refused["error"]) == (bench.keys()[2], 2, "422")
    assert (await bench.intent()).epoch == 3


async def test_what_was_found_and_never_sent_is_not_told_as_sent(bench: Bench) -> None:
    bench.far.made = ["id-1"]
    await bench.write(look_first=True)
    assert (await bench.intent()).state == "done"
    assert history.sent(await bench.intent()) == {}


async def test_a_slow_sending_settles_from_its_end(bench: Bench) -> None:
    """Not from its beginning: until it was given up, the far side may have been at it."""

    async def slowly(key: str, *, retried: bool) -> str:
        bench.far.sent.append((key, retried))
        bench.clock.advance(ATTEMPT)
        raise Unknown("timed out", replayed=True)

    with pytest.raises(Unknown):
        await bench.once.write("w", {"n": 1}, send=slowly, find=bench.far.find)
    assert (await bench.fails(Unknown)).retry_after == SETTLING
    bench.restart()
    assert (await bench.fails(Unknown)).retry_after == SETTLING
    await bench.settle()
    assert await bench.write() == "id-1"


async def test_what_a_dead_process_sent_may_have_run_as_long_as_an_attempt_can(bench: Bench) -> None:
    """Nobody wrote down when its sending ended: the settling time counts from the latest that it can."""
    at = bench.clock.now()
    async with bench.store.write() as tx:
        await intents.opened(tx, "w", None, epoch=1, key="k", body_hash="h", first_sent_at=at, now=at)
    bench.clock.advance(KEY_WINDOW)
    at = bench.clock.now()
    async with bench.store.write() as tx:
        seen = await intents.find(tx, "w")
        first = at - KEY_WINDOW
        await intents.opened(tx, "w", seen, epoch=1, key="k", body_hash="h", first_sent_at=first, now=at)
    ended = at + ATTEMPT
    while bench.clock.now() < ended:
        wait = (await bench.fails(Unknown)).retry_after
        assert wait == SETTLING, "a look in between may well find it"
        bench.clock.advance(wait)
    bench.clock.at = ended + SETTLING - SECOND
    assert (await bench.fails(Unknown)).retry_after == SECOND
    bench.clock.at = ended
    await bench.settle()
    assert await bench.write() == "id-1"
    assert len(bench.far.sent) == 1


async def test_a_clock_that_is_set_forward_shortens_no_settling(bench: Bench) -> None:
    """As long as the process lives, the settling time passes on a clock that nobody sets."""
    steady = {"now": 0.0}
    bench.clock.elapsed = lambda: steady["now"]  # type: ignore[method-assign]
    bench.far.plan = ["broken"]
    await bench.fails(Unknown)
    await bench.fails(Unknown)
    bench.clock.advance(timedelta(hours=2))
    assert (await bench.fails(Unknown)).retry_after == SETTLING
    bench.clock.advance(timedelta(hours=2))
    assert (await bench.fails(Unknown)).retry_after == SETTLING
    assert len(bench.far.sent) == 2
    steady["now"] += SETTLING.total_seconds()
    assert (await bench.fails(Unknown)).retry_after == SECOND_LOOK, "no look before now was one of the two"
    bench.clock.advance(SECOND_LOOK)
    assert await bench.write() == "id-1"


@pytest.mark.parametrize("end", ["given up", "died", "cancelled"])
async def test_a_clock_that_is_set_forward_shortens_no_settling_of_another_process(
    bench: Bench, end: str
) -> None:
    """What it left unknown may be on its way still: it settles here too, whatever the clock says by then."""
    steady = {"now": 1000.0}
    bench.clock.elapsed = lambda: steady["now"]  # type: ignore[method-assign]
    bench.far.plan = ["never arrives"]
    if end == "given up":
        await bench.fails(Unknown)
        bench.restart()
    else:  # before anything was written down of it
        with pytest.raises(asyncio.CancelledError):
            await bench.once.write("w", {"n": 1}, send=cut_off, find=bench.far.find)
    if end == "died":
        await take_over(bench.store, bench.clock.now())
        bench.restart()
    known_ended = end == "given up" or (end == "died" and bench.store.sqlite)
    bench.clock.advance(timedelta(hours=2))
    assert (await bench.fails(Unknown)).retry_after == SETTLING
    for left in (ATTEMPT * (not known_ended), SETTLING):
        steady["now"] += left.total_seconds() - 1
        await bench.fails(Unknown)
        steady["now"] += 1
    assert bench.far.made == []
    assert (await bench.fails(Unknown)).retry_after == SECOND_LOOK
    bench.far.made.append("id-1")  # the request is carried out
    bench.clock.advance(SECOND_LOOK)
    assert await bench.write() == "id-1"


async def cut_off(key: str, *, retried: bool) -> str:
    """The sending's end is never heard of."""
    raise asyncio.CancelledError


async def test_a_retry_that_is_no_replay_casts_doubt_on_all_keys(bench: Bench) -> None:
    """Held and told once; from then on an unanswered write is looked up, not repeated under its key."""
    bench.far.plan = ["never arrives"]
    await bench.fails(Unknown)
    assert await bench.write() == "id-1"
    async with bench.store.read() as tx:
        [item] = await held.standing(tx, kind="idempotency_doubted")
        notice, audit = sorted(await outbox.select(tx, states=["pending"]), key=lambda row: -len(row["kind"]))
    assert (item["subject"], item["subscription_id"]) == (f"{KEYS}:w", "s1")
    assert (notice["kind"], audit["kind"]) == ("notify_provider", "audit_usage")
    assert audit["due_at"] == bench.clock.now() + SETTLING + SECOND_LOOK, "when no request is under way"
    bench.far.made.clear()
    bench.far.plan = ["never arrives"]

    async def write() -> str:
        return await bench.once.write("v", {}, send=bench.far.send, find=bench.far.find)

    with pytest.raises(Unknown):
        await write()
    with pytest.raises(Unknown) as caught:
        await write()
    assert caught.value.retry_after == SETTLING, "its key is young, but nobody relies on it"
    assert len(bench.far.sent) == 3
    bench.clock.advance(SETTLING)
    with pytest.raises(Unknown):
        await write()
    bench.clock.advance(SECOND_LOOK)
    assert await write() == "id-1"
    assert len(set(bench.keys())) == 3
    async with bench.store.read() as tx:
        assert len(await outbox.select(tx, states=["pending"])) == 2, "told once, audited once"


async def test_each_doubted_write_has_a_doubt_of_its_own(bench: Bench) -> None:
    """Two retries are under way when the first is doubted: both are held, people are told once."""
    bench.far.plan = ["never arrives", "never arrives"]
    await bench.fails(Unknown)
    on_its_way, answered = asyncio.Event(), asyncio.Event()

    async def send(key: str, *, retried: bool) -> str:
        if retried:
            on_its_way.set()
            await answered.wait()
        return await bench.far.send(key, retried=retried)

    async def nothing() -> None:
        return None

    async def write() -> str:
        return await bench.once.write("v", {}, send=send, find=nothing, about="s2")

    with pytest.raises(Unknown):
        await write()
    other = asyncio.create_task(write())
    await on_its_way.wait()
    await bench.write()
    bench.clock.advance(timedelta(seconds=1))
    answered.set()
    await other
    async with bench.store.read() as tx:
        doubts = await held.standing(tx, kind="idempotency_doubted")
        pending = await outbox.select(tx, states=["pending"])
    assert [(one["subject"], one["subscription_id"]) for one in doubts] == [
        (f"{KEYS}:w", "s1"),
        (f"{KEYS}:v", "s2"),
    ]
    kinds = sorted(row["kind"] for row in pending)
    assert kinds == ["audit_usage", "audit_usage", "notify_provider"]
    assert not await bench.once._keys_heeded()
    async with bench.store.write() as tx:
        await held.close_one(tx, doubts[0]["id"], resolution="clean", now=bench.clock.now())
    assert not await bench.once._keys_heeded(), "the other one is not proven yet"
    async with bench.store.write() as tx:
        await held.close_one(tx, doubts[1]["id"], resolution="clean", now=bench.clock.now())
    assert await bench.once._keys_heeded()


async def test_what_cannot_be_made_twice_casts_no_doubt(bench: Bench) -> None:
    """Its code is taken once it is there: a retry that is no replay only says that the first never came."""
    bench.far.plan = ["never arrives"]

    async def write() -> str:
        return await bench.once.write("plan:p", {}, send=bench.far.send, find=bench.far.find)

    with pytest.raises(Unknown):
        await write()
    assert await write() == "id-1"
    assert bench.far.doubt is None, "it was taken, so that no later write is thought to be the doubted one"
    async with bench.store.read() as tx:
        assert await held.standing(tx) == []
        assert await outbox.select(tx, states=["pending"]) == []


async def test_a_new_start_waits_only_for_what_may_be_on_its_way(bench: Bench) -> None:
    """On SQLite nobody else is left to send it; elsewhere another worker may, for as long as one may take."""
    bench.far.plan = ["never arrives"]
    await bench.fails(Unknown)
    await bench.write()  # keys are doubted from now on
    bench.far.plan = ["bug"]

    async def write() -> str:
        return await bench.once.write("v", {}, send=bench.far.send, find=bench.far.find, about="s2")

    with pytest.raises(KeyError):  # the end of the process: nothing is written down of it
        await write()
    bench.far.made.clear()
    await take_over(bench.store, bench.clock.now())
    bench.restart()
    with pytest.raises(Unknown):
        await write()
    bench.clock.advance(SETTLING - SECOND if bench.store.sqlite else ATTEMPT + SETTLING - SECOND)
    for left in (SECOND, SECOND_LOOK):
        with pytest.raises(Unknown) as caught:
            await write()
        assert caught.value.retry_after == left
        bench.clock.advance(left)
    assert await write() == "id-1"


async def test_what_was_sent_twice_without_an_answer_is_audited_once_it_is_found(bench: Bench) -> None:
    """Nobody heard whether its key was heeded, so both may have taken effect, wanted still or not."""

    async def asked() -> list[str]:
        async with bench.store.read() as tx:
            return [row["args"]["write"] for row in await outbox.select(tx, states=["pending"])]

    bench.far.plan = ["lost"]
    await bench.fails(Unknown)
    await bench.write()
    assert await asked() == [], "sent once, it is there once"
    far = bench.far
    for name, wanted in (("v", True), ("u", False)):
        far.made, far.plan = [], ["never arrives", "lost"]
        for _ in range(2):
            with pytest.raises(Unknown):
                await bench.once.write(name, {}, send=far.send, find=far.find, about="s1")
        if wanted:
            await bench.once.write(name, {}, send=far.send, find=far.find, about="s1")
        else:
            await bench.once.look(name, find=far.find, about="s1")
    assert await asked() == ["v", "u"]
    async with bench.store.read() as tx:
        audits = await outbox.select(tx, states=["pending"], kind="audit_usage")
    assert {row["due_at"] for row in audits} == {bench.clock.now() + SETTLING + SECOND_LOOK}


class Lagging:
    """A site that ignores keys, whose list shows what was made only at the second look after it."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.looks = 0

    async def send(self, key: str, *, retried: bool) -> str:
        self.made.append(f"id-{len(self.made)}")
        if len(self.made) == 1:
            raise Unknown("no answer")
        return self.made[-1]

    async def find(self) -> str | None:
        self.looks += 1
        return self.made[0] if self.looks > 1 else None


async def test_a_site_that_ignores_keys_bills_twice_only_until_it_shows(bench: Bench) -> None:
    """The first retry that finds nothing (its list lags) is the price; after it, none is repeated."""
    for name, expected in (("a", 2), ("b", 1), ("c", 1)):
        far = Lagging()
        for _ in range(4):
            try:
                await bench.once.write(name, {}, send=far.send, find=far.find, about=name)
                break
            except Unknown:
                bench.far.doubt = "create" if len(far.made) == 1 else None
                bench.clock.advance(SETTLING)
        assert len(far.made) == expected, name


async def test_a_stored_failure_burns_the_key(bench: Bench) -> None:
    """The far side repeats its 500: the key can't help, so it is looked, settled, and sent anew at once."""
    bench.far.plan = ["broken"]
    await bench.fails(Unknown)
    bench.clock.advance(SECOND)
    await bench.fails(Unknown)
    assert (await bench.intent()).burnt
    error = await bench.fails(Unknown)
    assert error.retry_after == SETTLING
    await bench.settle()
    assert await bench.write() == "id-1"
    assert len(set(bench.keys())) == 2
    assert (await bench.intent()).state == "done"


@pytest.mark.parametrize(("fate", "error"), [("refused", Refused), ("no such thing", NotFound)])
async def test_a_clear_refusal_is_remembered_and_the_next_try_takes_a_new_key(
    bench: Bench, fate: str, error: type[Exception]
) -> None:
    """Repaired and tried again: under the old key the far side would repeat the refusal."""
    bench.far.plan = [fate]
    await bench.fails(error)
    assert (await bench.intent()).state == "refused"
    assert await bench.write() == "id-1"
    assert len(set(bench.keys())) == 2
    assert bench.far.looks == 0, "there is nothing to look for"


@pytest.mark.parametrize(("fate", "error"), [("try later", NotDone), ("locked out", Misconfigured)])
async def test_what_was_clearly_not_done_is_sent_anew(
    bench: Bench, fate: str, error: type[Exception]
) -> None:
    """A rate limit or a wrong key is no unknown outcome."""
    bench.far.plan = [fate]
    await bench.fails(error)
    assert (await bench.intent()).state == "refused"
    assert await bench.write() == "id-1"


@pytest.mark.parametrize("fate", ["try later", "locked out"])
async def test_not_done_on_a_second_try_proves_nothing_of_the_first(bench: Bench, fate: str) -> None:
    """The first request's outcome stays unknown, its key in use."""
    bench.far.plan = ["lost", fate]
    await bench.fails(Unknown)
    made, bench.far.made = bench.far.made, []  # the look lags
    await bench.fails(Retryable)
    assert (await bench.intent()).state == "open"
    bench.far.made = made
    assert await bench.write() == "id-1"
    assert len(bench.far.sent) == 2


async def test_a_refusal_on_a_second_try_is_unknown_until_it_has_settled(bench: Bench) -> None:
    """It may refuse because the first took effect: look, wait, look again; only then a new key."""
    bench.far.plan = ["never arrives", "refused"]
    await bench.fails(Unknown)
    error = await bench.fails(Unknown)
    assert error.retry_after == SETTLING
    assert (await bench.intent()).burnt
    await bench.settle()
    bench.far.plan = ["refused"]
    await bench.fails(Refused)
    assert (await bench.intent()).state == "refused"
    assert len(set(bench.keys())) == 2


async def test_a_changed_body_never_travels_under_the_old_key(bench: Bench) -> None:
    """While the outcome of the first is unknown nothing is sent; after it has settled, under a new key."""
    bench.far.plan = ["never arrives"]
    await bench.fails(Unknown, {"n": 1})
    await bench.fails(Unknown, {"n": 2})
    assert len(bench.far.sent) == 1
    await bench.settle({"n": 2})
    assert await bench.write({"n": 2}) == "id-1"
    assert len(set(bench.keys())) == 2


async def test_a_changed_body_of_something_made_already_finds_it(bench: Bench) -> None:
    """The look comes first, whatever the body."""
    bench.far.plan = ["lost"]
    await bench.fails(Unknown, {"n": 1})
    assert await bench.write({"n": 2}) == "id-1"
    assert len(bench.far.sent) == 1


@pytest.mark.parametrize("error", [Retryable("list is down"), Permanent("two of them")])
async def test_a_look_that_fails_is_not_not_found(bench: Bench, error: Exception) -> None:
    """Its error goes up, and nothing is sent."""
    bench.far.plan = ["never arrives"]
    await bench.fails(Unknown)
    bench.far.blind = error
    bench.clock.advance(2 * KEY_WINDOW)
    await bench.fails(type(error))
    assert len(bench.far.sent) == 1


async def test_a_bug_in_reading_the_answer_leaves_the_outcome_unknown(bench: Bench) -> None:
    """An exception nobody foresaw after the far side has done it: found by the next look."""
    bench.far.plan = ["bug"]
    await bench.fails(KeyError)
    assert (await bench.intent()).state == "open"
    assert await bench.write() == "id-1"
    assert len(bench.far.sent) == 1


async def test_what_follows_is_kept_in_the_transaction_that_says_done(bench: Bench) -> None:
    """When keeping fails, the write is not done either; the next try finds it and keeps it."""

    async def keep(tx: Tx, result: str) -> None:
        bench.kept.append(result)
        if len(bench.kept) == 1:
            raise Retryable("full")

    with pytest.raises(Retryable):
        await bench.write(keep=keep)
    assert (await bench.intent()).state == "open"
    assert await bench.write(keep=keep) == "id-1"
    assert bench.kept == ["id-1", "id-1"]
    assert len(bench.far.sent) == 1


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("point", ["find", "send before", "send after", "opened", "done"])
@pytest.mark.parametrize("later", [SECOND, 2 * FORGOTTEN], ids=["soon", "later"])
async def test_cut_off_anywhere_and_resumed_it_takes_effect_once(
    bench: Bench, point: str, later: timedelta
) -> None:
    """A task cancelled at any of its waits leaves something from which the next one ends right."""
    far, waiting = bench.far, asyncio.Event()
    send, find = far.send, far.find

    async def stop() -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def sending(key: str, *, retried: bool) -> str:
        if point == "send before":
            await stop()
        result = await send(key, retried=retried)
        if point == "send after":
            await stop()
        return result

    async def finding() -> str | None:
        if point == "find":
            await stop()
        return await find()

    async def keep(tx: Tx, result: str) -> None:
        if point == "done":
            await stop()

    async def opened_or_not() -> str:
        if point == "opened":
            async with bench.store.write() as tx:
                at = bench.clock.at
                await intents.opened(tx, "w", None, epoch=1, key="k", body_hash="h", first_sent_at=at, now=at)
            await stop()
        return await bench.once.write(
            "w", {"n": 1}, send=sending, find=finding, keep=keep, look_first=point == "find"
        )

    task = asyncio.create_task(opened_or_not())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.clock.advance(later)
    bench.restart()
    for _ in range(4):
        try:
            assert await bench.write() == "id-1"
            break
        except Unknown as error:
            bench.clock.advance(error.retry_after or SETTLING)
    assert far.made == ["id-1"]
    assert (await bench.intent()).state == "done"


async def test_what_is_no_longer_wanted_is_looked_for_and_never_sent(bench: Bench) -> None:
    """Its id when it took effect, None when it clearly did not, Unknown while it still may."""
    look = bench.once.look
    assert await look("w", find=bench.far.find) is None
    bench.far.plan = ["never arrives"]
    await bench.fails(Unknown)
    with pytest.raises(Unknown) as caught:
        await look("w", find=bench.far.find)
    assert caught.value.retry_after == SETTLING
    bench.clock.advance(SETTLING)
    with pytest.raises(Unknown) as caught:
        await look("w", find=bench.far.find)
    assert caught.value.retry_after == SECOND_LOOK
    bench.clock.advance(SECOND_LOOK)
    assert await look("w", find=bench.far.find) is None
    assert (await bench.intent()).state == "refused"
    bench.far.plan = ["lost"]
    await bench.fails(Unknown)
    assert await look("w", find=bench.far.find) == "id-1"
    bench.far.blind = Retryable("away")
    assert await look("w", find=bench.far.find) == "id-1", "known by now"
    assert len(bench.far.sent) == 2


async def test_who_was_overtaken_sends_nothing(store: Store, clock: ManualClock) -> None:
    """A worker looks, stalls past its lease, and goes on after another one has made the write."""
    far = FarSide(clock)
    once = an_once(store, clock, far)
    looking, go_on = asyncio.Event(), asyncio.Event()

    async def stalled() -> str | None:
        looking.set()
        await go_on.wait()
        return None

    async def nothing() -> str | None:
        return None

    late = asyncio.create_task(once.write("w", {"v": 1}, send=far.send, find=stalled, look_first=True))
    await looking.wait()
    made = await once.write("w", {"v": 2}, send=far.send, find=nothing, look_first=True)
    go_on.set()
    with pytest.raises(Retryable):
        await late
    assert far.made == [made]
    assert await once.write("w", {"v": 1}, send=far.send, find=nothing, look_first=True) == made


@pytest.mark.parametrize(
    ("verdict", "raised"), [(NotDone("429"), NotDone), (Refused("422"), Unknown), (NotFound("404"), Unknown)]
)
async def test_who_was_overtaken_while_sending_refuses_nothing(
    store: Store, clock: ManualClock, verdict: Exception, raised: type[Exception]
) -> None:
    """Its refusal comes after another worker has made the write and lost the answer: once all the same."""
    far = FarSide(clock)
    once = an_once(store, clock, far)
    sending, go_on = asyncio.Event(), asyncio.Event()

    async def stalled(key: str, *, retried: bool) -> str:
        sending.set()
        await go_on.wait()
        raise verdict

    async def nothing() -> str | None:
        return None

    late = asyncio.create_task(once.write("w", {"v": 1}, send=stalled, find=nothing))
    await sending.wait()
    clock.advance(SECOND)
    far.plan = ["lost"]
    with pytest.raises(Unknown):
        await once.write("w", {"v": 1}, send=far.send, find=nothing)
    go_on.set()
    with pytest.raises(raised):
        await late
    clock.advance(SETTLING)
    assert await once.write("w", {"v": 1}, send=far.send, find=far.find) == "id-1"
    assert far.made == ["id-1"]


async def test_a_clock_that_is_set_back_stops_no_write(store: Store, clock: ManualClock) -> None:
    """The time of the last try may not lie before that of the first."""
    far = FarSide(clock)
    once = an_once(store, clock, far)
    far.plan = ["never arrives"]

    async def find() -> str | None:
        return None

    with pytest.raises(Unknown):
        await once.write("w", {"v": 1}, send=far.send, find=find)
    clock.advance(-FORGOTTEN)
    assert await once.write("w", {"v": 1}, send=far.send, find=find) == "id-1"
    assert len({key for key, _ in far.sent}) == 1
