"""A stretch of network between Amplify and a daemon that dies: each webhook is sent until it is accepted.

Amplify itself sends once and never again (amplify.md 4.3). What is lost that way is for catching up to find:
either nothing is lost here, so that whatever is missing in the end was acknowledged and then forgotten, or
everything is.
"""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any, Final, NamedTuple

AT_ONCE: Final = 4
PAUSE_SECONDS: Final = 0.05
TIMEOUT_SECONDS: Final = 10


class Delivery(NamedTuple):
    """One webhook as it came."""

    body: bytes
    authorization: str


class Redelivery:
    """Takes webhooks in, and hands each to the daemon until that says 202."""

    def __init__(self, to: str, *, lost: bool = False) -> None:
        self._to = to
        self._lost = lost
        self._waiting: Queue[Delivery] = Queue()
        self._stop = threading.Event()
        self._known: list[Delivery] = []
        self.acknowledged: set[str] = set()
        """Ids of the events that the daemon answered with 202."""
        self.refused: list[str] = []
        """What it answered otherwise, but for 503."""

    @property
    def idle(self) -> bool:
        """Whether every webhook so far was acknowledged."""
        return self._waiting.unfinished_tasks == 0

    def again(self, which: int) -> None:
        """Deliver a webhook of before once more, as networks do."""
        known = list(self._known)
        if known:
            self._waiting.put(known[which % len(known)])

    def take(self, delivery: Delivery) -> None:
        """A webhook that Amplify sent."""
        if self._lost:
            return
        self._known.append(delivery)
        self._waiting.put(delivery)

    def deliver(self) -> None:
        """Hand over one webhook after the other until told to stop."""
        while not self._stop.is_set():
            try:
                delivery = self._waiting.get(timeout=PAUSE_SECONDS)
            except Empty:
                continue
            while not self._accepted(delivery) and not self._stop.wait(PAUSE_SECONDS):
                pass
            self._waiting.task_done()

    def stop(self) -> None:
        """Deliver nothing more."""
        self._stop.set()

    def _accepted(self, delivery: Delivery) -> bool:
        headers = {"Content-Type": "application/json", "Authorization": delivery.authorization}
        request = urllib.request.Request(self._to, delivery.body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                said = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:
                    self.refused.append(f"{error.code}: {error.read().decode(errors='replace')}")
            return error.code != 503
        except (OSError, ValueError):  # away, or died before its answer was whole: nothing was acknowledged
            return False
        self.acknowledged.add(str(said["event"]))
        return True


@contextmanager
def redelivering(to: str, *, lost: bool = False) -> Iterator[tuple[Redelivery, str]]:
    """The relay and the URL to send webhooks to; with `lost` it hands over none."""
    relay = Redelivery(to, lost=lost)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            relay.take(Delivery(body, self.headers.get("Authorization", "")))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
            """Say nothing: pytest's output is for failures."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": PAUSE_SECONDS})]
        threads += [threading.Thread(target=relay.deliver) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        try:
            yield relay, f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            relay.stop()
            server.shutdown()
            for thread in threads:
                thread.join()
