"""The engine of a vLLM server, against a server that answers as vLLM does, or misbehaves."""

import numpy as np
import pytest
import torch
from rollout_fakes import END, FakeServer, TroubleTask

from v05.budget import RolloutAllocator
from v05.rollout import Completion, Failure, Request, generate
from v05.rollout.scheduler import collect
from v05.rollout.verifier import InlineVerifier
from v05.rollout.vllm_engine import VllmServerEngine
from v05.tasks import Prompt

STATE = {"weight": torch.arange(3.0)}


class Tokenizer:
    eos_token_id = END

    def decode(self, tokens, skip_special_tokens):
        return " ".join(str(token) for token in tokens if token != END)


def engine_of(server, folder, **settings):
    return VllmServerEngine(server.url, folder / "weights", Tokenizer(), max_new_tokens=8, **settings)


def answer(trouble, folder):
    """What becomes of one rollout."""
    with FakeServer(lambda path, body, before: trouble if path == "/v1/completions" else None) as server:
        engine = engine_of(server, folder)
        engine.submit([7], [Request((5, 6), seed=3)])
        ((key, result),) = engine.poll()
        assert key == 7
        assert engine.poll() == []
        return engine, server, result


def test_a_completion_and_what_is_asked_for_it(tmp_path):
    engine, server, completion = answer(None, tmp_path)
    assert isinstance(completion, Completion)
    assert completion.tokens.tolist() == [5, 6, END]
    assert completion.logprobs.tolist() == [-0.5] * 3
    assert completion.finished
    assert engine.decode(completion) == "5 6"
    asked = server.calls[-1][1]
    assert {"model": "policy", "prompt": [5, 6], "seed": 3, "temperature": 1.0, "max_tokens": 8}.items() <= asked.items()
    assert asked["stop_token_ids"] == [END]


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ("cut", "the vLLM server did not answer: IncompleteRead"),
        (400, 'the vLLM server refused the request: HTTP Error 400: Bad Request {"error": "no"}'),
    ],
)
def test_a_rollout_that_fails_comes_back(trouble, error, tmp_path):
    _, _, result = answer(trouble, tmp_path)
    assert isinstance(result, Failure)
    assert error in result.error


def test_a_server_that_dies_fails_its_rollouts_and_takes_no_weights(tmp_path):
    with FakeServer() as server:
        engine = engine_of(server, tmp_path)
    engine.submit([0], [Request((5,), 0)])
    ((_, result),) = engine.poll()
    assert "the vLLM server did not answer" in result.error
    with pytest.raises(RuntimeError, match=r"the server does not reload weights from .*weights .*refused"):
        engine.update_weights(STATE.items())
    with pytest.raises(RuntimeError, match=f"engine.url={server.url}: no vLLM server answers there"):
        engine_of(server, tmp_path)


def test_weights_are_handed_over_in_a_folder_that_goes_at_the_end(tmp_path):
    with FakeServer() as server:
        engine = engine_of(server, tmp_path)
        engine.update_weights(STATE.items())
        assert (tmp_path / "weights" / "model.safetensors").is_file()
        (reload, told), (reset, _) = server.calls[-2:]
        assert (reload, reset) == ("/collective_rpc", "/reset_prefix_cache")
        assert told == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights")}}
        engine.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trouble", [404, "cut"])
def test_a_server_that_reloads_no_weights_is_explained(trouble, tmp_path):
    # 404: it does not run in development mode.
    with (
        FakeServer(lambda path, body, before: trouble if path == "/collective_rpc" else None) as server,
        pytest.raises(RuntimeError, match="VLLM_SERVER_DEV_MODE=1"),
    ):
        engine_of(server, tmp_path).update_weights(STATE.items())


def test_weights_that_cannot_be_written_are_explained(tmp_path):
    with FakeServer() as server:
        engine = engine_of(server, tmp_path)
        (tmp_path / "weights").write_text("")
        with pytest.raises(OSError, match=r"weights cannot be written .*; make room or give write access"):
            engine.update_weights(STATE.items())


def test_a_rollout_that_hangs_is_sampled_again(tmp_path):
    with FakeServer(lambda path, body, before: "hang" if path == "/v1/completions" and before == 1 else None) as server:
        engine = engine_of(server, tmp_path, time_limit=0.2)
        prompts = [Prompt(str(i), "", None) for i in range(3)]
        allocator = RolloutAllocator(rule="uniform", initial=2, maximum=2)
        verifier = InlineVerifier(TroubleTask())
        batch = collect(allocator, engine, verifier, prompts, [(0,)] * 3, np.full(3, 0.5), first_group=0)
        assert len(batch.failures) == 1
        assert "the vLLM server did not answer: TimeoutError" in batch.failures[0]
        assert batch.offsets.tolist() == [0, 2, 4, 6]
        assert batch.invalid == 0
        assert len(generate(engine, [Request((5,), seed) for seed in range(10)])) == 10


def test_close_waits_for_nobody(tmp_path):
    with FakeServer(lambda path, body, before: "hang" if path == "/v1/completions" else None) as server:
        engine = engine_of(server, tmp_path)
        engine.submit([0], [Request((5,), 0)])
        with pytest.raises(ValueError, match="update_weights: rollouts are in flight; poll until none is"):
            engine.update_weights(STATE.items())
        assert engine.poll(timeout=0.01) == []
        engine.close()
