"""`make fuzz` in short: broken requests and slow connections against the real daemon."""

import asyncio
from pathlib import Path

from fuzz import PEAK_KIB_MAX, not_stored, play, server_faults
from service_manager import ServiceManager


def test_whatever_comes_is_answered_as_promised(tmp_path: Path) -> None:
    """No 5xx, every good webhook taken meanwhile, all that was acknowledged is stored."""
    manager = ServiceManager(tmp_path / "s")
    try:
        manager.start()
        done = asyncio.run(
            play(manager, requests=150, slow_connections=200, seed=1, tell=lambda _: None, wait=0.2)
        )
        assert manager.stop() == 0
        assert server_faults(done) == set()
        assert done.slow_opened >= 200
        assert set(done.good) == {"202"}
        assert len(done.acknowledged) >= done.good.total() == 30
        assert not_stored(manager, done) == set()
        assert done.peak_kib < PEAK_KIB_MAX
        assert "Traceback" not in manager.log()
    finally:
        manager.close()
