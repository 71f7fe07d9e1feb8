"""Who may ask the admin listener: whoever is on this machine, and no web page from anywhere else.

A browser on this machine can be made to send requests here by any page it shows. So a request must name a
host that is this machine (else it is a name that was pointed here: DNS rebinding), must not come from
another origin, and whatever changes something must have what a form or an image cannot send. It is the same
over a unix socket: no browser opens one, but a tunnel to it (`ssh -L 8081:/run/billingd/admin.sock`) does.
"""

from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from billingd.settings import host_port, is_loopback

HEADERS: Final = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""On every answer. Nothing is allowed to other origins, so no answer has a CORS header."""

DEFAULT_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
"""What a document that is not the page may load, should a browser show it: nothing."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a web page may have sent; no middleware stands before this one."""
    refused = _refused(request)
    return refused if refused is not None else await handler(request)


async def protect(_request: web.Request, response: web.StreamResponse) -> None:
    """What every answer says, refusals too."""
    for name, value in HEADERS.items():
        response.headers[name] = value
    response.headers.setdefault("Content-Security-Policy", DEFAULT_POLICY)


def _refused(request: web.Request) -> web.Response | None:
    host = request.headers.get("Host", "")
    if host and not _names_this_machine(host):
        return _error(
            421,
            "misdirected",
            "billingd's admin listener answers to the names of this machine only, as in "
            "http://127.0.0.1:8081; a proxy before it must set Host to that",
        )
    if not _same_origin(request, host):
        return _error(403, "forbidden", "a web page of another origin may not ask billingd")
    if request.method == "POST" and (
        request.content_type != "application/json" or "X-Billingd" not in request.headers
    ):
        return _error(403, "forbidden", "POST needs Content-Type: application/json and an X-Billingd header")
    return None


def _names_this_machine(host: str) -> bool:
    try:
        name = host_port(host)[0] if _has_port(host) else host.removeprefix("[").removesuffix("]")
    except ValueError:
        return False
    return is_loopback(name.removesuffix(".").lower())


def _has_port(host: str) -> bool:
    return host.rpartition("]")[2].find(":") >= 0 if host.startswith("[") else ":" in host


def _same_origin(request: web.Request, host: str) -> bool:
    """Whether the request was made by our own page, by a person, or by something that is no browser.

    A link from elsewhere may open the page: that is a navigation of a whole tab, and only looks.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site not in {None, "same-origin", "none"}:
        return (
            request.method in {"GET", "HEAD"}
            and request.headers.get("Sec-Fetch-Mode") == "navigate"
            and request.headers.get("Sec-Fetch-Dest") == "document"
        )
    origin = request.headers.get("Origin")
    if origin is None or site == "same-origin":
        return True
    return urlsplit(origin).netloc.lower() == host.lower()


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status)
