"""Tasks and engines that misbehave on purpose. Importable by name, so that verifier processes can make the tasks."""

import os
import signal
import time

import numpy as np

from v05.rollout import Completion, Failure


class TroubleTask:
    """Scores a completion by what it says: a number is the reward; "hang", "die", "raise" do so; others are wrong."""

    def verify(self, prompt, completion):
        if completion == "hang":
            time.sleep(3600)
        if completion == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if completion == "raise":
            raise RuntimeError("not a completion I know")
        return float(completion)


class BrokenTask:
    def __init__(self):
        raise RuntimeError("this task cannot be made")


class CoinEngine:
    """Succeeds with the rate prompt[0] by the request's seed, after a delay by the seed; `reproducible` as asked.

    Args:
        capacity: rollouts in flight.
        order: seeds the order in which rollouts finish; None is first in, first out.
        fails: (request, earlier attempts at it) -> it fails.
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
        raise NotImplementedError

    def close(self):
        pass
