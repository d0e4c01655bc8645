"""vLLM engines: in this process, and behind an OpenAI-compatible server (python -m vllm.entrypoints.openai.api_server).

Both take token ids, draw each rollout with its own seed, stop where the embedded engine stops, and return log-probabilities of the
distribution that was sampled from. vLLM's sampling depends on what a rollout is batched with through rounding only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from v05.files import explained
from v05.rollout import Completion, Failure, Request, decode, refuse_update_in_flight

NO_ANSWER = (OSError, http.client.HTTPException, ValueError)  # refused, no connection, an answer cut short, another's answer


class VllmEngine:
    """A vLLM engine in this process.

    Args:
        path: model folder, with the weights to start from.
        tokenizer: the policy's.
        max_new_tokens: length limit of a completion, its end-of-sequence token included.
        capacity: rollouts sampled at once.
        dtype: of weights and activations: "float32", "bfloat16" or "float16".
        kv_cache_gib: memory for keys and values, GiB; None is what vLLM takes, which on a GPU is nearly all.
        max_model_len: tokens of a prompt and its completion; None is the model's own limit.
        temperature, top_p: as in `TransformersEngine`. vLLM's log-probabilities are those before them.

    Raises ImportError, naming the extra, where vLLM is not installed.
    """

    reproducible = True

    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        capacity: int = 512,
        dtype: str = "float32",
        kv_cache_gib: float | None = 1.0,
        max_model_len: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise ImportError(f"the vLLM engine cannot import {error.name!r}; install it with: pip install 'v05[vllm]'") from error
        self.capacity = capacity
        self._tokenizer = tokenizer
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(path),
                dtype=dtype,
                max_num_seqs=capacity,
                kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
                max_model_len=max_model_len,
                generation_config="vllm",
                enforce_eager=not torch.cuda.is_available(),
                disable_log_stats=True,
            )
        )
        self._parameters: Callable[[int], Any] = lambda seed: SamplingParams(
            **_sampling(tokenizer, max_new_tokens, seed) | {"temperature": temperature, "top_p": top_p},
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._refused: list[tuple[int, Completion | Failure]] = []

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        for key, request in zip(keys, requests, strict=True):
            try:
                self._engine.add_request(str(key), {"prompt_token_ids": list(request.prompt)}, self._parameters(request.seed))
            except Exception as error:  # a prompt too long for the model, for one
                self._refused.append((key, Failure(f"vLLM refused the request: {error}")))

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        finished, self._refused = self._refused, []
        while not finished and self._engine.has_unfinished_requests():
            finished = [(int(output.request_id), _result(output.outputs[0])) for output in self._engine.step() if output.finished]
        return finished

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(bool(self._refused) or self._engine.has_unfinished_requests())
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state)})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop the keys and values of the old weights")

    def close(self) -> None:
        self._engine.engine_core.shutdown()


class VllmServerEngine:
    """A vLLM server elsewhere, one HTTP request a rollout.

    Weights reach it through a folder that both see, from which it reloads them. It must run in vLLM's development mode for that:

        VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL

    Args:
        url: of the server, http://host:port.
        weights: a folder for weights alone, which the server reads under the same name; `close` deletes it.
        tokenizer: the policy's.
        max_new_tokens, capacity: as in `VllmEngine`.
        time_limit: seconds that the server may take to answer; a rollout that takes longer comes back as a failure.

    Raises RuntimeError if the server does not answer, or refuses weights; OSError if `weights` cannot be written.
    """

    reproducible = False

    def __init__(
        self,
        url: str,
        weights: Path,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        capacity: int = 512,
        time_limit: float = 600.0,
    ) -> None:
        self.capacity = capacity
        self._url = url.rstrip("/")
        self._weights = weights.resolve()
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._time_limit = time_limit
        self._in_flight = 0
        self._finished: queue.SimpleQueue[tuple[int, Completion | Failure]] = queue.SimpleQueue()
        try:
            self._model = self._call("/v1/models")["data"][0]["id"]
        except NO_ANSWER as error:
            raise RuntimeError(
                f"engine.url={url}: no vLLM server answers there ({error}); start one or correct the address"
            ) from error

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        self._in_flight += len(keys)
        for key, request in zip(keys, requests, strict=True):  # daemons: neither close nor the process's end waits for them
            threading.Thread(target=self._answer, args=(key, request), daemon=True, name="vllm-server").start()

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        finished: list[tuple[int, Completion | Failure]] = []
        with contextlib.suppress(queue.Empty):
            while len(finished) < self._in_flight:
                finished.append(self._finished.get(block=not finished, timeout=timeout))
        self._in_flight -= len(finished)
        return finished

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(self._in_flight > 0)
        with explained(self._weights, "the run goes on from its checkpoint"):
            self._weights.mkdir(parents=True, exist_ok=True)
            # Cloned: tied weights share memory, which the format has no word for, and vLLM wants them all by name.
            save_file({name: tensor.detach().cpu().clone() for name, tensor in state}, self._weights / "model.safetensors")
        try:
            self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}})
            self._call("/reset_prefix_cache", {})
        except NO_ANSWER as error:
            raise RuntimeError(
                f"engine.url={self._url}: the server does not reload weights from {self._weights} ({error}); have it run, with "
                "VLLM_SERVER_DEV_MODE=1, where it sees that folder"
            ) from error

    def close(self) -> None:
        shutil.rmtree(self._weights, ignore_errors=True)

    def _answer(self, key: int, request: Request) -> None:
        """A thread's work. Whatever happens, the rollout comes back."""
        try:
            result = self._complete(request)
        except Exception as error:
            result = Failure(f"the vLLM server did not answer: {error!r}")
        self._finished.put((key, result))

    def _complete(self, request: Request) -> Completion | Failure:
        asked = {
            **_sampling(self._tokenizer, self._max_new_tokens, request.seed),
            "model": self._model,
            "prompt": list(request.prompt),
            "return_token_ids": True,
        }
        try:
            (choice,) = self._call("/v1/completions", asked)["choices"]
        except urllib.error.HTTPError as error:
            with error:
                words = error.read().decode(errors="replace")[:500]
            return Failure(f"the vLLM server refused the request: {error} {words}")
        return _completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST `body`, or GET without one; what the server answers, read from JSON, None for an empty answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self._time_limit) as response:
            answer = response.read()
        return json.loads(answer) if answer else None


def _sampling(tokenizer: Any, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Sampling parameters that leave the distribution alone, and stop at the tokenizer's end token and nowhere else."""
    return {
        "seed": seed,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_new_tokens,
        "ignore_eos": True,
        "stop_token_ids": [tokenizer.eos_token_id],
        "skip_special_tokens": False,
        "logprobs": 0,
    }


def _result(output: Any) -> Completion | Failure:
    logprobs = [of_token[token].logprob for token, of_token in zip(output.token_ids, output.logprobs, strict=True)]
    return _completion(output.token_ids, logprobs, output.finish_reason)


def _completion(tokens: Sequence[int], logprobs: Sequence[float], finish_reason: str | None) -> Completion | Failure:
    if finish_reason not in ("stop", "length"):
        return Failure(f"vLLM ended the rollout for the reason {finish_reason!r}")
    return Completion(np.array(tokens, dtype=np.int64), np.array(logprobs, dtype=np.float32), finish_reason == "stop")
