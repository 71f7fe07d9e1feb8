"""Broken requests and slow connections against the real daemon, as `make fuzz` plays them.

What must hold: no answer of 5xx but an honest 503, no memory that grows, at no time much of it, every event
that was acknowledged is stored, and good webhooks are taken while 200 slow connections stand. A test plays a
short one.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import PATIENCE_SECONDS
from service_manager import SECRETS, ServiceManager

SECRET = SECRETS["webhooks.secret"].encode()
PATHS = [b"/webhooks/amplify", b"/provisionplan", b"/provisionsubscription", b"/webhooks/recurly"]
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
ACKNOWLEDGED = re.compile(rb'\{"event": "(?:[^"\\]|\\.)*", "duplicate": (?:true|false), "actions": \d+\}')
AT_ONCE = 24
UNANSWERED_SECONDS = 1.0
"""How long to wait for the answer to a request that may never be whole."""
BYTE_SECONDS = 0.5
"""Between two bytes of a slow connection."""
PEAK_KIB_MAX = 200 * 1024
"""What the daemon may have in memory at any time: twice what it has at rest."""
GOOD_EVERY = 5
"""Each so many requests one is good, and must be taken."""


@dataclass
class Fuzzed:
    """What came of it."""

    answers: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    good: Counter[str] = field(default_factory=Counter)
    slow_opened: int = 0
    slow_answers: Counter[str] = field(default_factory=Counter)
    good_seconds: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """After how many requests the daemon had how many KiB in memory."""
    peak_kib: int = 0


def document(rng: random.Random, identity: str) -> dict[str, Any]:
    """An event that asks for nothing."""
    kind = rng.choice(["Asset", "Product", "ProductPlan", "Subscription", "Quota"])
    return {
        "id": identity,
        "type": rng.choice(["ResourceCreated", "ResourceUpdated"]),
        "payload": {
            "kind": kind,
            "name": f"name-{rng.randrange(50)}",
            "state": "draft",
            "approval": {"state": "pending"},
            "attributes": {"billingSystem": "none"},
            "metadata": {"id": "a1", "resourceVersion": str(rng.randrange(9))},
        },
    }


def weird(rng: random.Random) -> Any:
    """A value that does not belong."""
    return rng.choice(
        [None, True, -1, 10**40, 1e308, "", "x" * 300, "\x00", "\ud800", [], {}, [[[[]]]], {"id": {"id": []}}]
    )


def broken_document(rng: random.Random, identity: str) -> Any:
    """The same with some of it replaced or left out."""
    made: Any = document(rng, identity)
    for _ in range(rng.randint(1, 3)):
        place: Any = rng.choice([made, made.get("payload", made)])
        if isinstance(place, dict) and place:
            key = rng.choice(sorted(place))
            if rng.random() < 0.3:
                del place[key]
            else:
                place[key] = weird(rng)
    return made if rng.random() < 0.9 else weird(rng)


def whole(rng: random.Random, body: bytes, **changes: bytes | None) -> bytes:
    """A request with its secret and length, but for the changes."""
    headers: dict[str, bytes | None] = {
        "Host": b"billingd",
        "Authorization": SECRET,
        "Content-Type": b"application/json",
        "Content-Length": str(len(body)).encode(),
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = b"".join(
        name.encode() + b": " + value + b"\r\n" for name, value in headers.items() if value is not None
    )
    return b"POST " + rng.choice(PATHS) + b" HTTP/1.1\r\n" + lines + b"\r\n" + body


def scrambled(rng: random.Random, text: bytes) -> bytes:
    """Some bytes changed, dropped or doubled."""
    found = bytearray(text)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(found))
        act = rng.random()
        if act < 0.5:
            found[at] = rng.randrange(256)
        elif act < 0.75:
            del found[at : at + rng.randint(1, 9)]
        else:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        if not found:
            return b"\r\n\r\n"
    return bytes(found)


def request(rng: random.Random, number: int) -> bytes:
    """One broken request of many sorts; some turn out to be sound."""
    identity = f"fuzzed-{number}"
    sound = json.dumps(document(rng, identity)).encode()
    broken = json.dumps(broken_document(rng, identity)).encode()
    noise = rng.randbytes(rng.randint(1, 600))
    wrong = rng.choice([b"", b"Bearer", b"wrong", SECRET[:-1], b"Basic !!", b"\xff\xfe"])
    signed = rng.choice([b"1,ab", b"x", b"9" * 40 + b",", b"\xff", b",".join([b"1764000000"] * 200)])
    sorts: list[Callable[[], bytes]] = [
        lambda: whole(rng, broken),
        lambda: whole(rng, broken),
        lambda: whole(rng, noise),
        lambda: whole(rng, scrambled(rng, sound)),
        lambda: scrambled(rng, whole(rng, sound)),
        lambda: scrambled(rng, whole(rng, sound)),
        lambda: noise,
        lambda: noise + b"\r\n\r\n",
        lambda: whole(rng, sound, Authorization=wrong),
        lambda: whole(rng, sound, Authorization=None),
        lambda: whole(rng, sound, recurly_signature=signed),
        lambda: whole(rng, sound, recurly_signature=signed, Authorization=None),
        lambda: whole(rng, sound, Content_Type=rng.choice([b"text/plain", b"", b"a/b; c=" + b"d" * 500])),
        lambda: whole(rng, sound, Content_Length=rng.choice([b"-1", b"x", b"9" * 30, b"1", b"99999999999"])),
        lambda: whole(rng, sound, Content_Encoding=rng.choice([b"gzip", b"br", b"x"])),
        lambda: whole(rng, sound, Expect=rng.choice([b"100-continue", b"nonsense"])),
        lambda: whole(rng, sound, Upgrade=rng.choice([b"h2c", b"websocket"]), Connection=b"Upgrade"),
        lambda: whole(rng, b" " * 1_200_000),
        lambda: whole(rng, sound, **{f"X_{n}": b"v" * 300 for n in range(rng.randint(1, 300))}),
        lambda: whole(rng, sound, X_Long=b"v" * rng.randint(1, 80_000)),
        lambda: whole(rng, b"", Content_Length=None, Transfer_Encoding=b"chunked") + chunks(rng, sound),
        lambda: signed_by_nobody(rng) + b"0\r\n" + endless(rng, b"a: %s\r\n"),
        lambda: signed_by_nobody(rng) + endless(rng, b"1;%s\r\nx\r\n"),
        lambda: signed_by_nobody(rng) + endless(rng, b"zz%s\r\n"),
        lambda: signed_by_nobody(rng, many=True) + b"ffff\r\n" + b"x" * 65_535 + b"\r\n0\r\n\r\n",
        lambda: b"GET / HTTP/1.1\r\n\r\n" * rng.randint(2, 100_000),
        lambda: whole(rng, sound) * rng.randint(2, 400),
        lambda: whole(rng, sound, Authorization=wrong) * rng.randint(2, 2_000),
        lambda: whole(rng, sound).replace(b"POST", rng.choice([b"GET", b"PUT", b"BREW", b"", b"P\xffST"]), 1),
        lambda: whole(rng, sound).replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/9.9", b"X", b""]), 1),
        lambda: whole(rng, sound).replace(b"/", rng.choice([b"//", b"/%ff", b"/../", b"http://[", b"*"]), 1),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise,
        lambda: b"\x16\x03\x01" + noise,
        lambda: whole(rng, sound)[: rng.randrange(1, 300)],
        lambda: b"[" * 60_000,
        lambda: whole(rng, b"[" * 50_000),
    ]
    return rng.choice(sorts)()


def signed_by_nobody(rng: random.Random, *, many: bool = False) -> bytes:
    """The head of a request whose body must be read before it can be judged."""
    stamp = str(int(time.time())).encode()
    signature = b",".join([stamp, *[b"0" * 64] * 120]) if many else stamp + b"," + b"0" * 64
    path = PATHS[3] if rng.random() < 0.9 else PATHS[0]
    return (
        b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"recurly-signature: " + signature + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    )


def endless(rng: random.Random, line: bytes) -> bytes:
    """One line for megabytes, each short or long."""
    one = line % (b"b" * rng.choice([1, 100, 8_000]))
    return one * (rng.choice([100_000, 8_000_000]) // len(one))


def chunks(rng: random.Random, body: bytes) -> bytes:
    """A body in chunks, most of them as they should be."""
    sound = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return rng.choice(
        [
            sound,
            b"zz\r\n",
            b"ffffffffffffffff\r\n" + body,
            scrambled(rng, sound),
            b"0\r\n" + b"a: b\r\n" * 900,
        ]
    )


async def exchange(address: tuple[str, int], text: bytes, seconds: float) -> bytes:
    """Everything that comes back until the other side hangs up, or for so long."""
    reader, writer = await asyncio.open_connection(*address)
    came = b""
    try:
        async with asyncio.timeout(seconds):
            writer.write(text)
            while piece := await reader.read(65_536):
                came += piece
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return came


async def good(address: tuple[str, int], done: Fuzzed, rng: random.Random, identity: str) -> None:
    """A webhook that must be taken."""
    body = json.dumps(document(rng, identity)).encode()
    text = whole(rng, body, Connection=b"close").replace(PATHS[3], PATHS[0])
    began = time.monotonic()
    came = await exchange(address, text, PATIENCE_SECONDS)
    done.good_seconds.append(time.monotonic() - began)
    found = STATUS.match(came)
    done.good[found[1].decode() if found else "nothing"] += 1
    note(done, came)


def note(done: Fuzzed, came: bytes) -> None:
    """Remember what was acknowledged."""
    for found in ACKNOWLEDGED.finditer(came):
        done.acknowledged.add(json.loads(found[0])["event"])


async def slow(address: tuple[str, int], done: Fuzzed, rng: random.Random, over: asyncio.Event) -> None:
    """A connection that sends a byte now and then; when it is hung up on, it comes again."""
    text = whole(rng, b"x" * 1_000, Authorization=rng.choice([SECRET, b"wrong", None]))
    while not over.is_set():
        reader, writer = await asyncio.open_connection(*address)
        done.slow_opened += 1
        begin = rng.randrange(len(text))
        try:
            writer.write(text[:begin])
            for at in range(begin, len(text)):
                writer.write(text[at : at + 1])
                await writer.drain()
                came = await _within(over, reader)
                if came is not None:
                    found = STATUS.match(came)
                    done.slow_answers[found[1].decode() if found else "hung up on"] += 1
                    break
                if over.is_set():
                    break
        except ConnectionError:
            done.slow_answers["hung up on"] += 1
        finally:
            writer.close()
        await _within(over, None)


async def _within(over: asyncio.Event, reader: asyncio.StreamReader | None) -> bytes | None:
    """What comes within the pause between two bytes, None when nothing does."""
    try:
        async with asyncio.timeout(BYTE_SECONDS):
            if reader is not None:
                return await reader.read(4_096)
            await over.wait()
    except TimeoutError:
        pass
    return None


def resident(pid: int, what: str = "VmRSS") -> int:
    """KiB in memory, now or (VmHWM) at most so far."""
    found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


async def play(
    manager: ServiceManager,
    *,
    requests: int,
    slow_connections: int,
    seed: int,
    tell: Callable[[str], None],
    wait: float = UNANSWERED_SECONDS,
) -> Fuzzed:
    """Send it all."""
    assert manager.process is not None
    pid, address, done, over = manager.process.pid, manager.address, Fuzzed(), asyncio.Event()
    crawling = [
        asyncio.create_task(slow(address, done, random.Random(f"{seed}/slow/{number}"), over))
        for number in range(slow_connections)
    ]
    queue = iter(range(requests))
    measured_every = max(1, requests // 20)

    async def worker() -> None:
        for number in queue:
            rng = random.Random(f"{seed}/{number}")
            if number % GOOD_EVERY == 0:
                await good(address, done, rng, f"good-{number}")
            came = await exchange(address, request(rng, number), wait)
            statuses = [one.decode() for one in STATUS.findall(came)] or ["nothing"]
            done.answers.update(statuses)
            note(done, came)
            if number % measured_every == 0:
                done.memory.append((number, resident(pid)))
                tell(f"{number:6} requests, {done.memory[-1][1] // 1024:4} MiB in memory")

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    done.memory.append((requests, resident(pid)))
    done.peak_kib = resident(pid, "VmHWM")
    over.set()
    await asyncio.gather(*crawling)
    return done


def cpu_seconds(manager: ServiceManager) -> float:
    """What the daemon has used of the processor."""
    assert manager.process is not None
    fields = Path(f"/proc/{manager.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def not_stored(manager: ServiceManager, done: Fuzzed) -> set[str]:
    """What was acknowledged and is not in the store."""
    with closing(sqlite3.connect(manager.state / "billingd.db")) as store:
        return done.acknowledged - {row[0] for row in store.execute("SELECT id FROM events")}


def server_faults(done: Fuzzed) -> set[str]:
    """Answers that would be a fault of ours."""
    seen = {*done.answers, *done.slow_answers, *done.good}
    return {status for status in seen if status.startswith("5") and status != "503"}


def growth_kib(done: Fuzzed) -> int:
    """How much the memory grew from a third of the way on, when everything has been used once."""
    settled = [kib for number, kib in done.memory if number >= done.memory[-1][0] // 3]
    return settled[-1] - settled[0]


def main() -> None:
    """Play it at length and print what came of it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--slow", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()

    def tell(line: str) -> None:
        print(line, flush=True)  # noqa: T201

    with tempfile.TemporaryDirectory() as directory:
        manager = ServiceManager(Path(directory) / "service")
        try:
            manager.start()
            began = time.monotonic()
            done = asyncio.run(
                play(
                    manager,
                    requests=chosen.requests,
                    slow_connections=chosen.slow,
                    seed=chosen.seed,
                    tell=tell,
                )
            )
            took = time.monotonic() - began
            used = cpu_seconds(manager)
            exit_code = manager.stop()
            lost, complaints = not_stored(manager, done), manager.log().count("Traceback")
        finally:
            manager.close()
    tell(
        f"{chosen.requests} broken requests, {chosen.slow} slow connections, {took:.0f} s, seed {chosen.seed}"
    )
    tell(f"answers: {dict(sorted(done.answers.items()))}")
    tell(f"slow connections: {done.slow_opened} opened; {dict(sorted(done.slow_answers.items()))}")
    good_seconds = sorted(done.good_seconds)
    median, late = good_seconds[len(good_seconds) // 2], good_seconds[len(good_seconds) * 99 // 100]
    tell(f"good webhooks meanwhile: {dict(done.good)}; half in {median:.3f} s, 99 % in {late:.2f} s")
    tell(f"acknowledged {len(done.acknowledged)}, of these stored {len(done.acknowledged) - len(lost)}")
    grown = growth_kib(done)
    tell(f"memory: {grown} KiB more at the end than after a third of them, at most {done.peak_kib} KiB")
    tell(f"the daemon used {used:.0f} s of CPU; {complaints} tracebacks in its log; exit code {exit_code}")
    failed = lost or complaints or server_faults(done) or set(done.good) != {"202"} or exit_code
    failed = failed or done.peak_kib > PEAK_KIB_MAX
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
