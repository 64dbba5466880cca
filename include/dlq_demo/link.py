"""A TCP connection that can be made slow: a proxy on loopback before a service on loopback."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from dlq_demo import loopback

_PIECE = 1 << 16


class Link:
    """Passes on what it is sent; a context manager. While ``delay_s`` is more than 0, each piece (64 KiB at most) waits
    so many seconds first, in either direction.

    :param to: the service's port.
    """

    def __init__(self, to: int) -> None:
        self.port = loopback.free_ports(1)[0]
        self.delay_s = 0.0
        self._to = to
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.start_server(self._accept, loopback.HOST, self.port)
        asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(loopback.HOST, self._to)
        except OSError:  # nobody listens: nobody answers here either
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(_PIECE):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(piece)
                await writer.drain()
        writer.close()
