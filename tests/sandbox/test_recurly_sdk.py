"""The official SDK in strict mode, in a process of its own, against the sandbox."""

import asyncio
import os
import sys
from pathlib import Path

from recurly_side import recurly_side

SESSION = Path(__file__).with_name("recurly_sdk_session.py")


async def test_the_official_sdk_works_a_whole_life_in_strict_mode() -> None:
    """Every method billingd uses, with no attribute the SDK does not know, and no time it cannot read."""
    async with recurly_side(custom_field_names={"marker"}) as far:
        session = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SESSION),
            str(far.client.port),
            env=os.environ | {"RECURLY_STRICT_MODE": "TRUE"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert session.stdout is not None
        uuid = (await session.stdout.readline()).decode().strip()
        if uuid:
            far.pass_(minutes=1)
            far.site.renew(uuid)
        out, err = await session.communicate(b"\n")
        assert (session.returncode, out) == (0, b"done\n"), err.decode()
