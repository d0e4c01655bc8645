"""An HTTP client for servers that may be slow or misbehave: every answer has a deadline and a largest size.

Requests go directly to the given address: proxies named in the environment are not used, and redirects are not followed.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from v05.messages import printable, quoted

if TYPE_CHECKING:
    from typing_extensions import Buffer

LEAST_ANSWER = 1 << 16  # bytes that every answer may have


class RefusedError(Exception):
    """The server answered with a status other than 2xx. The message has the status and the beginning of the answer."""


class HttpClient:
    """Sends requests to the server at `url`, with one connection per request.

    Args:
        url: http://host:port or https://host:port, optionally followed by a path.
        time_limit: seconds from the request to the last byte of its answer.

    `call` raises ValueError if `url` is not such an address.
    """

    def __init__(self, url: str, time_limit: float) -> None:
        self.url = url.rstrip("/")
        self._time_limit = time_limit

    def call(self, path: str, body: dict[str, Any] | None = None, most_bytes: int = LEAST_ANSWER) -> bytes:
        """POST `body` as JSON, or GET if `body` is None. Returns the bytes of the answer.

        Raises:
            RefusedError: the status is not 2xx.
            ValueError: the answer is larger than `most_bytes`.
            OSError, http.client.HTTPException: no connection, no answer within the time limit (TimeoutError), or an incomplete
            answer.
        """
        deadline = time.monotonic() + self._time_limit
        connection, prefix = self._connection()
        connected: socket.socket | None = None
        try:
            connection.connect()
            connected = connection.sock
            connection.sock = _Impatient(connected, deadline)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if data is None else "POST", prefix + path, data, headers)
            return _read(connection.getresponse(), most_bytes)
        except TimeoutError:
            raise TimeoutError(f"no complete answer within {self._time_limit:g} seconds") from None
        finally:
            connection.close()
            if connected is not None:
                connected.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """(connection that is not open yet, path of the address, which precedes every request's path)."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url!r} is not the address of a server; give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self._time_limit), parts.path


class _Impatient:
    """A connected socket, with the methods that http.client uses, that waits for the server until a deadline only.

    A socket's own timeout is not enough, because it restarts with every byte received.
    """

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._wait()
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self))

    def receive_into(self, buffer: Buffer) -> int:
        self._wait()
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        """Keep the socket open, because the answer may still be read. `HttpClient.call` closes it."""

    def _wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class _Stream(io.RawIOBase):
    """A readable stream from an `_Impatient` socket."""

    def __init__(self, source: _Impatient) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        return self._source.receive_into(buffer)


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """The body of an answer. Raises as `HttpClient.call`."""
    if not 200 <= response.status < 300:
        target = response.headers.get("Location")
        elsewhere = f"; it redirects to {printable(target)[:200]}, give that address if it is the server's" if target else ""
        words = quoted(response.read(LEAST_ANSWER))
        raise RefusedError(f"HTTP Error {response.status}: {printable(response.reason)} {words}{elsewhere}")
    announced = response.length or 0
    data = b"" if announced > most_bytes else response.read(most_bytes + 1)
    if max(announced, len(data)) > most_bytes:
        raise ValueError(f"the answer is larger than {most_bytes} bytes, the most that this request can need")
    if response.length:  # bytes that were announced but never received
        raise http.client.IncompleteRead(data, response.length)
    return data
