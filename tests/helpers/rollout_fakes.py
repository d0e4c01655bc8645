"""Tasks, engines and a server that misbehave on purpose. Verifier processes can make the tasks, which are importable by name."""

import builtins
import contextlib
import http.server
import json
import os
import resource
import signal
import threading
import time

import numpy as np

from v05.rollout import Completion, Failure


class TroubleTask:
    """Does what a completion says: a number is the reward; a name of `TROUBLES` or of an exception happens; other text raises."""

    def verify(self, prompt, completion):
        if completion in TROUBLES:
            return TROUBLES[completion](prompt)
        if completion in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError", "RecursionError", "RuntimeError"):
            raise getattr(builtins, completion)
        return float(completion)


def write_a_file(prompt):
    with open(prompt.text, "w") as file:
        file.write("x")
    return 1.0


def no_process(prompt):
    raise ChildProcessError("out of processes")


TROUBLES = {
    "hang": lambda prompt: time.sleep(3600),
    "die": lambda prompt: os.kill(os.getpid(), signal.SIGKILL),
    "abort": lambda prompt: os.abort(),
    "leave": lambda prompt: os._exit(0),
    "raise": lambda prompt: [][0],
    "fill memory": lambda prompt: float(len(bytearray(2**30))),
    "print": lambda prompt: [print("\x1b[2J" * 10**5), os.write(2, b"x" * 10**5)] and 1.0,
    "write": write_a_file,
    "dump": lambda prompt: float(resource.getrlimit(resource.RLIMIT_CORE)[0] != 0),
    "miss a process": no_process,
    "return none": lambda prompt: None,
    "return nan": lambda prompt: float("nan"),
    "return infinity": lambda prompt: float("inf"),
    "return text": lambda prompt: "1.0",
    "return true": lambda prompt: True,
}


class DoomedTask:
    """Ends its process in every verification."""

    def verify(self, prompt, completion):
        os._exit(1)


class StuckTask:
    def verify(self, prompt, completion):
        time.sleep(3600)


class BrokenTask:
    def __init__(self):
        raise RuntimeError("this task cannot be made")


class Unreadable:
    """Can be pickled for another process, but cannot be unpickled there."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise ValueError("made for one process")


class CoinEngine:
    """Succeeds with probability prompt[0], decided by the request's seed.

    Args:
        capacity: rollouts in flight.
        order: seeds the order in which rollouts finish; None: first in, first out.
        reproducible: the engine's attribute of this name.
        fails: called with (request, number of earlier attempts at it); whether this attempt fails.
    """

    def __init__(self, capacity=64, *, order=None, reproducible=True, fails=lambda request, attempts: False):
        self.capacity = capacity
        self.reproducible = reproducible
        self.fails = fails
        self.order = None if order is None else np.random.default_rng(order)
        self.in_flight = []
        self.most_in_flight = 0
        self.attempts = {}
        self.submitted = []

    def submit(self, keys, requests):
        self.in_flight += zip(keys, requests, strict=True)
        self.submitted += [request.prompt for request in requests]
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def poll(self, timeout=None):
        if self.order is not None:
            self.order.shuffle(self.in_flight)
        count = max(1, len(self.in_flight) // 3)
        finished, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        return [(key, self.result(request)) for key, request in finished]

    def result(self, request):
        attempts = self.attempts.get(request.seed, 0)
        self.attempts[request.seed] = attempts + 1
        if self.fails(request, attempts):
            return Failure("the coin rolled under the table")
        success = np.random.default_rng(request.seed).random() < request.prompt[0]
        return Completion(np.array([int(success)]), np.zeros(1, dtype=np.float32), True)

    def decode(self, completion):
        return str(completion.tokens[0])

    def update_weights(self, state):
        raise AssertionError("a coin has no weights; nothing may sync it")

    def close(self):
        pass


END = 1  # the token that FakeServer's completions end with


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers at `url` as a vLLM server does: every completion is the prompt's own tokens and END.

    `trouble` is called with (path, body, number of earlier calls of that path) and chooses the answer: None (the usual one), an
    HTTP status, "cut" (the body ends too early), "hang" (no answer until the server is closed), or the bytes of another body.
    `calls` lists the paths and bodies so far.
    """

    daemon_threads = True

    def __init__(self, trouble=lambda path, body, before: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trouble = trouble
        self.calls = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *error):
        self.closed.set()
        self.shutdown()
        super().__exit__(*error)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        server = self.server
        with server.lock:
            trouble = server.trouble(self.path, body, [path for path, _ in server.calls].count(self.path))
            server.calls.append((self.path, body))
        if trouble == "hang":
            server.closed.wait()
            return
        text = json.dumps({"error": "no"} if isinstance(trouble, int) else self.reply(body)).encode()
        text = trouble if isinstance(trouble, bytes) else text
        with contextlib.suppress(OSError):  # the client may be gone
            self.send_response(trouble if isinstance(trouble, int) else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if trouble == "cut" else text)

    def reply(self, body):
        if self.path == "/v1/models":
            return {"data": [{"id": "policy"}]}
        if self.path != "/v1/completions":
            return {}
        tokens = [*body["prompt"], END]
        logprobs = {"token_logprobs": [-0.5] * len(tokens)}
        return {"choices": [{"token_ids": tokens, "logprobs": logprobs, "finish_reason": "stop"}]}

    def log_message(self, format, *args):
        pass
