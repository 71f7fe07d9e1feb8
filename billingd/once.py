"""One write to Recurly that takes effect once, whatever crashes, repeats, or gets no answer."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol

import structlog

from billingd.domain.errors import BillingdError, NotFound, Refused, Retryable, Unknown
from billingd.domain.sending import Intent, Settle, after_not_found, body_hash, idempotency_key
from billingd.loops import Clock
from billingd.store import intents
from billingd.store.engine import Store, Tx

log = structlog.get_logger()


class Sender(Protocol):
    """Sends the write under a key; `retried` when that key was sent before. Returns the far side's id."""

    def __call__(self, key: str, *, retried: bool) -> Awaitable[str]: ...


Finder = Callable[[], Awaitable[str | None]]
"""Looks whether the write took effect already; its id, or None. A look that fails raises."""

Keeper = Callable[[Tx, str], Awaitable[None]]
"""Writes down what follows from the write, in the transaction that says it is done."""


class Once:
    """Remembers every write before it is sent, and looks before it sends again (recurly.md 5.7)."""

    def __init__(self, store: Store, clock: Clock, *, settling: timedelta) -> None:
        self._store = store
        self._clock = clock
        self._settling = settling

    async def write(
        self,
        name: str,
        body: Mapping[str, Any],
        *,
        send: Sender,
        find: Finder,
        keep: Keeper | None = None,
        look_first: bool = False,
    ) -> str:
        """Make the write take effect once and return the far side's id for it.

        1. Done before: return its id.
        2. Sent before with no clear outcome, or `look_first`: look whether it is there already.
        3. Not there: the same key again while Recurly remembers it, else wait out the settling time and
           take a new key.
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
                return await self._found(name, found, keep, body=body, sent=intent is not None)
        return await self._send(name, body, intent, send, keep)

    async def unknown(self, name: str) -> bool:
        """Whether the write was sent and nobody knows what became of it."""
        async with self._store.read() as tx:
            intent = await intents.find(tx, name)
        return intent is not None and intent.state == "open"

    async def look(self, name: str, *, find: Finder) -> str | None:
        """What became of a write that is no longer wanted: its id, or None when it never took effect.

        Nothing is sent. Raises Unknown while an earlier request may still take effect.
        """
        async with self._store.read() as tx:
            intent = await intents.find(tx, name)
        if intent is None or intent.state == "refused":
            return None
        if intent.state == "done":
            return intent.result
        found = await find()
        if found is None:
            settled_at = intent.last_sent_at + self._settling
            if (now := self._clock.now()) < settled_at:
                raise Unknown(f"{name}: no clear outcome yet and not found", retry_after=settled_at - now)
            if not await self._refused(name, intent.epoch, intent.last_sent_at):
                raise Retryable(f"{name}: another worker is writing it")
            return None
        async with self._store.write() as tx:
            await intents.done(tx, name, result=found)
        return found

    async def _send(
        self, name: str, body: Mapping[str, Any], intent: Intent | None, send: Sender, keep: Keeper | None
    ) -> str:
        now = self._clock.now()
        step = after_not_found(intent, now=now, settling=self._settling)
        if isinstance(step, Settle):
            raise Unknown(
                f"{name}: no clear outcome yet and not found; waiting out the settling time",
                retry_after=step.until - now,
            )
        digest = body_hash(body)
        if step.again and intent is not None and intent.body_hash != digest:
            await self._burn(name)  # the key stands for another body, so that only a look-up can tell now
            raise Unknown(
                f"{name}: its body changed while its outcome is unknown", retry_after=self._settling
            )
        key = idempotency_key(name, step.epoch, digest)
        first_sent_at = intent.first_sent_at if intent is not None and step.again else now
        sent_at = max(now, first_sent_at)  # the clock may have been set back
        async with self._store.write() as tx:
            ours = await intents.opened(
                tx,
                name,
                intent,
                epoch=step.epoch,
                key=key,
                body_hash=digest,
                first_sent_at=first_sent_at,
                now=sent_at,
            )
        if not ours:
            raise Retryable(f"{name}: another worker is writing it; nothing was sent from here")
        try:
            result = await send(key, retried=step.again)
        except Unknown as error:
            if error.replayed:
                await self._burn(name)
            raise
        except (Refused, NotFound) as error:
            if not step.again and await self._refused(name, step.epoch, sent_at):
                raise
            # Another request under this key had no clear outcome, so a refusal now proves nothing of it.
            await self._burn(name)
            raise Unknown(f"{name}: refused on a second try ({error})", retry_after=self._settling) from error
        except BillingdError:
            if not step.again:
                await self._refused(name, step.epoch, sent_at)
            raise
        async with self._store.write() as tx:
            return await self._done(tx, name, result, keep)

    async def _found(
        self, name: str, result: str, keep: Keeper | None, *, body: Mapping[str, Any], sent: bool
    ) -> str:
        """It was there already; write down that it is done, also when it was never sent from here."""
        async with self._store.write() as tx:
            if not sent:
                now = self._clock.now()
                digest = body_hash(body)
                key = idempotency_key(name, 1, digest)
                await intents.opened(
                    tx, name, None, epoch=1, key=key, body_hash=digest, first_sent_at=now, now=now
                )
            return await self._done(tx, name, result, keep)

    @staticmethod
    async def _done(tx: Tx, name: str, result: str, keep: Keeper | None) -> str:
        await intents.done(tx, name, result=result)
        if keep is not None:
            await keep(tx, result)
        return result

    async def _burn(self, name: str) -> None:
        async with self._store.write() as tx:
            await intents.burn(tx, name)

    async def _refused(self, name: str, epoch: int, sent_at: datetime) -> bool:
        """Write down that it was clearly not done; False when another worker sent it since."""
        async with self._store.write() as tx:
            return await intents.refused(tx, name, epoch=epoch, last_sent_at=sent_at)
