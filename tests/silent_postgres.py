"""A way to PostgreSQL that can fall silent: connections stay, and nothing goes through any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa


@asynccontextmanager
async def reached_through(url: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The same database by another address, and what makes that silent."""
    there, silent = sa.make_url(url), asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if not silent.is_set():
                writer.write(data)
                await writer.drain()
        writer.close()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, through = await asyncio.open_unix_connection(f"{there.query['host']}/.s.PGSQL.5432")
        writers.extend((writer, through))
        await asyncio.gather(carry(reader, through), carry(behind, writer), return_exceptions=True)

    server = await asyncio.start_server(welcome, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here = there.set(host="127.0.0.1", port=port, query={})
    try:
        yield here.render_as_string(hide_password=False), silent
    finally:
        server.close()
        for writer in writers:
            writer.close()
