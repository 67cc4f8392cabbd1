"""A real HTTP server on a thread; the path selects whether it stalls, breaks, returns errors or ignores ranges."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CONTENT = bytes(range(256)) * 4000  # 1 MB
HALF = len(CONTENT) // 2


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range) of every request."""
        self.over = threading.Event()
        self.content, self.step = content, 0

    def url(self, manner: str, file: str = "file.tar.gz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{manner}/{file}"

    def manners(self) -> list[str]:
        return [path.split("/")[1] for path, _ in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    """Behaves as the first component of the path specifies."""

    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        manner, byte_range = self.path.split("/")[1], self.headers.get("Range")
        before = self.server.manners().count(manner)
        self.server.requests.append((self.path, byte_range))
        content = self.server.content
        if manner in ("404", "500", "503"):
            self.send_error(int(manner))
            return
        if manner == "wrong":
            content, byte_range = b"<html>another file</html>", None
        if manner == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.url("good"))
            self.end_headers()
            return
        if manner in ("norange", "unsized"):
            byte_range = None
        start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1]) if byte_range else 0
        if byte_range and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if byte_range else 200)
        if byte_range:
            shift = 1 if manner == "otherpart" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")
        if manner != "unsized":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        broken = manner in ("breaks", "stalls") or (manner in ("breaksonce", "stallsonce") and before == 0)
        end = HALF if broken else start + self.server.step if manner == "bits" else None
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if broken and manner.startswith("stalls"):
            self.server.over.wait(10)
        elif manner == "slow":
            time.sleep(0.5)


@contextmanager
def serving(content: bytes = CONTENT) -> Iterator[Server]:
    """Serve this content until the context ends."""
    server = Server(content)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
