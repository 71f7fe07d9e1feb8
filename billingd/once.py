"""One write to Recurly that takes effect once, whatever crashes, repeats, or gets no answer."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from billingd.domain.errors import BillingdError, NotFound, Refused, Retryable, Settling, Unknown
from billingd.domain.events import audit_action
from billingd.domain.notices import provider_notice
from billingd.domain.sending import (
    SECOND_LOOK,
    Intent,
    Send,
    Settle,
    Trust,
    after_not_found,
    body_hash,
    idempotency_key,
)
from billingd.loops import Clock
from billingd.store import held, history, intents, outbox
from billingd.store.engine import Store, Tx
from billingd.store.held import Hold

log = structlog.get_logger()


class Sender(Protocol):
    """Sends the write under a key; `retried` when that key was sent before. Returns the far side's id."""

    def __call__(self, key: str, *, retried: bool) -> Awaitable[str]: ...


Finder = Callable[[], Awaitable[str | None]]
"""Looks whether the write took effect already; its id, or None. A look that fails raises."""

Keeper = Callable[[Tx, str], Awaitable[None]]
"""Writes down what follows from the write, in the transaction that says it is done."""


DOUBTED: Final = "idempotency_doubted"
IGNORED: Final = "idempotency_ignored"
KEYS: Final = "recurly:idempotency"
"""How the subject begins of the held items that say: keys are not relied on any more; the write follows."""


async def mistrust(tx: Tx) -> list[dict[str, Any]]:
    """The held items for which keys are not relied on: one of each doubted write, or the proof."""
    return [item for kind in (DOUBTED, IGNORED) for item in await held.standing(tx, kind=kind)]


class Once:
    """Remembers every write before it is sent, and looks before it sends again (recurly.md 5.7).

    `attempt` is how long one sending may take at most, waiting for its turn included. `doubt` tells, once,
    of a key that was sent again and not recognised: from then on only look-ups are believed.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        settling: timedelta,
        attempt: timedelta,
        doubt: Callable[[], str | None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._trust = Trust(settling, attempt)
        self._doubt = doubt
        self._ended: dict[str, tuple[int, float]] = {}
        """Of each write without an answer: how often it was sent, and when that was over at the latest, on a
        clock that nobody sets (`Clock.elapsed`)."""
        self._began = clock.elapsed()

    async def write(
        self,
        name: str,
        body: Mapping[str, Any],
        *,
        send: Sender,
        find: Finder,
        keep: Keeper | None = None,
        look_first: bool = False,
        about: str | None = None,
    ) -> str:
        """Make the write take effect once and return the far side's id for it.

        `about` is the Amplify subscription that would be charged twice if the write took effect twice. None
        where Recurly itself does it once: a code that is taken, a state that is reached, a value that is set.

        1. Done before: return its id.
        2. Sent before with no clear outcome, or `look_first`: look whether it is there already.
        3. Not there: the same key again while Recurly remembers it, else wait out the settling time and
           take a new key (`after_not_found`).
        4. Write down key and time, then send. A clear refusal is written down as such and raised; no clear
           answer leaves the intent open and raises Unknown.
        """
        async with self._store.read() as tx:
            intent = await intents.find(tx, name)
        if intent is not None and intent.state == "done":
            assert intent.result is not None
            return intent.result
        if look_first or (intent is not None and intent.state == "open"):
            found = await find()
            if found is not None:
                log.info("write.found", write=name, result=found)
                return await self._found(name, found, keep, body=body, seen=intent, about=about)
        return await self._send(name, body, intent, send, keep, about)

    async def look(self, name: str, *, find: Finder, about: str | None = None) -> str | None:
        """What became of a write that is no longer wanted: its id, or None when it never took effect.

        Nothing is sent; `about` is as in `write`. Raises Unknown while an earlier request may still take
        effect.
        """
        async with self._store.read() as tx:
            intent = await intents.find(tx, name)
        if intent is None or intent.state == "refused":
            return None
        if intent.state == "done":
            return intent.result
        found = await find()
        if found is None:
            await self._wait_out(intent)
            key = history.sent(intent).get("key")
            if not await self._refused(
                name, intent.sends, "looked up twice and not found", key=key, epoch=intent.epoch
            ):
                raise Retryable(f"{name}: another worker is writing it")
            return None
        async with self._store.write() as tx:
            await intents.done(tx, name, result=found)
            now = self._clock.now()
            await history.append(tx, name, "found", now=now, epoch=intent.epoch, result=found)
            await self._have_audited(tx, intent, about)
        self._ended.pop(name, None)
        return found

    async def _wait_out(self, intent: Intent) -> None:
        """Raise Unknown until two look-ups after the settling time found nothing; this was one of them."""
        now = self._clock.now()
        step = after_not_found(intent, now=now, trust=replace(self._trust, keys=False))
        await self._settle(intent, step, now)

    async def _settle(self, intent: Intent | None, step: Send | Settle, now: datetime) -> None:
        """Raise Unknown when nothing may be sent yet.

        The wall clock may have been set forward since the last sending: the settling time must have passed
        on a clock that nobody sets, too, and a look before that is none of the two.
        """
        until, looked = now, False
        if isinstance(step, Settle):
            until, looked = step.until, step.missed
        if intent is not None and (isinstance(step, Settle) or not step.again):
            left = self._settles_in(intent)
            until, looked = max(until, now + left), looked and left <= timedelta(0)
        if until > now:
            if looked and intent is not None:
                async with self._store.write() as tx:
                    await intents.missed(tx, intent.name, sends=intent.sends, now=now)
                    await history.append(tx, intent.name, "not_found", now=now, epoch=intent.epoch)
            name = "it" if intent is None else intent.name
            raise Settling(
                f"{name}: no clear outcome yet and not found; waiting out the settling time",
                # after a crash it may be long; meanwhile a look may well find it
                retry_after=min(until - now, max(self._trust.settling, SECOND_LOOK)),
            )

    def _settles_in(self, intent: Intent) -> timedelta:
        """How long its last sending may still take effect, whatever the wall clock says.

        What another process sent had ended on SQLite when this one began. Elsewhere nobody knows: it counts
        from when it is first seen here, and may still be under way then.
        """
        sends, ended = self._ended.get(intent.name, (0, 0.0))
        if sends != intent.sends:
            ended = self._began
            if not self._store.sqlite:
                running = timedelta(0) if intent.gave_up_at is not None else self._trust.attempt
                ended = self._clock.elapsed() + running.total_seconds()
            self._ended[intent.name] = intent.sends, ended
        return timedelta(seconds=ended - self._clock.elapsed()) + self._trust.settling

    async def _keys_heeded(self) -> bool:
        async with self._store.read() as tx:
            return not await mistrust(tx)

    async def _send(
        self,
        name: str,
        body: Mapping[str, Any],
        intent: Intent | None,
        send: Sender,
        keep: Keeper | None,
        about: str | None,
    ) -> str:
        trust = self._trust
        if intent is not None and intent.state == "open":
            trust = replace(trust, keys=await self._keys_heeded())
        now = self._clock.now()
        step = after_not_found(intent, now=now, trust=trust)
        await self._settle(intent if intent is not None and intent.state == "open" else None, step, now)
        assert isinstance(step, Send)
        digest = body_hash(body)
        if step.again and intent is not None and intent.body_hash != digest:
            # the key stands for another body, so that only a look-up can tell now
            async with self._store.write() as tx:
                await intents.gave_up(tx, name, sends=intent.sends, burnt=True, now=now)
                await history.append(tx, name, "body_changed", now=now, epoch=intent.epoch)
            raise Unknown(
                f"{name}: its body changed while its outcome is unknown", retry_after=trust.settling
            )
        key = idempotency_key(name, step.epoch, digest)
        first_sent_at = intent.first_sent_at if intent is not None and step.again else now
        sends = 1 if intent is None else intent.sends + 1
        async with self._store.write() as tx:
            ours = await intents.opened(
                tx,
                name,
                intent,
                epoch=step.epoch,
                key=key,
                body_hash=digest,
                first_sent_at=first_sent_at,
                now=max(now, first_sent_at),  # the clock may have been set back
            )
        if not ours:
            raise Retryable(f"{name}: another worker is writing it; nothing was sent from here")
        self._ended[name] = sends, self._clock.elapsed() + trust.attempt.total_seconds()  # at the latest
        try:
            result = await send(key, retried=step.again)
        except Unknown as error:
            await self._unanswered(name, sends, key, step.epoch, error, burnt=error.replayed)
            raise
        except (Refused, NotFound) as error:
            if not step.again and await self._refused(name, sends, str(error), key=key, epoch=step.epoch):
                raise
            # Another request under this key had no clear outcome, so a refusal now proves nothing of it.
            await self._unanswered(name, sends, key, step.epoch, error, burnt=True)
            raise Unknown(f"{name}: refused on a second try ({error})", retry_after=trust.settling) from error
        except BillingdError as error:
            if not step.again:
                await self._refused(name, sends, str(error), key=key, epoch=step.epoch)
            else:
                await self._unanswered(name, sends, key, step.epoch, error, burnt=False)
            raise
        doubt = self._doubt()  # before anything else runs: it is this answer's
        async with self._store.write() as tx:
            if doubt is not None and about is not None:
                await self._heed_doubt(tx, doubt, name, about)
            return await self._done(tx, name, result, keep)

    async def _heed_doubt(self, tx: Tx, operation: str, name: str, about: str) -> None:
        """Rely on look-ups only from now on, when a key was sent again and Recurly did not know it.

        Most likely its first request never arrived. But a site that ignores keys looks the same, and there
        the next key sent again would bill twice. Each write has an item of its own, for an audit that did not
        see one says nothing of it; a later doubt of the same one takes the place of the earlier. Of a write
        that cannot take effect twice there is no doubt, and no audit that could end it.
        """
        now = self._clock.now()
        subject = f"{KEYS}:{name}"
        reason = (
            f"Recurly answered a repeated Idempotency-Key without Idempotency-Prior ({operation}): either "
            "the first request never arrived, or the site ignores keys. Until an audit has found each record "
            "once, or you release this and every other such doubt, unanswered writes wait out the settling "
            "time and are looked up, never repeated under their key."
        )
        standing = await mistrust(tx)
        if not any(item["kind"] == IGNORED for item in standing):
            await held.close(tx, subject=subject, resolution="doubted again", now=now)
            await held.add(tx, Hold(DOUBTED, subject, reason, subscription_id=about), now=now)
            log.warning("recurly.keys_doubted", operation=operation)
        if not standing:
            notice = provider_notice(
                f"{DOUBTED}:{now.isoformat()}", "Recurly may ignore idempotency keys", reason
            )
            await outbox.insert(tx, [notice], now=now)
        audit = audit_action(about, because=f"doubt:{now.isoformat()}")
        await outbox.insert(tx, [audit], now=now, due_at=now + self._trust.settling + SECOND_LOOK)

    async def _have_audited(self, tx: Tx, seen: Intent, about: str | None) -> None:
        """Have one found that was sent more than once without a word of its key: it may be there twice."""
        if about is None or seen.state != "open" or seen.sends < 2:
            return
        now = self._clock.now()
        audit = audit_action(about, because=f"found:{seen.name}:{seen.sends}", write=seen.name)
        await outbox.insert(tx, [audit], now=now, due_at=now + self._trust.settling + SECOND_LOOK)

    async def _found(
        self,
        name: str,
        result: str,
        keep: Keeper | None,
        *,
        body: Mapping[str, Any],
        seen: Intent | None,
        about: str | None,
    ) -> str:
        """It was there already; write down that it is done, also when it was never sent from here."""
        now = self._clock.now()
        async with self._store.write() as tx:
            await history.append(tx, name, "found", now=now, result=result)
            if seen is not None:
                await self._have_audited(tx, seen, about)
            else:  # it has no body of ours
                key = idempotency_key(name, 1, body_hash(body))
                await intents.opened(
                    tx, name, None, epoch=1, key=key, body_hash="", first_sent_at=now, now=now
                )
            return await self._done(tx, name, result, keep)

    async def _done(self, tx: Tx, name: str, result: str, keep: Keeper | None) -> str:
        await intents.done(tx, name, result=result)
        if keep is not None:
            await keep(tx, result)
        self._ended.pop(name, None)
        return result

    async def _unanswered(
        self, name: str, sends: int, key: str, epoch: int, error: BillingdError, *, burnt: bool
    ) -> None:
        """Write down that nobody knows what became of it, and since when."""
        self._ended[name] = sends, self._clock.elapsed()
        now = self._clock.now()
        async with self._store.write() as tx:
            await intents.gave_up(tx, name, sends=sends, burnt=burnt, now=now)
            await history.append(tx, name, "unanswered", now=now, key=key, epoch=epoch, error=str(error))

    async def _refused(self, name: str, sends: int, why: str, *, key: str | None, epoch: int) -> bool:
        """Write down that it was clearly not done; False when another worker sent it since."""
        now = self._clock.now()
        async with self._store.write() as tx:
            refused = await intents.refused(tx, name, sends=sends)
            if refused:
                await history.append(tx, name, "refused", now=now, key=key, epoch=epoch, error=why)
        if refused:
            self._ended.pop(name, None)
        return refused
