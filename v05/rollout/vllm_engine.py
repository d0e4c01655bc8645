"""vLLM engines: in this process, and behind an OpenAI-compatible server (python -m vllm.entrypoints.openai.api_server).

Both take token ids, draw each rollout with its own seed, stop where the embedded engine stops, and return log-probabilities of the
distribution that was sampled from. vLLM's sampling depends on what a rollout is batched with through rounding only.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file

from v05.files import explained, replacing
from v05.messages import explained_places, printable, quoted
from v05.pretrained import load_generation_config
from v05.rollout import Completion, Failure, NotFiniteError, Request, decode, refuse_update_in_flight
from v05.rollout.http_client import LEAST_ANSWER, HttpClient, RefusedError
from v05.rollout.limits import stop_tokens

# No connection, no whole answer in time, half an answer, a refusal, another's answer.
NO_ANSWER = (OSError, http.client.HTTPException, RefusedError, ValueError)
WEIGHTS = "model.safetensors"  # in the folder that a server reads
BYTES_A_TOKEN, BYTES_A_PROMPT_TOKEN = 4096, 16  # of an answer at most: its id, its text three times, its log-probabilities
MODELS_BYTES = 1 << 20  # of the list of models at most
LARGEST_VOCABULARY = 1 << 24  # where a tokenizer does not say how many tokens it knows
GREEDY = {"temperature": 0.0}  # the sampling parameter that takes the likeliest token
ROUNDING = 1e-4  # by which a log-probability may be above 0, nats


class Answer(BaseModel):
    """What is read of a server's answer; the rest of it is passed over."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Model(Answer):
    id: Annotated[str, Field(min_length=1)]


class Models(Answer):
    """/v1/models."""

    data: Annotated[list[Model], Field(min_length=1)]


class Logprobs(Answer):
    token_logprobs: list[float]


class Choice(Answer):
    token_ids: list[int]
    logprobs: Logprobs
    finish_reason: str | None


class Completions(Answer):
    """/v1/completions of one prompt, with `logprobs` and `return_token_ids`."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


T = TypeVar("T", bound=Answer)


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
        sleep: the level of vLLM's sleep mode that `sleep` uses. Both levels drop the keys and values; level 1 keeps the weights in
            CPU memory, level 2 drops them too. None: `sleep` does nothing.

    Raises ImportError, naming the extra, where vLLM is not installed; ValueError, with `sleep`, where vLLM cannot sleep.
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
        sleep: Literal[1, 2] | None = None,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise ImportError(f"the vLLM engine cannot import {error.name!r}; install it with: pip install 'v05[vllm]'") from error
        if sleep is not None and not current_platform.is_sleep_mode_available():
            raise ValueError(
                f"engine.sleep={sleep} needs a CUDA or ROCm device and a build of vLLM for it; this vLLM runs on "
                f"device_type={current_platform.device_type!r} and cannot give its memory back; leave engine.sleep out"
            )
        stops = stop_tokens(tokenizer, load_generation_config(path))
        kv_cache_bytes = None if kv_cache_gib is None else int(kv_cache_gib * 2**30)
        self.capacity = capacity
        self._tokenizer = tokenizer
        self._sleep_level = sleep
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(path),
                dtype=dtype,
                max_num_seqs=capacity,
                kv_cache_memory_bytes=kv_cache_bytes,
                max_model_len=max_model_len,
                enable_sleep_mode=sleep is not None,
                generation_config="vllm",
                trust_remote_code=False,
                enforce_eager=not torch.cuda.is_available(),
                disable_log_stats=True,
                **_share_of_gpu(kv_cache_bytes),
            )
        )
        warped = {"temperature": temperature, "top_p": top_p}
        self._parameters: Callable[[Request], Any] = lambda request: SamplingParams(
            **_sampling(stops, max_new_tokens, request.seed) | (GREEDY if request.greedy else warped),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._refused: list[tuple[int, Completion | Failure]] = []

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        if self._engine.is_sleeping():  # vLLM would queue the requests and never answer
            raise RuntimeError("the vLLM engine is asleep and samples nothing; update_weights wakes it")
        for key, request in zip(keys, requests, strict=True):
            try:
                self._engine.add_request(str(key), {"prompt_token_ids": list(request.prompt)}, self._parameters(request))
            except Exception as error:  # a prompt too long for the model, for one
                self._refused.append((key, Failure(f"vLLM refused the request: {error}")))

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        finished, self._refused = self._refused, []
        while not finished and self._engine.has_unfinished_requests():
            ended = [output for output in self._engine.step() if output.finished]
            finished = [(int(output.request_id), self._result(output.outputs[0])) for output in ended]
        return finished

    def sleep(self) -> None:
        """Give back the GPU memory of weights, keys and values until the next `update_weights`. Does nothing at level None.

        Raises ValueError while rollouts are in flight: vLLM would abort them.
        """
        if self._sleep_level is None:
            return
        if self._in_flight():
            raise ValueError("sleep: rollouts are in flight; poll until none is")
        self._engine.sleep(level=self._sleep_level)

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As for every engine. An engine that is asleep wakes with the new weights; if they do not load, it stays asleep."""
        refuse_update_in_flight(self._in_flight())
        asleep = self._engine.is_sleeping()
        if asleep:
            torch.cuda.empty_cache()  # vLLM maps memory beside torch's cache, which still holds what the gradients took
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state)})
        if asleep:  # only now, so that the keys and values are not held beside what loading takes
            self._engine.wake_up(tags=["kv_cache"])
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop the keys and values of the old weights")

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _in_flight(self) -> bool:
        return bool(self._refused) or self._engine.has_unfinished_requests()

    def _result(self, output: Any) -> Completion | Failure:
        logprobs = [of_token[token].logprob for token, of_token in zip(output.token_ids, output.logprobs, strict=True)]
        if not np.isfinite(logprobs).all():
            raise NotFiniteError("the policy is not finite: vLLM gives a token no log-probability")
        asked = self._parameters(Request((), 0))
        return _completion(output.token_ids, logprobs, output.finish_reason, asked.stop_token_ids, asked.max_tokens)


def _share_of_gpu(kv_cache_bytes: int | None) -> dict[str, float]:
    """`gpu_memory_utilization` where the size of the cache is given: the cache's share of the GPU.

    vLLM sizes nothing by it then, but refuses to start unless that share of the GPU is free. Its default is nearly the whole GPU,
    which is never free beside a trainer. On a CPU nothing is checked.
    """
    if kv_cache_bytes is None or not torch.cuda.is_available():
        return {}
    return {"gpu_memory_utilization": min(kv_cache_bytes / torch.cuda.mem_get_info()[1], 1.0)}


class VllmServerEngine:
    """A vLLM server elsewhere, one HTTP request a rollout.

    Weights reach it through a folder that both see, from which it reloads them. It must run in vLLM's development mode for that:

        VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL

    An answer that no vLLM server gives to what was asked comes back as a failure.

    Args:
        url: of the server, http://host:port.
        weights: a folder for weights alone, which the server reads under the same name. `close` deletes the file that was written
            to it, and the folder if nothing else is in it and it is no link.
        tokenizer: the policy's.
        max_new_tokens, capacity: as in `VllmEngine`.
        generation_config: the policy's, for the ids that end a completion; None is the tokenizer's alone.
        time_limit: seconds until the last byte of an answer; a rollout that takes longer comes back as a failure.
        vocabulary: token ids that the model may sample; None is what the tokenizer knows.

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
        generation_config: Any = None,
        time_limit: float = 600.0,
        vocabulary: int | None = None,
    ) -> None:
        self.capacity = capacity
        self._server = HttpClient(url, time_limit)
        self._weights = weights.absolute()
        self._written = False
        self._tokenizer = tokenizer
        self._stops = stop_tokens(tokenizer, generation_config)
        self._max_new_tokens = max_new_tokens
        known = len(tokenizer) if isinstance(tokenizer, Sized) else LARGEST_VOCABULARY
        self._vocabulary = known if vocabulary is None else vocabulary
        self._in_flight = 0
        self._finished: queue.SimpleQueue[tuple[int, Completion | Failure]] = queue.SimpleQueue()
        try:
            self._model = self._ask(Models, "/v1/models", most_bytes=MODELS_BYTES).data[0].id
        except NO_ANSWER as error:
            raise RuntimeError(
                f"engine.url={url}: no vLLM server answers there ({printable(str(error))}); start one or correct the address"
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
        self._refuse_other_weights()
        with explained(self._weights, "the run resumes from its checkpoint"), replacing(self._weights / WEIGHTS) as scratch:
            # Cloned: tied weights share memory, which the format has no word for, and vLLM wants them all by name.
            save_file({name: tensor.detach().cpu().clone() for name, tensor in state}, scratch)
        self._written = True
        try:
            self._server.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}})
            self._server.call("/reset_prefix_cache", {})
        except NO_ANSWER as error:
            raise RuntimeError(
                f"engine.url={self._server.url}: the server does not reload weights from {self._weights} "
                f"({printable(str(error))}); have it run, with VLLM_SERVER_DEV_MODE=1, where it sees that folder"
            ) from error

    def close(self) -> None:
        if not self._written:
            return
        with contextlib.suppress(OSError):  # the run is over, whatever becomes of the folder
            (self._weights / WEIGHTS).unlink()
            if not self._weights.is_symlink():
                self._weights.rmdir()  # refused where something else is in it

    def _refuse_other_weights(self) -> None:
        """The server would read weights that are already in the folder, and those of a folder that is a link would be replaced."""
        mine = {WEIGHTS} if self._written or not self._weights.is_symlink() else set()
        if others := sorted({path.name for path in self._weights.glob("*.safetensors")} - mine):
            raise ValueError(f"weights={self._weights} holds {others[0]}, which this engine did not write; give an empty folder")

    def _answer(self, key: int, request: Request) -> None:
        """A thread's work. Whatever happens, the rollout comes back."""
        try:
            result = self._complete(request)
        except Exception as error:
            result = Failure(f"the vLLM server did not answer: {error!r}")
        self._finished.put((key, result))

    def _complete(self, request: Request) -> Completion | Failure:
        asked = {
            **_sampling(self._stops, self._max_new_tokens, request.seed),
            **(GREEDY if request.greedy else {}),
            "model": self._model,
            "prompt": list(request.prompt),
            "return_token_ids": True,
        }
        size = LEAST_ANSWER + BYTES_A_TOKEN * self._max_new_tokens + BYTES_A_PROMPT_TOKEN * len(request.prompt)
        try:
            (choice,) = self._ask(Completions, "/v1/completions", asked, most_bytes=size).choices
        except RefusedError as error:
            return Failure(f"the vLLM server refused the request: {error}")
        except ValueError as error:
            return Failure(f"the vLLM server gave no completion: {error}")
        tokens, logprobs, reason = choice.token_ids, choice.logprobs.token_logprobs, choice.finish_reason
        if outside := [token for token in tokens if not 0 <= token < self._vocabulary]:
            return Failure(f"the vLLM server answered with token {outside[0]}; the policy has 0 to {self._vocabulary - 1}")
        if reason == "length" and len(tokens) < self._max_new_tokens:
            return Failure(
                f"the vLLM server cut the rollout off after {len(tokens)} of {self._max_new_tokens} tokens; start it with a larger "
                "--max-model-len"
            )
        return _completion(tokens, logprobs, reason, asked["stop_token_ids"], self._max_new_tokens)

    def _ask(self, expected: type[T], path: str, body: dict[str, Any] | None = None, *, most_bytes: int) -> T:
        """The server's answer; ValueError, with what was answered and what is wrong with it, where it is none."""
        answer = self._server.call(path, body, most_bytes)
        try:
            return expected.model_validate_json(answer)
        except ValidationError as error:
            raise ValueError(
                f"{path} answered '{quoted(answer)}', which is no answer of vLLM: {printable(explained_places(error))}"
            ) from None


def _sampling(stops: Sequence[int], max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Sampling parameters that leave the distribution alone, and stop at these tokens and nowhere else."""
    return {
        "seed": seed,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_new_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(stops),
        "skip_special_tokens": False,
        "logprobs": 0,
    }


def _completion(
    tokens: Sequence[int], logprobs: Sequence[float], finish_reason: str | None, ends: Sequence[int], limit: int
) -> Completion | Failure:
    """A rollout of at most `limit` tokens that was to stop at the tokens `ends`."""
    if finish_reason not in ("stop", "length"):
        return Failure(f"vLLM ended the rollout for the reason {finish_reason!r}")
    if len(tokens) != len(logprobs) or not 1 <= len(tokens) <= limit:
        return Failure(f"vLLM gave {len(tokens)} tokens and {len(logprobs)} log-probabilities; 1 to {limit} of both were asked for")
    if wrong := [value for value in logprobs if not (math.isfinite(value) and value <= ROUNDING)]:
        return Failure(f"vLLM gave the log-probability {wrong[0]}; those of sampled tokens are finite and at most 0")
    ended = [token in ends for token in tokens]
    if any(ended[:-1]) or (finish_reason == "stop" and not ended[-1]):
        return Failure(f"vLLM ended the rollout by {finish_reason!r} at token {tokens[-1]}; it was to end at one of {ends}")
    return Completion(np.array(tokens, dtype=np.int64), np.array(logprobs, dtype=np.float32), ended[-1])
