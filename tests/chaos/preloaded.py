"""Daemons that need not import anything: real processes, forked from one that has imported it all.

A start takes a quarter of what `python -m billingd` takes, nearly all of which is spent on imports.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, cast

from processes import Daemon, Sandbox

MODULES: Final = (
    *("billingd.cli.run", "billingd.daemon", "billingd.__main__"),
    *(
        "aiosqlite",
        "asyncpg",
        "sqlalchemy.dialects.sqlite.aiosqlite",
        "sqlalchemy.dialects.postgresql.asyncpg",
    ),
)


class Forked:
    """What is used of a `subprocess.Popen`, for a process that is a child of the server's."""

    def __init__(self, server: "Server", pid: int) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self._ended(wait=False)

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for the end: of what was killed."""
        return self._ended(wait=True)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, *, wait: bool) -> int | None:
        if self._code is None:
            self._code = self._server.ask({"pid": self.pid, "wait": wait})
        return self._code


class Server:
    """The process that has imported everything, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def ask(self, question: dict[str, Any]) -> Any:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """It ends when nobody asks any more."""
        self._process.communicate()


class PreloadedDaemon(Daemon):
    """`billingd run` without the imports."""

    def __init__(self, directory: Path, sandbox: Sandbox, ports: tuple[int, int], store_url: str) -> None:
        super().__init__(directory, sandbox, ports, store_url)
        self._server = Server()

    def start(self, **environment: str) -> "subprocess.Popen[bytes]":
        """Start it, without waiting."""
        asked = {
            "arguments": ["--config", str(self.config), "run"],
            "environment": self.environment | environment,
            "log": self._log.name,
        }
        forked = Forked(self._server, self._server.ask(asked))
        self.process = cast("subprocess.Popen[bytes]", forked)
        return self.process

    def close(self) -> None:
        super().close()
        self._server.close()


def _become(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The daemon, in the child; never returns."""
    code: Any = 1
    try:
        for path, flags, numbers in (
            (os.devnull, os.O_RDONLY, [0]),
            (log, os.O_WRONLY | os.O_APPEND, [1, 2]),
        ):
            opened = os.open(path, flags)
            for number in numbers:
                os.dup2(opened, number)
            os.close(opened)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = ["billingd", *arguments]
        importlib.import_module("billingd.__main__").main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        if "pid" in asked:
            pid, status = os.waitpid(asked["pid"], 0 if asked["wait"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            answers.close()
            _become(**asked)
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
