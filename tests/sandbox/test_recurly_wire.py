"""HTTP as Recurly speaks it: credentials, version, headers, idempotency, rate limits."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import BasicAuth
from recurly_side import ACCEPT, RecurlySide, plan, recurly_side, subscription, usage_path

from billingd.sandbox.faults import Rule

KEY = "Idempotency-Key"


@pytest.fixture
async def far() -> AsyncIterator[RecurlySide]:
    async with recurly_side() as side:
        yield side


@pytest.mark.parametrize(
    ("headers", "status", "type_"),
    [
        ({"Authorization": "Bearer sandbox"}, 401, "unauthorized"),
        ({"Authorization": "Basic !!"}, 401, "unauthorized"),
        ({"Authorization": BasicAuth("", "x").encode()}, 401, "unauthorized"),
        ({"Authorization": BasicAuth("wrong", "").encode()}, 403, "invalid_api_key"),
        ({"Authorization": BasicAuth("reader", "").encode()}, 403, "invalid_permissions"),
        ({"Accept": "application/json"}, 406, "invalid_api_version"),
        ({"Accept": "application/vnd.recurly.v2019-10-10"}, 406, "unavailable_in_api_version"),
        ({"Accept": "application/vnd.recurly.v1999-01-01"}, 406, "unknown_api_version"),
        ({"Content-Type": "text/plain"}, 400, "invalid_content_type"),
        ({KEY: "x" * 256}, 400, "bad_request"),
    ],
)
async def test_the_door_refuses_by_type(
    far: RecurlySide, headers: dict[str, str], status: int, type_: str
) -> None:
    """401, 403, 406, 400: typed, and nothing is done."""
    far.site.configure(read_only_api_keys={"reader"})
    credentials = {"Authorization": BasicAuth("sandbox-api-key", "").encode(), "Accept": ACCEPT}
    options = {"auth": None, "headers": credentials | {"Content-Type": "application/json"} | headers}
    far.client._session._default_auth = None
    error = (await far.call("POST", "/accounts", {"code": "ann"}, status=status, **options))["error"]
    assert error["type"] == type_
    assert not far.site.accounts


async def test_a_read_only_key_reads(far: RecurlySide) -> None:
    """And `latest` and `+json` are versions too."""
    far.site.configure(read_only_api_keys={"reader"})
    headers = {"Accept": "application/vnd.recurly.latest+json"}
    await far.call("GET", "/sites", auth=BasicAuth("reader", ""), headers=headers)


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"x"', b'{"code": NaN}', b"\xff", b""])
async def test_what_is_not_a_json_object_is_a_400(far: RecurlySide, raw: bytes) -> None:
    """`bad_request`."""
    headers = {"Content-Type": "application/json"}
    error = (await far.call("POST", "/accounts", status=400, data=raw, headers=headers))["error"]
    assert error["type"] == "bad_request"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/sites", 200), ("GET", "/plans/x", 404)])
async def test_every_answer_has_its_headers(far: RecurlySide, method: str, path: str, status: int) -> None:
    """X-Request-Id, the three of the rate limit, the content type."""
    async with await far.send(method, path) as first, await far.send(method, path) as second:
        assert first.status == status
        assert first.headers["Content-Type"] == "application/json; charset=utf-8"
        assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
        assert first.headers["X-RateLimit-Limit"] == "2000"
        assert second.headers["X-RateLimit-Remaining"] == "1998"
        assert int(second.headers["X-RateLimit-Reset"]) > far.clock.now().timestamp()


async def test_unknown_paths_and_methods_are_a_typed_404(far: RecurlySide) -> None:
    """Never the web server's own page."""
    for method, path in (("GET", "/nothing"), ("PATCH", "/plans"), ("GET", "/sites/x/plans")):
        await far.refused(method, path, status=404, type_="not_found")


@pytest.mark.parametrize(("production", "limit"), [(False, 2000), (True, 5000)])
async def test_the_default_limits(far: RecurlySide, production: bool, limit: int) -> None:
    """400 or 1,000 a minute, told as the five-minute total (3)."""
    far.site.configure(production=production)
    async with await far.send("GET", "/sites") as answer:
        assert answer.headers["X-RateLimit-Limit"] == str(limit)
        assert (await answer.json())["data"][0]["mode"] == ("production" if production else "sandbox")


@pytest.mark.parametrize("production", [False, True])
async def test_what_counts_towards_the_limit(far: RecurlySide, production: bool) -> None:
    """Sandbox sites count everything, production sites GET and HEAD (OAS:160-165, V2:853)."""
    far.site.configure(production=production, rate_limit_per_minute=1)
    for code in ("a", "b", "c"):
        await far.call("POST", "/accounts", {"code": code}, status=201)
    for method in ("GET", "HEAD"):
        (await far.send(method, "/accounts")).release()
    expected = 201 if production else 429
    await far.call("POST", "/accounts", {"code": "d"}, status=expected)


async def test_the_limit_slides_over_five_minutes(far: RecurlySide) -> None:
    """429 `rate_limited`, Remaining 0, Reset when the window is clear."""
    far.site.configure(rate_limit_per_minute=1)
    for _ in range(5):
        await far.call("GET", "/sites")
        far.pass_(minutes=1)
    await far.call("GET", "/sites")  # the first has left the window
    async with await far.send("GET", "/sites") as answer:
        assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (429, "0")
        assert (await answer.json())["error"]["type"] == "rate_limited"
        reset = int(answer.headers["X-RateLimit-Reset"])
        assert answer.headers["X-Request-Id"]
    far.pass_(seconds=reset - far.clock.now().timestamp())
    async with await far.send("GET", "/sites") as answer:
        assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (200, "4")


async def test_lagging_reads_do_not_show_young_writes(far: RecurlySide) -> None:
    """Lists, counts and look-ups alike, for as long as the rule says; the write itself is done."""
    await far.make_plan()
    made = await far.subscribe()
    far.faults.add(Rule("recurly", "*", "**", "list_lag", times=None, args={"seconds": 30}))
    path, at = usage_path(made), far.pass_(minutes=2)
    record = await far.use(made, 1, at)
    assert (await far.call("GET", path))["data"] == []
    assert (await far.call("GET", f"{path}?ids={record['id']}"))["data"] == []
    await far.call("GET", f"/usage/{record['id']}", status=404)
    async with await far.send("HEAD", path) as answer:
        assert answer.headers["Recurly-Total-Records"] == "0"
    far.pass_(seconds=30)
    assert [each["id"] for each in (await far.call("GET", path))["data"]] == [record["id"]]
    await far.call("POST", "/plans", plan(), status=422)
    await far.call("POST", "/subscriptions", subscription(), status=422)


async def test_other_lists_page_sort_and_count(far: RecurlySide) -> None:
    """By `created_at` or `updated_at`, over accounts as over all."""
    for number in range(5):
        await far.call("POST", "/accounts", {"code": f"a{number}"}, status=201)
        far.pass_(seconds=1)
    await far.call("PUT", "/accounts/code-a1", {"email": "x@y.example"})
    codes, next_ = [], "/accounts?limit=2&sort=updated_at&order=asc"
    while next_:
        page = await far.call("GET", next_)
        codes += [each["code"] for each in page["data"]]
        next_ = page["next"]
    assert codes == ["a0", "a2", "a3", "a4", "a1"]
    found = await far.call("GET", "/accounts?email=x@y.example&subscriber=false")
    assert [each["code"] for each in found["data"]] == ["a1"]
    assert (await far.call("GET", "/accounts?past_due=true"))["data"] == []
    listed = await far.call("GET", "/accounts?begin_time=2026-01-31T12:00:02Z&end_time=2026-01-31T12:00:03Z")
    assert [each["code"] for each in listed["data"]] == ["a3", "a2"]
