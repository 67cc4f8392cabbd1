"""A server that speaks S3 over HTTP on this machine, and a relay before it that can watch, cut and heal the connection.

S3_ENDPOINT names a running store whose keys are in the environment (shown so with Ceph's RADOS gateway). Without it the
server is moto's: it answers as S3 does, over real HTTP, but nobody keeps data in it.
"""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
NO_PATIENCE = {"AWS_MAX_ATTEMPTS": "1"}  # of botocore, below the tries of s3fs


@contextmanager
def running(folder: Path) -> Iterator[int]:
    """The port of a server; ended by its pid."""
    if "S3_ENDPOINT" in os.environ:
        yield int(os.environ["S3_ENDPOINT"].rpartition(":")[2].strip("/"))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "server").open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait_for(f"http://127.0.0.1:{port}/")
        yield port
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"no answer from {url}")


class Relay:
    """Hands bytes on between a port of its own and the server's.

    Attributes:
        cut: while set, every connection is refused or broken.
        on_put: called with an object's path before a request that begins to write it is handed on.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.cut = False
        self.on_put: Callable[[str], None] = lambda _: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut = True
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._hand_on, args=pair, daemon=True).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                if asks and (found := re.match(rb"PUT (/[^ ?]*)", block)):
                    self.on_put(found[1].decode())
                if self.cut:
                    break
                sink.sendall(block)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
