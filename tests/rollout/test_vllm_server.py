"""The engine of a vLLM server, against a fake server that answers as vLLM does, or misbehaves."""

import json
import math
import os

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from helpers.rollout_fakes import END, FakeServer, TroubleTask
from v05.budget import RolloutAllocator
from v05.rollout import Completion, Failure, Request, generate
from v05.rollout.scheduler import collect
from v05.rollout.verifier import InlineVerifier
from v05.rollout.vllm_engine import VllmServerEngine
from v05.tasks import Prompt

STATE = {"weight": torch.arange(3.0)}


class Tokenizer:
    eos_token_id = END

    def __len__(self):
        return 100

    def decode(self, tokens, skip_special_tokens):
        return " ".join(str(token) for token in tokens if token != END)


def engine_of(server, folder, **settings):
    return VllmServerEngine(server.url, folder / "weights", Tokenizer(), max_new_tokens=8, **settings)


def answer(trouble, folder):
    """Sample one rollout from a server with this trouble. Returns the engine, the server, and the rollout's result."""
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
    assert completion.energy == pytest.approx(6 * (1 - math.exp(-0.5)) ** 2)  # from the sampled tokens alone
    assert completion.finished
    assert engine.decode(completion) == "5 6"
    asked = server.calls[-1][1]
    assert {"model": "policy", "prompt": [5, 6], "seed": 3, "temperature": 1.0, "max_tokens": 8}.items() <= asked.items()
    assert asked["stop_token_ids"] == [END]
    with FakeServer() as server:
        engine = engine_of(server, tmp_path)
        engine.submit([7], [Request((5, 6), seed=3, greedy=True)])
        engine.poll()
        assert server.calls[-1][1]["temperature"] == 0


def test_completions_end_at_every_id_of_the_generation_config(tmp_path):
    with FakeServer() as server:
        engine = engine_of(server, tmp_path, generation_config=GenerationConfig(eos_token_id=[END, 9]))
        engine.submit([7], [Request((5, 6), seed=3)])
        engine.poll()
        assert server.calls[-1][1]["stop_token_ids"] == [END, 9]


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


def choice(**changes):
    """The body of vLLM's answer with one completion, with changes."""
    answered = {"token_ids": [5, 6, END], "logprobs": {"token_logprobs": [-0.5, -0.5, 0]}, "finish_reason": "stop"} | changes
    return json.dumps({"choices": [{name: value for name, value in answered.items() if value is not ...}]}).encode()


def logprobs(*values):
    return {"token_logprobs": list(values)}


def test_what_a_completion_may_be(tmp_path):
    full = choice(token_ids=[5] * 8, logprobs=logprobs(*[-1.0] * 8), finish_reason="length")
    assert [answer(reply, tmp_path)[2].finished for reply in (choice(), full)] == [True, False]
    ended = choice(token_ids=[5] * 7 + [END], logprobs=logprobs(*[-1.0] * 8), finish_reason="length")  # ends with the last token
    assert answer(ended, tmp_path)[2].finished


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (choice(token_ids=[5, 100, END]), "answered with token 100; the policy has 0 to 99"),
        (choice(token_ids=[5, -1, END]), "answered with token -1;"),
        (choice(token_ids=[5, 2**70, END]), "answered with token 1180591620717411303424;"),
        (choice(token_ids=[5, 6.0, END]), "token_ids.1=6.0: Input should be a valid integer"),
        (choice(token_ids=[5, True, END]), "token_ids.1=True: Input should be a valid integer"),
        (choice(token_ids=["5", 6, END]), "token_ids.0='5': Input should be a valid integer"),
        (choice(token_ids=None), "token_ids=None: Input should be a valid array"),
        (choice(token_ids=...), "token_ids"),
        (choice(token_ids=[], logprobs=logprobs()), "0 tokens and 0 log-probabilities; 1 to 8 of both"),
        (choice(token_ids=[5] * 9, logprobs=logprobs(*[-1.0] * 9), finish_reason="length"), "9 tokens and 9 log-probabilities"),
        (choice(token_ids=[5, END]), "2 tokens and 3 log-probabilities"),
        (choice(logprobs=logprobs(-0.5, 0.5, 0.0)), "the log-probability 0.5;"),
        (choice(logprobs=logprobs(-0.5, math.nan, 0.0)), "Input should be a finite number"),
        (choice(logprobs=logprobs(-0.5, -math.inf, 0.0)), "Input should be a finite number"),
        (choice(logprobs=logprobs(-0.5, None, 0.0)), "token_logprobs.1=None: Input should be a valid number"),
        (choice(logprobs=logprobs(-0.5, "-0.5", 0.0)), "token_logprobs.1='-0.5': Input should be a valid number"),
        (choice(logprobs=None), "logprobs=None"),
        (choice(finish_reason="abort"), "for the reason 'abort'"),
        (choice(finish_reason=None), "for the reason None"),
        (choice(finish_reason=...), "finish_reason"),
        (choice(token_ids=[5, 6, 7]), "by 'stop' at token 7; it was to end at one of [1]"),
        (choice(token_ids=[5, END, END]), "it was to end at one of [1]"),
        (choice(token_ids=[5, 6, 7], finish_reason="length"), "cut the rollout off after 3 of 8 tokens; start it with a larger"),
        (b'{"choices": []}', "choices=[]: List should have at least 1 item"),
        (choice()[:-2] + b", " + choice()[13:], "List should have at most 1 item"),
        (b"{}", "choices: Field required"),
        (b"null", "Input should be an object"),
        (b"[1]", "Input should be an object"),
        (b"", "Invalid JSON"),
        (b"<html>\x1b[31m\x1b]0;taken over\x07", "'<html>\\x1b]0;taken over\\x07', which is no answer of vLLM"),
        (b"[" * 10_000, "Invalid JSON: recursion limit exceeded"),
    ],
)
def test_what_no_vllm_server_answers_is_a_failure(reply, error, tmp_path):
    _, _, result = answer(reply, tmp_path)
    assert isinstance(result, Failure)
    assert error in result.error


@pytest.mark.parametrize("reply", [b"{}", b"[]", b"null", b'{"data": []}', b'{"data": [{"id": 3}]}', b"hello", b'{"data": [{}]}'])
def test_another_server_at_the_address_is_told_from_vllm(reply, tmp_path):
    with (
        FakeServer(lambda path, body, before: reply) as server,
        pytest.raises(
            RuntimeError, match=f"{server.url}: no vLLM server answers there .* answered '.*', which is no answer of vLLM"
        ),
    ):
        engine_of(server, tmp_path)


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


def test_only_the_weights_that_were_written_are_deleted(tmp_path):
    with FakeServer() as server:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "notes.txt").touch()
        engine = engine_of(server, tmp_path)
        engine.update_weights(STATE.items())
        engine.close()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["notes.txt"]


def test_a_folder_behind_a_link_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").touch()
    (tmp_path / "weights").symlink_to(precious)
    with FakeServer() as server:
        engine_of(server, tmp_path).close()  # closed before the first sync
        engine = engine_of(server, tmp_path)
        engine.update_weights(STATE.items())
        engine.close()
        assert [path.name for path in precious.iterdir()] == ["notes.txt"]
        (precious / "model.safetensors").write_bytes(b"somebody's")
        engine = engine_of(server, tmp_path)
        with pytest.raises(ValueError, match=r"weights holds model.safetensors, which this engine did not write; give an empty"):
            engine.update_weights(STATE.items())
        engine.close()
    assert (precious / "model.safetensors").read_bytes() == b"somebody's"
    assert (tmp_path / "weights").is_symlink()


def test_weights_beside_which_a_server_would_read_others_are_refused(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "weights" / "model.safetensors").touch()  # left by a process that was killed
    with FakeServer() as server:
        engine = engine_of(server, tmp_path)
        with pytest.raises(ValueError, match=r"holds model-00001-of-00002\.safetensors, which this engine did not write"):
            engine.update_weights(STATE.items())
        (tmp_path / "weights" / "model-00001-of-00002.safetensors").unlink()
        engine.update_weights(STATE.items())
        assert (tmp_path / "weights" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
        engine.close()


def umask():
    os.umask(found := os.umask(0))
    return found


@pytest.mark.parametrize("trouble", [404, "cut"])
def test_a_server_that_reloads_no_weights_is_explained(trouble, tmp_path):
    # A server answers 404 if it is not in development mode.
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
