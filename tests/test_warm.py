"""The warm Python of the tests behaves as a Python that is started by itself."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import warm

PRINT_STATE = """
import os, resource, sys
print(sys.argv[1:], os.getcwd(), os.environ["MARK"], "HOME" in os.environ, resource.getrlimit(resource.RLIMIT_FSIZE)[0])
print(sys.stdin.read(), end="", file=sys.stderr)
"""


def both(*arguments, **options):
    """The results of a cold and of a warm Python, which must be equal."""
    cold, warmed = (
        subprocess.run([python, *arguments], capture_output=True, text=True, **options)
        for python in (sys.executable, warm.python())
    )
    assert warmed.returncode == cold.returncode
    assert warmed.stdout == cold.stdout
    return cold, warmed


def test_a_process_gets_what_its_caller_gives(tmp_path):
    environment = {"MARK": "here", "PATH": os.environ["PATH"]}
    cold, warmed = both("-c", PRINT_STATE, "a", "b c", input="text", env=environment, cwd=tmp_path)
    assert warmed.stderr == cold.stderr == "text"
    (tmp_path / "script.py").write_text("import sys, os; print(sys.argv, __file__, __name__, sys.path[0])")
    both("script.py", "x", cwd=tmp_path)
    both("-u", "-m", "script", "x", cwd=tmp_path, env=os.environ | {"PYTHONPATH": "/nowhere"})


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(7)",
        "import sys; sys.exit('words')",
        "raise ValueError('wrong')",
        "raise KeyboardInterrupt",
        "import os; os._exit(9)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import multiprocessing as m\nm.get_context('forkserver').Process(target=print, args=('child',)).start()",
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'print(1); import sys; sys.exit(5)']))",
    ],
)
def test_a_process_ends_as_a_cold_one_does(code):
    cold, warmed = both("-c", code)
    assert bool(warmed.stderr) == bool(cold.stderr)
    assert not cold.stderr or warmed.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]


def test_a_signal_reaches_the_process():
    code = "import time\ntry:\n print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n exit('stopped')"
    with subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "stopped\n"
    assert process.returncode == 1


def test_a_killed_client_takes_its_process_along():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
        inner = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(inner, 0)
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)


def test_open_files_keep_their_numbers():
    reader, writer = os.pipe()
    with os.fdopen(reader) as read:
        code = f"import os; os.write({writer}, b'through')"
        subprocess.run([warm.python(), "-c", code], pass_fds=[writer], check=True)
        os.close(writer)
        assert read.read() == "through"
