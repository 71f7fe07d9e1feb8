"""SQLite as the daemon uses it, without a thread for each connection: a fifth of what a short test costs."""

from asyncio import Future
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import aiosqlite.core


class _Turns:
    """aiosqlite's queue, worked off by the event loop: others run between asking and answer, as ever."""

    def __init__(self) -> None:
        self._asked: deque[tuple[Future[Any] | None, Callable[[], Any]]] = deque()

    def put_nowait(self, item: tuple[Future[Any] | None, Callable[[], Any]]) -> None:
        self._asked.append(item)
        future, _ = item
        if future is not None and not future.get_loop().is_closed():
            future.get_loop().call_soon(self._answer)
            return
        while self._asked:  # nobody waits any more: a connection is thrown away
            self._answer()

    def _answer(self) -> None:
        if not self._asked:
            return
        future, function = self._asked.popleft()
        try:
            result = function()
        except BaseException as error:
            if future is None:
                raise
            if not future.done():
                future.set_exception(error)
        else:
            if future is not None and not future.done():
                future.set_result(result)


class _NoThread:
    def __init__(self, **_: Any) -> None:
        self.daemon = True

    def start(self) -> None:
        """Nothing to start."""


@contextmanager
def sqlite_in_turn() -> Iterator[None]:
    """Connections opened from now on run their statements on the event loop, one a turn."""
    with patch.multiple(aiosqlite.core, SimpleQueue=_Turns, Thread=_NoThread):
        yield
