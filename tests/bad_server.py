"""A local server that stalls, cuts off, lies and fails as it is told, for the tests of downloads."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mclip.sources.downloads import CHUNK, DownloadError

CONTENT = random.Random(0).randbytes(5 * CHUNK + 123)
CUT = 2 * CHUNK  # where a connection breaks


@dataclass
class Server:
    """What the local server serves, how it misbehaves at each path, and what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=lambda: {"/file": CONTENT})
    faults: list[str] = field(default_factory=list)  # one for each request; afterwards it behaves
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Serves with Range unless a fault says otherwise."""

    state: Server

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.state.requests.append((self.path, asked))
        fault = self.state.faults.pop(0) if self.state.faults else ""
        body = self.state.files.get(self.path)
        if body is None or fault.isdigit():
            return self.send_error(int(fault or 404))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and "no range" not in fault else 0
        if start >= len(body) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "silent":
            self.state.done.wait(5)
            return None
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "no length" not in fault:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = bytes(255 - b for b in body) if "corrupt" in fault else body
        self.wfile.write(body[start : start + CUT] if "cut" in fault or "stall" in fault else body[start:])
        if "reset" in fault:  # closing with linger 0 sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if "stall" in fault:
            self.state.done.wait(5)
        self.close_connection = True
        return None


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port, until the block ends."""
    handler = type("Bound", (Handler,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.state = Server(f"http://127.0.0.1:{http.server_address[1]}")
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield handler.state
    finally:
        handler.state.done.set()
        http.shutdown()
        http.server_close()


def fails(call: Callable[[], object], *words: str) -> str:
    """The message of the DownloadError that ``call`` raises, with all ``words`` in it."""
    with pytest.raises(DownloadError) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
    return str(raised.value)
