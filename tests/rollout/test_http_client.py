"""Every answer has a deadline and a maximum size, and comes from the server at the given address."""

import contextlib
import http.client
import itertools
import socket
import threading
import time

import pytest

from v05.rollout.http_client import HttpClient, RefusedError

HEAD = b"HTTP/1.1 200 OK\r\n"
LIMIT = 1.0  # seconds


@contextlib.contextmanager
def serving(*parts, pause=0.0):
    """A server that answers every request with these parts, one after another. An iterator may be endless: it is sent until the
    client stops reading. Yields the server's address and the list of requests.
    """
    asked = []
    over = threading.Event()

    def serve():
        while not over.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(1 << 16)
                    if request.startswith(b"POST"):  # the body may arrive later than the head
                        request += connection.recv(1 << 16) if request.endswith(b"\r\n\r\n") else b""
                    asked.append(request)
                    for part in itertools.chain.from_iterable(part if not isinstance(part, bytes) else [part] for part in parts):
                        connection.sendall(part)
                        if over.wait(pause):
                            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            over.set()
            with contextlib.suppress(OSError), socket.create_connection(listener.getsockname(), 1):
                pass


def dripping(data):
    return [bytes([byte]) for byte in data]


def test_an_answer_and_what_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no proxy listens there
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving(HEAD + b"Content-Length: 2\r\n\r\n{}") as (url, asked):
        assert HttpClient(url + "/base/", LIMIT).call("/v1/x", {"a": 1}) == b"{}"
        assert HttpClient(url, LIMIT).call("/v1/y") == b"{}"
    assert asked[0].startswith(b"POST /base/v1/x HTTP/1.1\r\n")
    assert asked[0].endswith(b'\r\n\r\n{"a": 1}')
    assert asked[1].startswith(b"GET /v1/y HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD + b"Content-Length: 100\r\n\r\n", dripping(b" " * 100)),
        (dripping(HEAD + b"X: 0123456789012345678901234567890123456789\r\n\r\n"),),
        (HEAD, itertools.repeat(b"X: y\r\n")),
        (itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", itertools.repeat(b"1\r\na\r\n")),
        (itertools.repeat(b""),),
    ],
    ids=["body", "headers", "more headers", "continue", "chunks", "nothing"],
)
def test_an_answer_that_drips_ends_at_the_time_limit(parts):
    with serving(*parts, pause=0.1) as (url, _):
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="no complete answer within 1 seconds"):
            HttpClient(url, LIMIT).call("/")
        assert time.monotonic() - started < 3 * LIMIT


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD + b"\r\n", itertools.repeat(b" " * 65536)),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", itertools.repeat(b"10000\r\n" + b" " * 65536 + b"\r\n")),
        (HEAD + b"Content-Length: 4500000000\r\n\r\n", itertools.repeat(b" " * 65536)),
    ],
    ids=["until closed", "chunked", "announced"],
)
def test_an_answer_without_end_is_not_read(parts):
    with serving(*parts) as (url, _), pytest.raises(ValueError, match="the answer is larger than 1000000 bytes"):
        HttpClient(url, 60.0).call("/", most_bytes=1_000_000)


def test_an_answer_of_just_the_largest_size_is_read():
    with serving(HEAD + b"\r\n" + b"a" * 1000) as (url, _):
        assert HttpClient(url, LIMIT).call("/", most_bytes=1000) == b"a" * 1000
        with pytest.raises(ValueError, match="larger than 999 bytes"):
            HttpClient(url, LIMIT).call("/", most_bytes=999)


def test_half_an_answer_is_none():
    with serving(HEAD + b"Content-Length: 100\r\n\r\n{}") as (url, _), pytest.raises(http.client.IncompleteRead):
        HttpClient(url, LIMIT).call("/")


def test_a_redirect_is_named_and_not_followed():
    with serving(HEAD + b"Content-Length: 2\r\n\r\n{}") as (elsewhere, asked):
        head = b"HTTP/1.1 302 Found\r\nLocation: " + elsewhere.encode() + b"/v1/models\r\nContent-Length: 0\r\n\r\n"
        with (
            serving(head) as (url, _),
            pytest.raises(RefusedError, match=f"HTTP Error 302: Found .*it redirects to {elsewhere}/v1/models, give that address"),
        ):
            HttpClient(url, LIMIT).call("/v1/models")
    assert not any(request.startswith(b"GET") for request in asked)


def test_a_refusal_is_quoted_without_what_drives_a_terminal():
    words = b"no\x1b[31m such\x1b]0;taken over\x07\r\n" + b"path" * 1000
    with (
        serving(b"HTTP/1.1 404 Not\x1b[2J Found\r\n\r\n" + words) as (url, _),
        pytest.raises(RefusedError, match=r"HTTP Error 404: Not Found no such\\x1b\]0;taken over\\x07 path") as refused,
    ):
        HttpClient(url, LIMIT).call("/")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "", "file:///etc/passwd"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(ValueError, match=r"is not the address of a server; give one such as|could not be cast to integer"):
        HttpClient(url, LIMIT).call("/")
