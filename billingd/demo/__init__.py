"""`billingd demo`: the whole job between two real processes, with things going wrong, and the proof."""

import asyncio
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from billingd.demo.failure import DemoFailed
from billingd.demo.play import SECONDS, Play
from billingd.demo.processes import Stage
from billingd.demo.proof import Proof, show, show_document
from billingd.demo.story import Story
from billingd.demo.talk import Talk

__all__ = ["run_demo"]

HARD_LIMIT_SECONDS: Final = 420
"""How long all of it may take on top of the traffic's own time, whatever happens."""
FAILED: Final = 1
INTERRUPTED: Final = 130


async def run_demo(*, seconds: int | None, as_json: bool, store_url: str | None) -> int:
    """Play it and print the proof; the exit code: 0 proved, 1 not, 4 no database, 130 interrupted.

    `seconds` is how long traffic is made, `store_url` an empty database instead of a file of its own.
    """
    story = Story()
    directory = Path(tempfile.mkdtemp(prefix="billingd-demo-"))
    stage = Stage(directory, store_url)
    with _Interruption() as interruption:
        try:
            proof = await _play(stage, story, seconds)
        except DemoFailed as error:
            _lament(story, stage, str(error))
            return error.exit_code
        except TimeoutError:
            _lament(story, stage, "it took too long in all")
            return FAILED
        except asyncio.CancelledError:
            story.tell("demo", "interrupted")
            shutil.rmtree(directory, ignore_errors=True)
            return INTERRUPTED
        finally:
            interruption.ignore()
            await stage.close()
    (show_document if as_json else show)(proof)
    problems = proof.problems()
    if not problems:
        shutil.rmtree(directory, ignore_errors=True)
        return 0
    if as_json:
        for problem in problems:
            story.tell("demo", problem)
    story.tell("demo", f"what was logged is kept in {directory}")
    return FAILED


async def _play(stage: Stage, story: Story, seconds: int | None) -> Proof:
    async with asyncio.timeout(HARD_LIMIT_SECONDS + (SECONDS if seconds is None else seconds)):
        await stage.open()
        async with Talk(stage) as talk:
            return await Play(stage, talk, story, seconds).run()


class _Interruption:
    """While in force, the first SIGINT, SIGTERM or SIGHUP cancels the play, and no other does anything."""

    SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> Self:
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        for number in self.SIGNALS:
            self._loop.add_signal_handler(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self.SIGNALS:
            self._loop.remove_signal_handler(number)

    def ignore(self) -> None:
        """What cleans up is not interrupted."""
        self._task = None

    def _interrupt(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()


def _lament(story: Story, stage: Stage, why: str) -> None:
    """What was waited for, the daemon's last words, and where the rest is."""
    story.tell("demo", f"failed: {why}")
    for line in stage.daemon.tail():
        sys.stderr.write(f"         {line}\n")
    story.tell("demo", f"what was logged is kept in {stage.directory}")
