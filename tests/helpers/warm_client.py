"""Stands for a process of the warm Python (warm.py). It imports little, so that it starts at once."""

import json
import os
import resource
import signal
import socket
import struct
from typing import NoReturn

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(folder: str, cold: str, arguments: list[str]) -> NoReturn:
    """Run `arguments` as Python would, in a process forked from the server of `folder`, or by the Python `cold` if the server is
    gone or the arguments hold options that only a new Python can obey.
    """
    program = parse(arguments)
    connection = socket.socket(socket.AF_UNIX)
    try:
        if program is None:
            raise FileNotFoundError
        connection.connect(f"{folder}/socket")
    except OSError:
        os.execv(cold, [cold, *arguments])
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [file for file in files if file != connection.fileno() and inheritable(file)]
    request = {
        **program,
        "files": files,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask(),
        "file_size": resource.getrlimit(resource.RLIMIT_FSIZE),
        "ignored": [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN],
    }
    data = json.dumps(request).encode()
    data = struct.pack("=I", len(data)) + data
    sent = socket.send_fds(connection, [data], files)
    for number in FORWARDED:
        if number not in request["ignored"]:
            signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    connection.sendall(data[sent:])
    answer = connection.recv(4)
    status = struct.unpack("=i", answer)[0] if answer else -signal.SIGKILL
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def parse(arguments: list[str]) -> dict | None:
    """What to run, or None for what only a Python from the start can do."""
    unbuffered = False
    while arguments and arguments[0] in ("-u", "-B"):
        unbuffered |= arguments[0] == "-u"
        arguments = arguments[1:]
    if not arguments:
        return None
    first, *rest = arguments
    kind = {"-m": "module", "-c": "code"}.get(first, "file")
    if kind == "file":
        return None if first.startswith("-") else {"kind": kind, "program": first, "arguments": rest, "unbuffered": unbuffered}
    return {"kind": kind, "program": rest[0], "arguments": rest[1:], "unbuffered": unbuffered} if rest else None


def inheritable(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # the listing's own
        return False


def umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask
