"""Both far sides and the control interface on one loopback port."""

import asyncio
import contextlib
import ipaddress
import signal
import sys
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from billingd.sandbox import control
from billingd.sandbox.amplify.errors import errors_body
from billingd.sandbox.amplify.hooks import Hook, Webhooks
from billingd.sandbox.amplify.routes import PREFIXES
from billingd.sandbox.amplify.routes import routes as amplify_routes
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.asked import Wrong
from billingd.sandbox.clock import SandboxClock, dating
from billingd.sandbox.faults import Faults
from billingd.sandbox.recurly.hooks import Notifier
from billingd.sandbox.recurly.routes import routes as recurly_routes
from billingd.sandbox.recurly.site import Site
from billingd.sandbox.world import World

WORLD: Final = web.AppKey("world", World)
BODY_BYTES_MAX: Final = 64 * 1024 * 1024
DRAIN_SECONDS: Final = 2.0
TICK_SECONDS: Final = 0.2
WEBHOOK_URL: Final = "http://127.0.0.1:8080/webhooks/amplify"
WEBHOOK_SECRET: Final = "sandbox-webhook-secret"  # noqa: S105 - of the sandbox's own making
API_KEY: Final = "sandbox-api-key"


def side_of(request: web.Request) -> str | None:
    """amplify | recurly | None for the control interface."""
    if request.path == "/control" or request.path.startswith("/control/"):
        return None
    return "amplify" if request.path.startswith(PREFIXES) else "recurly"


def build(
    *,
    clock: SandboxClock | None = None,
    webhook_url: str | None = None,
    webhook_secret: str = WEBHOOK_SECRET,
    watch_topic: str | None = "billingd",
    ticking: bool = False,
) -> web.Application:
    """The whole sandbox as an application; `app[WORLD]` is what it is made of.

    `ticking`: bills, late requests and Recurly's webhooks follow the clock without being asked for.
    """
    clock = clock or SandboxClock()
    tenant = Tenant(clock)
    webhooks = Webhooks(tenant)
    site = Site(clock)
    world = World(clock, tenant, webhooks, site, Faults(clock), Notifier(site))
    if webhook_url:
        webhooks.add(Hook(webhook_url, {"Authorization": webhook_secret}))
    app = web.Application(
        client_max_size=BODY_BYTES_MAX,
        middlewares=[_counting(world), world.faults.middleware(side_of)],
    )
    app[WORLD] = world
    app.add_routes(amplify_routes(tenant))
    app.add_routes(control.routes(world))
    app.add_routes(_strays(world))
    app.add_routes(recurly_routes(world.site))
    if watch_topic:
        tenant.create("WatchTopic", _topic(watch_topic))

    async def background(_: web.Application) -> AsyncIterator[None]:
        ticker = asyncio.create_task(_tick(world)) if ticking else None
        yield
        if ticker is not None:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker
        await world.faults.close()
        await world.notifier.close()
        await webhooks.close()

    app.cleanup_ctx.append(background)
    app.on_response_prepare.append(dating(clock))
    return app


async def _tick(world: World) -> None:
    while True:
        await world.faults.carry_out_due()
        await world.notifier.run_due()
        await asyncio.sleep(TICK_SECONDS)


async def serve(listen: str, *, webhook_url: str = WEBHOOK_URL, webhook_secret: str = WEBHOOK_SECRET) -> None:
    """Serves until SIGINT, SIGTERM or POST /control/shutdown; prints the configuration for billingd first."""
    host, port = _loopback(listen)
    app = build(webhook_url=webhook_url, webhook_secret=webhook_secret, ticking=True)
    world = app[WORLD]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound = int(runner.addresses[0][1])
        base = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, world.stop.set)
        sys.stdout.write(configuration(world, base, webhook_url, webhook_secret))
        sys.stdout.flush()
        await world.stop.wait()
    finally:
        await runner.cleanup()


def configuration(world: World, base: str, webhook_url: str, webhook_secret: str) -> str:
    """A TOML file for billingd; secrets may not stand in it and follow as comments (contract.md 3)."""
    tenant, hook = world.tenant, urlsplit(webhook_url)
    return f"""\
# billingd's sandbox at {base}; what it can do: curl {base}/control
[amplify]
central_url = "{base}"
login_url = "{base}/auth"
platform_url = "{base}"
organization_id = "{tenant.organization_id}"
client_id = "{tenant.tokens.client_id}"

[recurly]
base_url = "{base}"

[webhooks]
listen = "{hook.hostname}:{hook.port or 80}"
auth = "header:Authorization"

[store]                     # in the folder that billingd is started from
url = "sqlite+aiosqlite:///billingd-sandbox.db"

[traffic]                   # to rehearse without waiting for hours
window = "2s"
settle = "1s"
schedule = "1s"

[outbox]
backoff = "200ms"
backoff_max = "2s"

[notifications]             # read them with: curl {base}/control/mailbox
provider = ["json://{base.removeprefix("http://")}/control/mailbox"]

# the secrets, for the shell that starts billingd:
# export BILLINGD_AMPLIFY__CLIENT_SECRET='{tenant.tokens.client_secret}'
# export BILLINGD_RECURLY__API_KEY='{API_KEY}'
# export BILLINGD_WEBHOOKS__SECRET='{webhook_secret}'
"""


def _loopback(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    host = host.strip("[]")
    if not colon or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"'{listen}' is not HOST:PORT, e.g. 127.0.0.1:8010 (port 0: any free one)")
    if host == "localhost":
        return "127.0.0.1", int(port)
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ValueError(f"the sandbox listens on loopback only; '{host}' is not, use 127.0.0.1")
    return host, int(port)


def _topic(name: str) -> dict[str, object]:
    """One such as `hooks apply` makes, its mark too: who rehearses that finds it done, and can remove it."""
    every = ["created", "updated", "deleted"]
    below = {"kind": "ProductPlan", "name": "*"}
    plain = [
        {"group": "catalog", "kind": kind, "name": "*", "type": every}
        for kind in ("Product", "ProductPlan", "Subscription")
    ]
    quotas = {"group": "catalog", "kind": "Quota", "name": "*", "type": every, "scope": below}
    spec = {"description": "What billingd reads to find events it missed", "filters": [*plain, quotas]}
    return {"name": name, "title": name, "attributes": {"billingd": "hooks"}, "spec": spec}


def _counting(world: World) -> Middleware:
    @web.middleware
    async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
        side = side_of(request)
        try:
            return await handler(request)
        finally:
            if side is not None:
                resource = request.match_info.route.resource
                path = request.get("endpoint") or (resource.canonical if resource else "elsewhere")
                world.calls[f"{side} {request.method} {path}"] += 1

    return counted


def _strays(world: World) -> list[web.RouteDef]:
    """Paths nobody serves, in each interface's own words; Recurly words its own."""

    async def amplify(request: web.Request) -> web.Response:
        body = errors_body(404, "Unable to find resource", world.tenant.organization_id)
        return web.json_response(body, status=404)

    async def controls(request: web.Request) -> web.Response:
        told = f"there is no {request.method} {request.path}"
        wrong = Wrong("", told, "GET /control lists what there is", status=404)
        return web.json_response(wrong.body, status=404)

    found = [web.route("*", f"{prefix}{{tail:.*}}", amplify) for prefix in PREFIXES]
    return [*found, web.route("*", "/control{tail:.*}", controls)]
