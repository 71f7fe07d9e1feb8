"""The border to the SDK, which has no types: one guarded client per thread, and what one call did."""

import http.client
import ipaddress
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import recurly

from billingd.adapters.recurly.outcomes import Answer, Refusal, tidy
from billingd.adapters.recurly.sockets import Abandoned, Flight, GuardedConnection, PlainConnection

T = TypeVar("T")

SLOT: Final = "_BaseClient__conn"  # name-mangled, private: checked at start


@dataclass(frozen=True, slots=True)
class Address:
    """Where Recurly is. `plain`, without TLS, for a sandbox on this machine only."""

    host: str
    port: int
    plain: bool


def locate(base_url: str | None, region: str) -> Address:
    """The address to talk to; ValueError when it would be unsafe or makes no sense."""
    hosts: dict[str, str] = recurly.base_client.API_HOSTS
    if region not in hosts:
        raise ValueError(f"unknown Recurly region {region!r}, expected one of {', '.join(hosts)}")
    if base_url is None:
        return Address(hosts[region], 443, plain=False)
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("Recurly's base_url must be http(s)://HOST[:PORT]")
    if url.path not in ("", "/") or url.query or url.fragment or url.username or url.password:
        raise ValueError("Recurly's base_url takes no path, query or user")
    plain = url.scheme == "http"
    if plain and not _is_loopback(url.hostname):
        raise ValueError("Recurly's base_url may be plain http on loopback only")
    return Address(url.hostname, url.port or (80 if plain else 443), plain)


class Client(recurly.Client):  # type: ignore[misc]
    """The SDK's client on a guarded connection. Never log it: `vars` of it hold the API key."""

    def __init__(
        self, api_key: str, address: Address, *, timeout_seconds: float, context: ssl.SSLContext
    ) -> None:
        super().__init__(api_key, timeout=timeout_seconds)
        if not isinstance(vars(self).get(SLOT), http.client.HTTPSConnection):
            raise RuntimeError(f"unsupported recurly SDK {recurly.__version__}: no connection in {SLOT}")
        kind = PlainConnection if address.plain else GuardedConnection
        self.connection = kind(address.host, address.port, timeout=timeout_seconds, context=context)
        setattr(self, SLOT, self.connection)

    def page(self, path: str, params: dict[str, Any] | None) -> tuple[list[Any], str | None]:
        """One page of a list and where the next one is. The SDK's pager would fetch them all in one go."""
        page = self._make_request("GET", path, None, **({"params": params} if params else {}))
        if not isinstance(page, recurly.resource.Page):
            raise ValueError(f"expected a list, got {type(page).__name__}")
        following = None
        if page.has_more:
            if not page.next:
                raise ValueError("a list says that it goes on, but not where")
            url = urlsplit(page.next)  # relative, or absolute as OpenAPI shows it: always this same host
            following = url.path + (f"?{url.query}" if url.query else "")
        return list(page.data), following


def perform(client: Client, flight: Flight, work: Callable[[Client], T]) -> Answer[T]:
    """Do one call in a worker's thread, and report it as plain data: no SDK object or traceback gets out.

    (The frames of a traceback hold the Authorization header.)
    """
    connection = client.connection
    connection.begin(flight)
    value: T | None = None
    refusal: Refusal | None = None
    fault: str | None = None
    stale = unsendable = cut = False
    try:
        value = work(client)
    except recurly.NetworkError as error:
        cause = error.args[0] if error.args else error
        fault, cut = _words(cause), True
        stale = connection.reused and connection.status is None and not isinstance(cause, TimeoutError)
    except recurly.ApiError as error:
        if connection.status is None:
            fault, unsendable = tidy(str(error)), True
        else:
            refusal = _refusal(error)
            fault = None if refusal else "the answer is not in Recurly's form" + _form(connection)
    except Abandoned:
        fault, cut = "given up before it was sent", True
    except OSError as error:
        fault, cut = _words(error), True
    except Exception as error:  # the SDK lets a dozen kinds through, and each is evidence of the same thing
        fault = _words(error) + _form(connection)
        cut = isinstance(error, http.client.HTTPException)
        unsendable = connection.status is None and not flight.left and not cut
    if fault is not None:
        connection.close()
    return Answer(
        value=value,
        refusal=refusal,
        fault=fault,
        status=connection.status,
        headers=dict(connection.kept),
        left=flight.left,
        stale=stale,
        unsendable=unsendable,
        cut=cut,
    )


def _refusal(error: Any) -> Refusal | None:
    body = error.error
    code, words = getattr(body, "type", None), getattr(body, "message", None)
    if not isinstance(code, str) or not isinstance(words, str):
        return None
    names: list[str] = []
    details: list[str] = []
    for each in getattr(body, "params", None) or ():
        name, said = (each.get("param"), each.get("message")) if isinstance(each, dict) else (None, None)
        if name:
            names.append(tidy(str(name), 100))
            details.append(f"{names[-1]}: {tidy(str(said), 200)}" if said else names[-1])
    text = tidy(words) + (f" ({'; '.join(details)})" if details else "")
    return Refusal(code=tidy(code, 100), words=tidy(text), params=tuple(names))


def _words(error: BaseException) -> str:
    return tidy(f"{type(error).__name__}: {error}", 300)


def _form(connection: GuardedConnection) -> str:
    if connection.status is None:
        return ""
    return f" (content type {tidy(connection.kept.get('content-type', 'none'), 80)})"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
