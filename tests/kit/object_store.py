"""A local server that speaks S3 over HTTP, and a relay in front of it that can observe, cut and restore the connection.

S3_ENDPOINT names a running store whose keys are in the environment (tested with Ceph's RADOS gateway). By default the
server is moto's, which answers like S3 over real HTTP but is not a production store.
"""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
NO_RETRIES = {"AWS_MAX_ATTEMPTS": "1"}  # of botocore; s3fs retries on top of it


@contextmanager
def running() -> Iterator[int]:
    """Start a server if S3_ENDPOINT names none, and yield its port."""
    if "S3_ENDPOINT" in os.environ:
        yield int(os.environ["S3_ENDPOINT"].rpartition(":")[2].strip("/"))
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


class Relay:
    """Forwards bytes between its own port and the server's.

    Attributes:
        is_cut: while set, every connection is refused or broken.
        on_put: called with an object's path before a request that writes it is forwarded.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.is_cut = False
        self.on_put: Callable[[str], None] = lambda _: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.is_cut = True
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                if is_request and (found := re.match(rb"PUT (/[^ ?]*)", block)):
                    self.on_put(found[1].decode())
                if self.is_cut:
                    break
                sink.sendall(block)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
