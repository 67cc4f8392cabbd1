"""A foreign program that listens on the port where ranks try to meet."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread


@contextmanager
def other_program(answer: bytes | None, *, address: str = "127.0.0.1") -> Iterator[int]:
    """Yield its port. It replies to anything with `answer` and closes; None: it accepts and stays silent."""
    with socket.create_server((address, 0)) as server:
        kept = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    kept.append(connection)
                    if answer is not None:
                        connection.recv(64)
                        connection.sendall(answer)
                        connection.close()

        Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()
