"""What makes lives cheap that are lived by the thousand: no log, no thread for SQLite, one template."""

import gc
import logging
from asyncio import Future
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import aiosqlite.core
import jinja2
import recurly.resource
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
    """The admin page's template is compiled once, not at each start (19 ms); what mails say is, too."""
    compiled: dict[Any, jinja2.Template] = {}
    get_template, from_string = jinja2.Environment.get_template, jinja2.Environment.from_string

    def remembered(self: jinja2.Environment, name: str, *args: Any, **kwargs: Any) -> jinja2.Template:
        if name not in compiled:
            compiled[name] = get_template(self, name, *args, **kwargs)
        return compiled[name]

    def read(self: jinja2.Environment, source: str, *args: Any, **kwargs: Any) -> jinja2.Template:
        if (self.autoescape, source) not in compiled:
            compiled[self.autoescape, source] = from_string(self, source, *args, **kwargs)
        return compiled[self.autoescape, source]

    with patch.multiple(jinja2.Environment, get_template=remembered, from_string=read):
        yield


@contextmanager
def named_once() -> Iterator[None]:
    """The SDK looks each class up by its name, with an import, for each field of each answer."""
    with patch.object(recurly.resource, "locate", lru_cache(None)(recurly.resource.locate)):
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
