"""The daemon restarted under load through an inherited socket: nothing refused, all acknowledged kept.

`python tests/under_load.py` plays it and prints its log; a test plays a shorter one.
"""

import argparse
import http.client
import json
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from processes import PATIENCE_SECONDS, until
from service_manager import SECRETS, ServiceManager

PACE_SECONDS = 0.02
"""Between two webhooks of one sender: a load, but not all of a shared machine."""


@dataclass
class Senders:
    """Threads that send webhooks, each its own; half of them keep their connection."""

    address: tuple[str, int]
    answers: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    slowest: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, number: int) -> None:
        for sender in range(number):
            thread = threading.Thread(target=self._send, args=(sender,))
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _send(self, sender: int) -> None:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_SECONDS)
        number = 0
        while not self._stop.wait(PACE_SECONDS):
            number += 1
            identity = f"sender-{sender}-{number}"
            began = time.monotonic()
            try:
                connection.request("POST", "/webhooks/amplify", event(identity), HEADERS)
                answer = connection.getresponse()
                answer.read()
                said = str(answer.status)
            except OSError as error:
                said = repr(error)
                connection.close()
            if sender % 2:
                connection.close()
            with self._lock:
                self.answers[said] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
                if said == "202":
                    self.acknowledged.add(identity)
        connection.close()


HEADERS = {"Authorization": SECRETS["webhooks.secret"], "Content-Type": "application/json"}


def event(identity: str) -> bytes:
    """An event that is kept and asks for nothing."""
    payload = {"kind": "Asset", "name": "weather", "metadata": {"id": "a1", "resourceVersion": "1"}}
    return json.dumps({"id": identity, "type": "ResourceUpdated", "payload": payload}).encode()


def kept(database: Path) -> set[str]:
    """The ids of all stored events."""
    with closing(sqlite3.connect(database)) as store:
        return {row[0] for row in store.execute("SELECT id FROM events")}


def play(
    manager: ServiceManager, *, restarts: int, senders: int, tell: Callable[[str], None] = lambda _: None
) -> Senders:
    """Restart it so often while they send, each time only once answers have come again."""
    began = time.monotonic()

    def say(what: str) -> None:
        tell(f"{time.monotonic() - began:7.3f} s  {what}")

    manager.start()
    say(f"READY=1, pid {manager.process.pid if manager.process else 0}; {senders} senders start")
    sending = Senders(manager.address)
    sending.start(senders)
    try:
        for number in range(1, restarts + 1):
            before = len(sending.acknowledged)
            wanted = before + 5 * senders
            until("answers come", lambda w=wanted: len(sending.acknowledged) >= w)  # type: ignore[misc]
            say(f"SIGTERM {number}; {len(sending.acknowledged)} acknowledged so far")
            assert manager.stop() == 0, manager.log()
            say("exited with 0; the socket stays, new connections wait in it")
            manager.start()
            say(f"READY=1, pid {manager.process.pid if manager.process else 0}")
        wanted = len(sending.acknowledged) + 5 * senders
        until("answers come", lambda: len(sending.acknowledged) >= wanted)
    finally:
        sending.stop()
    say(f"answers: {dict(sending.answers)}; slowest {sending.slowest:.2f} s")
    assert manager.stop() == 0, manager.log()
    lost = sending.acknowledged - kept(manager.state / "billingd.db")
    say(f"acknowledged {len(sending.acknowledged)}, of these stored {len(sending.acknowledged) - len(lost)}")
    return sending


def main() -> None:
    """Play it at length."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--restarts", type=int, default=10)
    options.add_argument("--senders", type=int, default=16)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        manager = ServiceManager(Path(directory) / "service")
        try:
            done = play(
                manager,
                restarts=chosen.restarts,
                senders=chosen.senders,
                tell=lambda line: print(line, flush=True),  # noqa: T201
            )
            lost = done.acknowledged - kept(manager.state / "billingd.db")
        finally:
            manager.close()
    sys.exit(1 if lost or set(done.answers) != {"202"} else 0)


if __name__ == "__main__":
    main()
