"""The providers that compute the loss from logits or hidden states: v05, plain torch, and unchanged peers from their wheels."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from losses.problem import CLIP, Problem, Start, plain_loss
from v05.ops import policy_loss, token_statistics

Provider = Callable[[Problem], torch.Tensor]
OURS, IN_PLACE, PLAIN, COMPILED = "v05", "v05, in place", "plain torch", "torch.compile"
LIGER, TRL = "Liger", "TRL"


def ours(problem: Problem, in_place: bool = False) -> torch.Tensor:
    made = token_statistics(problem.given, problem.targets, weight=problem.weight, inplace_backward=in_place)
    return policy_loss(made.logprob, problem.old, problem.advantages, mask=problem.mask, clip_low=CLIP, clip_high=CLIP).loss


def plain(problem: Problem) -> torch.Tensor:
    logits = problem.given if problem.weight is None else problem.given @ problem.weight.t()
    logprob = torch.log_softmax(logits.float(), dim=-1).gather(-1, problem.targets[..., None]).squeeze(-1)
    return plain_loss(logprob, problem)


def providers(start: Start, wheels: Path | None, device: torch.device) -> Mapping[str, Provider]:
    """The providers by name, without peers whose wheel is not in the folder `wheels` or that need a GPU where there is none."""
    made: dict[str, Provider] = {OURS: ours}
    if start == "logits":
        made[IN_PLACE] = lambda problem: ours(problem, in_place=True)
    made[PLAIN] = plain
    if device.type == "cuda":
        made[COMPILED] = torch.compile(plain, dynamic=False)
    for name, peer in {LIGER: liger, TRL: trl}.items():
        if wheels is not None and (folder := _unpacked(wheels, name)) is not None:
            found = peer(folder, start, device)
            made |= {} if found is None else {name: found}
    return made


def liger(folder: Path, start: Start, device: torch.device) -> Provider | None:
    """Liger's fused linear GRPO loss, or its GRPO kernel for logits."""
    _importable(folder)
    if start == "hidden":
        fused = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
        loss = fused.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=device.type == "cuda", loss_type="bnpo")

        def linear(problem: Problem) -> torch.Tensor:
            given = (problem.given, problem.weight, problem.targets, problem.mask.float(), problem.advantages)
            made: torch.Tensor = loss(*given, old_per_token_logps=problem.old)[0]
            return made

        return linear
    if device.type != "cuda":
        return None
    kernel = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

    def of_logits(problem: Problem) -> torch.Tensor:
        made: torch.Tensor = kernel(
            _with_one_more(problem),
            problem.old,
            None,
            problem.targets,
            problem.advantages,
            problem.mask,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=True,
            loss_type="bnpo",
            reduce=True,
        )[0]
        return made

    return of_logits


_WITH_ONE_MORE: WeakKeyDictionary[torch.Tensor, torch.Tensor] = WeakKeyDictionary()


def _with_one_more(problem: Problem) -> torch.Tensor:
    """(N, T + 1, V) logits in Liger's layout, made before anything is timed. Liger overwrites them."""
    if problem.given not in _WITH_ONE_MORE:
        longer = torch.nn.functional.pad(problem.given.detach(), (0, 0, 0, 1)).requires_grad_()
        _WITH_ONE_MORE[problem.given] = longer
    longer = _WITH_ONE_MORE[problem.given]
    longer.grad = None
    return longer


def trl(folder: Path, start: Start, device: torch.device) -> Provider | None:
    """The plain loss on TRL's log-probabilities, from tiles of the output layer or from TRL's kernel for logits."""
    if device.type != "cuda":  # without a GPU, TRL falls back to plain torch, tile by tile
        return None
    kernels = folder / "trl" / "kernels"
    if start == "hidden":
        function = _module("chunked_logprob", kernels / "chunked_logprob.py").ChunkedLogProbFunction

        def linear(problem: Problem) -> torch.Tensor:
            hidden, targets = problem.given.flatten(0, 1), problem.targets.flatten()
            logprob = function.apply(hidden, problem.weight, None, targets, 1.0, 8192, None, 1.0, ("entropy", "log_sum_sq_probs"))[
                0
            ]
            return plain_loss(logprob.view_as(problem.targets), problem)

        return linear
    statistics = _module("logprob_entropy", kernels / "logprob_entropy.py").selective_log_softmax_and_entropy
    return lambda problem: plain_loss(statistics(problem.given, problem.targets)[0], problem)


@cache
def _unpacked(wheels: Path, name: str) -> Path | None:
    """A folder with the contents of the peer's newest wheel, or None if there is no wheel."""
    found = sorted(wheels.glob({LIGER: "liger_kernel-*.whl", TRL: "trl-*.whl"}[name]))
    if not found:
        return None
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    with zipfile.ZipFile(found[-1]) as archive:
        archive.extractall(folder)
    return folder


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _module(name: str, file: Path) -> Any:
    """Import a single file of TRL. TRL's package would import transformers, but this file needs only its check for Triton."""
    package = "trl_kernels"
    for stub, content in {
        "transformers": {},
        "transformers.utils": {"is_triton_available": lambda: True},
        f"{package}.trainer": {},
        f"{package}.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_: torch.no_grad()},
        package: {"__path__": []},
        f"{package}.kernels": {"__path__": []},
    }.items():
        if stub not in sys.modules:
            sys.modules[stub] = ModuleType(stub)
            vars(sys.modules[stub]).update(content)
    spec = importlib.util.spec_from_file_location(f"{package}.kernels.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
