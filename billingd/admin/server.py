"""The admin listener: health, status, metrics, the page, and the few acts an operator may do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, Protocol

import structlog
from aiohttp import web

from billingd.admin import operations, status
from billingd.admin.explain import RECORDS_SHOWN, explain
from billingd.admin.figures import Figures
from billingd.admin.guard import guard, protect
from billingd.admin.metrics import Metrics
from billingd.admin.operations import NotForWritingOff, Selection
from billingd.admin.overview import Seen, Where
from billingd.admin.page import Page
from billingd.domain.attempts import State
from billingd.domain.errors import BillingdError, Misconfigured, NotFound, Retryable
from billingd.loops import Clock, Progress
from billingd.store import held, outbox, usage, watermarks
from billingd.store.engine import Store

log = structlog.get_logger()

REACHED_LATELY: Final = timedelta(minutes=3)
LIST_MAX: Final = 1_000
WAITING: Final = "; `billingd outbox list` shows what waits"
STANDING: Final = "; `billingd held list` shows those there are"


class FarSide(Protocol):
    """What readiness asks of an adapter."""

    @property
    def last_reached_at(self) -> datetime | None: ...
    @property
    def last_error(self) -> str | None: ...


class Poller(Protocol):
    """What the traffic commands ask of the poller."""

    async def run_once(self) -> bool: ...
    async def read_range(
        self, since: datetime, until: datetime, *, subscription: str | None = None
    ) -> int: ...


class Resync(Protocol):
    """What the resync command asks for."""

    async def told(self, *, dry_run: bool) -> dict[str, Any]: ...


class Adoption(Protocol):
    """What the adopt command asks for."""

    async def told(self, since: datetime, *, dry_run: bool) -> dict[str, Any]: ...


class Reconciler(Protocol):
    """What the reconcile command asks for."""

    async def start(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        subscription: str | None = None,
        repair: bool = False,
    ) -> int: ...
    async def document(self, run_id: int) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Parts:
    """What the admin listener looks at and works on."""

    store: Store
    clock: Clock
    progress: Progress
    metrics: Metrics
    poller: Poller
    sides: dict[str, FarSide]
    source: str
    webhooks: Callable[[], dict[str, int]]
    wake_outbox: Callable[[], None]
    resync: Resync
    reconciler: Reconciler
    adoption: Adoption
    watched: Callable[[], status.Watched] = status.Watched
    reading_back: Callable[[], str | None] = lambda: None
    usual_lag: timedelta = timedelta(hours=4)
    """How far behind the watermark is right before a poll that works."""


@cache
def _page() -> Page:
    """The page, compiled when it is first asked for: that takes longer than all else at a start."""
    return Page()


class AdminListener:
    """The aiohttp application behind `admin.listen`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._figures = Figures(parts.store, parts.source)

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=65_536, middlewares=[guard, _answer])
        application.on_response_prepare.append(protect)
        application.router.add_routes(
            [
                web.get("/", self._show),
                web.get("/icon.svg", self._icon),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/outbox", self._list),
                web.get("/outbox/{id:[0-9]+}", self._one),
                web.post("/outbox/replay", self._replay),
                web.post("/outbox/{id:[0-9]+}/retry", self._retry),
                web.post("/outbox/{id:[0-9]+}/discard", self._discard),
                web.get("/subscriptions", self._subscriptions),
                web.get("/explain", self._explain),
                web.get("/held", self._held),
                web.post("/held/{id:[0-9]+}/release", self._release),
                web.post("/held/{id:[0-9]+}/write-off", self._write_off),
                web.get("/traffic/windows", self._windows),
                web.post("/resync", self._resync),
                web.post("/reconcile", self._reconcile),
                web.get("/reconcile/{id:[0-9]+}", self._reconciliation),
                web.post("/adopt", self._adopt),
                web.post("/traffic/poll", self._poll),
                web.post("/traffic/backfill", self._backfill),
            ]
        )
        return application

    def _reasons(self) -> list[str]:
        """Why the daemon is not ready, as far as the far sides and the latest write go."""
        now = self._parts.clock.now()
        reasons = []
        for name, side in self._parts.sides.items():
            if not self._lately(side, now):
                reasons.append(f"{name} was not reached lately: {side.last_error or 'no call yet'}")
        if (waits := self._parts.reading_back()) is not None:
            reasons.append(waits)
        if self._parts.store.write_error is not None:
            reasons.append(f"the latest write failed: {self._parts.store.write_error}")
        return reasons

    @staticmethod
    def _lately(side: FarSide, now: datetime) -> bool:
        at = side.last_reached_at
        return at is not None and now - at <= REACHED_LATELY and side.last_error is None

    async def _document(self) -> dict[str, Any]:
        parts = self._parts
        return await status.read(
            parts.store,
            source=parts.source,
            now=parts.clock.now(),
            reasons=self._reasons(),
            webhooks=parts.webhooks(),
            watched=parts.watched(),
        )

    async def _healthz(self, _request: web.Request) -> web.Response:
        now = self._parts.clock.now()
        stuck = self._parts.progress.stuck(now)
        loops = {
            name: {"turned_seconds_ago": round(age, 1), "may_take_seconds": round(patience, 1)}
            for name, (age, patience) in self._parts.progress.ages(now).items()
        }
        answer = {"healthy": not stuck, "stuck": stuck, "loops": loops}
        return web.json_response(answer, status=503 if stuck else 200)

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._reasons()
        try:
            async with self._parts.store.read() as tx:
                await watermarks.find(tx, self._parts.source)
        except BillingdError as error:
            reasons.append(str(error))
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._document())

    async def _metrics(self, _request: web.Request) -> web.Response:
        parts, now = self._parts, self._parts.clock.now()
        try:
            figures = await self._figures.read(now)
        except BillingdError:  # what the process knows of itself is told all the same: alerts are made of it
            figures = None
        loops = parts.progress.ages(now)
        overdue = sum(age > patience for age, patience in loops.values())
        for name, side in parts.sides.items():
            parts.metrics.reached(name.lower(), reached=self._lately(side, now))
        parts.metrics.seen(
            ready=figures is not None and not self._reasons(),
            writable=figures is not None and parts.store.write_error is None,
            loops=loops,
            hung=len(parts.progress.stuck(now)) - overdue,
        )
        text = parts.metrics.render(figures)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _show(self, request: web.Request) -> web.Response:
        parts, query = self._parts, request.query
        now = parts.clock.now()
        seen = Seen(
            now=now,
            source=parts.source,
            reasons=self._reasons(),
            stuck=parts.progress.stuck(now),
            watched=parts.watched(),
            usual_lag=parts.usual_lag,
        )
        where = Where(
            dead_after=_number(query.get("dead_after") or "0", "dead_after", at_most=2**62),
            held_after=_number(query.get("held_after") or "0", "held_after", at_most=2**62),
            after=query.get("after", ""),
        )
        html = await _page().render(parts.store, seen, where)
        policy = {"Content-Security-Policy": _page().policy}
        return web.Response(text=html, content_type="text/html", headers=policy)

    async def _icon(self, _request: web.Request) -> web.Response:
        return web.Response(text=_page().icon, content_type="image/svg+xml")

    async def _list(self, request: web.Request) -> web.Response:
        query = request.query
        states = tuple(query.getall("state", ()))
        unknown = [state for state in states if state not in set(State)]
        if unknown:
            raise _bad_request(f"state: {unknown[0]!r} is none of {', '.join(State)}")
        selection = Selection(
            kind=query.get("kind"), subject=query.get("subject"), cause=query.get("cause"), states=states
        )
        limit = _number(query.get("limit", "100"), "limit", at_most=LIST_MAX)
        rows = await operations.selected(self._parts.store, selection, limit=limit)
        return web.json_response({"actions": [status.action_item(row) for row in rows]})

    async def _one(self, request: web.Request) -> web.Response:
        async with self._parts.store.read() as tx:
            row = await outbox.find(tx, _id(request))
        if row is None:
            raise _not_found("action", _id(request))
        return web.json_response(status.action_item(row))

    async def _replay(self, request: web.Request) -> web.Response:
        body = await _body(request)
        chosen = body.get("ids")
        if chosen is not None and not (isinstance(chosen, list) and all(type(one) is int for one in chosen)):
            raise _bad_request("ids: must be a list of numbers")
        ids_ = None if chosen is None else tuple(chosen)
        kind, subject, cause = (_optional_text(body, name) for name in ("kind", "subject", "cause"))
        selection = Selection(ids=ids_, kind=kind, subject=subject, cause=cause)
        ids = await operations.replay(self._parts.store, selection, now=self._parts.clock.now())
        self._parts.wake_outbox()
        log.info("outbox.replayed", actions=len(ids))
        return web.json_response({"replayed": ids})

    async def _retry(self, request: web.Request) -> web.Response:
        if not await operations.retry(self._parts.store, _id(request), now=self._parts.clock.now()):
            raise _not_found("dead or pending action", _id(request), WAITING)
        self._parts.wake_outbox()
        log.info("outbox.retried", action=_id(request))
        return web.json_response({"retried": _id(request)})

    async def _discard(self, request: web.Request) -> web.Response:
        reason = _reason(await _body(request), "why this action is given up")
        now = self._parts.clock.now()
        if not await operations.discard(self._parts.store, _id(request), reason=reason, now=now):
            raise _not_found("dead or pending action", _id(request), WAITING)
        log.info("outbox.discarded", action=_id(request), reason=reason)
        return web.json_response({"discarded": _id(request)})

    async def _subscriptions(self, _request: web.Request) -> web.Response:
        rows = await status.subscriptions(self._parts.store, now=self._parts.clock.now())
        return web.json_response({"subscriptions": rows})

    async def _explain(self, request: web.Request) -> web.Response:
        about = request.query.get("about", "")
        records = _number(request.query.get("records", str(RECORDS_SHOWN)), "records", at_most=10_000)
        now = self._parts.clock.now()
        return web.json_response(await explain(self._parts.store, about, now=now, records=records))

    async def _held(self, _request: web.Request) -> web.Response:
        async with self._parts.store.read() as tx:
            items = await held.standing(tx)
        return web.json_response({"held": [status.held_item(item) for item in items]})

    async def _release(self, request: web.Request) -> web.Response:
        if not await operations.release(self._parts.store, _id(request), now=self._parts.clock.now()):
            raise _not_found("held item", _id(request), STANDING)
        self._parts.wake_outbox()
        log.info("held.released", held=_id(request))
        return web.json_response({"released": _id(request)})

    async def _write_off(self, request: web.Request) -> web.Response:
        reason = _reason(await _body(request), "why this is written off")
        try:
            found = await operations.write_off(
                self._parts.store, _id(request), reason=reason, now=self._parts.clock.now()
            )
        except NotForWritingOff as error:
            raise _http(web.HTTPConflict, "conflict", str(error)) from None
        if not found:
            raise _not_found("held item", _id(request), STANDING)
        log.info("held.written_off", held=_id(request), reason=reason)
        return web.json_response({"written_off": _id(request)})

    async def _windows(self, request: web.Request) -> web.Response:
        limit = _number(request.query.get("limit", "48"), "limit", at_most=LIST_MAX)
        async with self._parts.store.read() as tx:
            mark = await watermarks.find(tx, self._parts.source)
            rows = await usage.by_window(tx, limit=limit)
        return web.json_response(
            {
                "source": self._parts.source,
                "watermark": None if mark is None else status.timestamp(mark.at),
                "windows": [{name: status.plain(value) for name, value in row.items()} for row in rows],
            }
        )

    async def _resync(self, request: web.Request) -> web.Response:
        dry_run = (await _body(request)).get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise _bad_request("dry_run: must be true or false")
        return web.json_response(await self._parts.resync.told(dry_run=dry_run))

    async def _adopt(self, request: web.Request) -> web.Response:
        body = await _body(request)
        dry_run = body.get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise _bad_request("dry_run: must be true or false")
        since = _time(body.get("since"), "since")
        return web.json_response(await self._parts.adoption.told(since, dry_run=dry_run))

    async def _poll(self, _request: web.Request) -> web.Response:
        await self._parts.poller.run_once()
        return web.json_response({"polled": True})

    async def _reconcile(self, request: web.Request) -> web.Response:
        body = await _body(request)
        since, until = (
            None if body.get(name) is None else _time(body[name], name) for name in ("since", "until")
        )
        if since is not None and until is not None and until <= since:
            raise _bad_request("until: must be later than since")
        repair = body.get("repair", False)
        if not isinstance(repair, bool):
            raise _bad_request("repair: must be true or false")
        run = await self._parts.reconciler.start(
            since=since, until=until, subscription=_optional_text(body, "subscription"), repair=repair
        )
        return web.json_response({"id": run})

    async def _reconciliation(self, request: web.Request) -> web.Response:
        found = await self._parts.reconciler.document(_id(request))
        if found is None:
            raise _not_found("reconciliation", _id(request))
        return web.json_response(found)

    async def _backfill(self, request: web.Request) -> web.Response:
        body = await _body(request)
        since, until = _time(body.get("since"), "since"), _time(body.get("until"), "until")
        if until <= since:
            raise _bad_request("until: must be later than since")
        subscription = _optional_text(body, "subscription")
        booked = await self._parts.poller.read_range(since, until, subscription=subscription)
        return web.json_response({"booked_units": booked})


@web.middleware
async def _answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400 or error.content_type == "application/json":
            raise
        code = (error.reason or "error").lower().replace(" ", "_")
        return _error(error.status, code, f"{request.method} {request.path}: {error.reason}")
    except Misconfigured as error:  # a far side that is there, and refuses us: not to be tried again as it is
        return _error(500, "failed", str(error))
    except Retryable as error:
        return _error(503, "unavailable", str(error))
    except NotFound as error:
        return _error(404, "not_found", str(error))
    except BillingdError as error:
        return _error(500, "failed", str(error))
    except Exception:  # a bug: said here, for aiohttp's own log also has every broken request of anybody
        log.exception("admin.failed", path=request.path)
        return _error(500, "failed", "a fault of billingd's own; its log has it")


def _error(status_: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status_)


def _bad_request(message: str) -> web.HTTPException:
    return _http(web.HTTPBadRequest, "bad_request", message)


def _not_found(what: str, number: int, look: str = "") -> web.HTTPException:
    return _http(web.HTTPNotFound, "not_found", f"there is no {what} {number}{look}")


def _http(kind: type[web.HTTPException], code: str, message: str) -> web.HTTPException:
    response = _error(400, code, message)
    return kind(text=response.text, content_type="application/json")


async def _body(request: web.Request) -> dict[str, Any]:
    if not request.can_read_body:
        return {}
    try:
        body = await request.json()
    except ValueError:
        raise _bad_request("the body is not JSON") from None
    if not isinstance(body, dict):
        raise _bad_request("the body must be a JSON object")
    return body


def _reason(body: dict[str, Any], what: str) -> str:
    reason = body.get("reason")
    if not isinstance(reason, str) or not reason.strip():
        raise _bad_request(f"reason: say in a few words {what}")
    return reason


def _optional_text(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad_request(f"{name}: must be a text")
    return value


def _id(request: web.Request) -> int:
    return _number(request.match_info["id"], "id", at_most=2**62)


def _number(text: str, name: str, *, at_most: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > at_most:
        raise _bad_request(f"{name}: must be a whole number up to {at_most}")
    return int(text)


def _time(value: Any, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _bad_request(f"{name}: must be an RFC 3339 time, as in 2026-11-22T10:00:00Z") from None
    if moment.tzinfo is None:
        raise _bad_request(f"{name}: must name its zone, as in 2026-11-22T10:00:00Z")
    return moment
