"""What makes lives cheap that are lived by the thousand: no log, no thread for SQLite, one template."""

import gc
import logging
from asyncio import Future
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import aiosqlite.core
import jinja2
import structlog


@contextmanager
def quiet() -> Iterator[None]:
    """Without the daemon's log, which takes a third of the time."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """What is there by now is garbage never, and what comes is looked through less often: an eighth."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def templates_once() -> Iterator[None]:
    """The admin page's template is compiled once, not for each of thousands of starts (19 ms each)."""
    compiled: dict[str, jinja2.Template] = {}
    get_template = jinja2.Environment.get_template

    def remembered(self: jinja2.Environment, name: str, *args: Any, **kwargs: Any) -> jinja2.Template:
        if name not in compiled:
            compiled[name] = get_template(self, name, *args, **kwargs)
        return compiled[name]

    with patch.object(jinja2.Environment, "get_template", remembered):
        yield


class _AtOnce:
    """aiosqlite's queue without a thread behind it."""

    def put_nowait(self, item: "tuple[Future[Any] | None, Callable[[], Any]]") -> None:
        future, function = item
        try:
            result = function()
        except BaseException as error:
            if future is None:
                raise
            future.set_exception(error)
        else:
            if future is not None:
                future.set_result(result)


class _NoThread:
    def __init__(self, **_: Any) -> None:
        self.daemon = True

    def start(self) -> None:
        """Nothing to start."""


@contextmanager
def sqlite_inline() -> Iterator[None]:
    """The same SQLite through the same driver, but statements run where they are asked for."""
    with patch.multiple(aiosqlite.core, SimpleQueue=_AtOnce, Thread=_NoThread):
        yield
