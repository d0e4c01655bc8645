"""A double of what `VllmEngine` uses of vLLM, which sleeps, records the calls, and needs neither vLLM nor a GPU.

Its functions take those arguments of vLLM's own that `VllmEngine` gives; a test in tests/rollout/test_vllm_engine.py compares them
with the installed vLLM.
"""

import sys
import types
from types import SimpleNamespace

TAGS = {"weights", "kv_cache"}
END = 1


class Core:
    """`LLMEngine.engine_core`."""

    def __init__(self, calls):
        self.calls = calls

    def shutdown(self):
        self.calls.append(("shutdown",))


class LLMEngine:
    """Answers a request in one step with the token that the weights name. `calls` has what changed its state, in order."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.calls = []
        self.engine_core = Core(self.calls)
        self.waiting = []
        self.asleep = set()
        self.token = 5
        self.reload_error = None

    @classmethod
    def from_engine_args(cls, engine_args):
        return cls(engine_args)

    def add_request(self, request_id, prompt, params):
        self.waiting.append(request_id)
        return request_id

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        assert not self.asleep, "vLLM was asked for tokens while it slept"
        self.calls.append(("sample", self.token))
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in (self.token, END)]
        done, self.waiting = self.waiting, []
        answer = SimpleNamespace(token_ids=[self.token, END], logprobs=logprobs, finish_reason="stop")
        return [SimpleNamespace(request_id=key, finished=True, outputs=[answer]) for key in done]

    def collective_rpc(self, method, kwargs=None):
        assert "weights" not in self.asleep, "vLLM was given weights while it had no memory for them"
        self.calls.append((method,))
        if self.reload_error is not None:
            raise self.reload_error
        ((_, weight),) = kwargs["weights_iterator"]
        self.token = int(weight)
        return [None]

    def reset_prefix_cache(self):
        assert not self.asleep
        self.calls.append(("reset_prefix_cache",))
        return True

    def sleep(self, level=1):
        self.calls.append(("sleep", level))
        self.waiting = []
        self.asleep = set(TAGS)

    def wake_up(self, tags=None):
        self.calls.append(("wake_up", tags))
        self.asleep -= TAGS if tags is None else set(tags)
        return not self.asleep

    def is_sleeping(self):
        return bool(self.asleep)


def install(monkeypatch, sleeps=True):
    """Have `import vllm` find the double; `sleeps` is whether its platform can."""
    vllm, platforms, sampling = (types.ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.sampling_params"))
    vllm.LLMEngine = LLMEngine
    vllm.EngineArgs = vllm.SamplingParams = SimpleNamespace
    platforms.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: sleeps, device_type="cuda" if sleeps else "cpu")
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=None)
    for module in (vllm, platforms, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
