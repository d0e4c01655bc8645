"""A `python` that has imported v05, torch and the trainer already, so that a process starts in a twentieth of a second.

    subprocess.run([warm.python(), "-m", "v05", "train", ...])

A server imports the modules once, and forks a process for each call with the caller's arguments, environment, working directory,
open files and file size limit. The program that the caller starts is a small client (warm_client.py): it forwards signals to that
process, exits with its status, and takes it along when it is killed, though a moment later. Processes that it starts in turn by
sys.executable or multiprocessing are warm as well.

Use sys.executable instead in tests of imports, of missing packages, of memory, and where a process is killed.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

PRELOADED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "plotly.graph_objects",
    "reasoning_gym",
    "sklearn.linear_model",
    "v05.benchmarks",
    "v05.cli",
    "v05.prior.v0",
    "v05.train.compare",
    "v05.train.suite",
    "v05.train.trainer",
)
HELPERS = Path(__file__).resolve().parent
FREE_NUMBERS = 500  # of open files, from here on

_folder: Path | None = None
_server: subprocess.Popen | None = None  # ends when its input is closed, at the latest with this process


def python() -> str:
    """The path of the warm Python; that of the usual one on systems without pidfd_open, which Linux has."""
    global _folder, _server
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="v05-warm-"))
        client = f"#!{sys.executable} -SsE\nimport sys\nsys.path.insert(0, {str(HELPERS)!r})\nfrom warm_client import main\n"
        for name, first in (("python", []), ("python3", []), ("v05", ["-m", "v05"])):
            (_folder / name).write_text(f"{client}main({str(_folder)!r}, {sys.executable!r}, [*{first!r}, *sys.argv[1:]])\n")
            (_folder / name).chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(_folder / "socket"))
        listener.listen(64)  # clients that connect while the server imports wait
        call = f"warm.serve({listener.fileno()}, {str(_folder)!r})"
        server = f"import sys; sys.path.insert(0, {str(HELPERS.parent)!r}); from helpers import warm; {call}"
        _server = subprocess.Popen(
            [sys.executable, "-c", server], stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True
        )
        atexit.register(_server.communicate)
        listener.close()
    return str(_folder / "python")


def path() -> str:
    """A PATH on which the warm `python`, `python3` and `v05` come first."""
    return f"{Path(python()).parent}:{os.environ['PATH']}"


def serve(listening: int, folder: str) -> None:
    """Fork a process for every client, until its own input is closed."""
    del sys.path[:2]  # what the server's own command put there
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that the processes go on sharing these objects' memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a minder
    listener = socket.socket(fileno=listening)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(folder)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            break
        connection.close()
    request, files = _read(connection)
    process = os.fork()
    if process:
        for file in files:
            os.close(file)
        _mind(connection, process)
    connection.close()
    _become(request, files, folder)
    error: BaseException | None = None
    try:
        _run(request["kind"], request["program"], request["arguments"])
    except BaseException as raised:
        error = raised
    _end(error)


def _read(connection: socket.socket) -> tuple[dict, list[int]]:
    data, files, _, _ = socket.recv_fds(connection, 1 << 16, 64)
    (length,) = struct.unpack_from("=I", data)
    while len(data) < 4 + length:
        data += connection.recv(1 << 16)
    return json.loads(data[4:]), files


def _mind(connection: socket.socket, process: int) -> None:
    """Forward the client's signals to the process, and its exit status to the client."""
    ended = os.pidfd_open(process)
    waited_for = [connection, ended]
    while True:
        ready, _, _ = select.select(waited_for, [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("=i", status))
            os._exit(0)
        signals = connection.recv(64)
        if not signals:  # the client was killed
            os.kill(process, signal.SIGKILL)
            waited_for = [ended]
        for number in signals:
            os.kill(process, number)


def _become(request: dict, files: list[int], folder: str) -> None:
    """Run the client's program as if it had been started by itself."""
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, FREE_NUMBERS) for file in files]  # no number is overwritten before it is copied
    for file in files:
        os.close(file)
    for file, number in zip(aside, request["files"], strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    os.chdir(request["directory"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    resource.setrlimit(resource.RLIMIT_FSIZE, tuple(request["file_size"]))
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if request["unbuffered"] else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.executable = f"{folder}/python"
    multiprocessing.set_executable(sys.executable)


def _run(kind: str, program: str, arguments: list[str]) -> None:
    sys.argv = ["-c" if kind == "code" else program, *arguments]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if kind == "module":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    name = "<string>"
    if kind == "file":
        main.__file__ = name = str(Path(program).absolute())
        program = Path(program).read_text()
    sys.path.insert(0, str(Path(name).resolve().parent) if kind == "file" else "")
    exec(compile(program, name, "exec"), vars(main))


def _end(error: BaseException | None) -> None:
    """Exit as Python does, but leave its objects alone: to delete the server's modules one by one takes a second."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if status and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a file that is closed
            file.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)
