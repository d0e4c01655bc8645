"""Training one policy in several processes, as `torchrun -m v05 train` does.

Every rank draws all prompts of a step and samples the rollouts of its own block of prompts. The ranks then exchange the rollouts,
so that each holds the whole batch and makes the same decisions. Only sampling, evaluation and the backward passes are divided among
ranks. Gradients are those of the whole step's loss. Only rank 0 writes files. All ranks must see the run directory and the policy's
folder.

"ddp": each rank holds the whole policy (torch's DistributedDataParallel). "fsdp2": parameters, gradients and optimiser state are
sharded by layer (torch's fully_shard). The engine then samples from an unsharded copy, because ranks decode different numbers of
steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from v05.rollout import Completion
from v05.rollout.scoring import checkpointed_layers, completion_logprobs
from v05.train.config import Distributed

PATIENCE = timedelta(hours=2)  # how long ranks wait for each other, for example during a warm start
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of a job, and communication among them. A single process sends nothing."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes files: only rank 0 does."""
        return self.rank == 0

    def block(self, count: int) -> slice:
        """This rank's slice of `count` items. The slices of all ranks, in order, cover the items."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over ranks, in place and on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join_world() -> World:
    """Join the job that torchrun's environment variables describe; without them, a world of this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group(_take_device(), timeout=PATIENCE)
    return World(dist.get_rank(), size)


def _take_device() -> str:
    """Select a GPU for this rank, if there is any. Returns the backends for CPU and GPU tensors.

    NCCL refuses two ranks on one GPU, so such ranks use gloo.
    """
    devices = torch.cuda.device_count()
    if devices == 0:
        return "gloo"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % devices)
    return "cpu:gloo,cuda:nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= devices else "cpu:gloo,cuda:gloo"


def leave_world(status: int) -> None:
    """End this process if it is part of a job, without tearing down the interpreter; else do nothing.

    Call it after everything is closed. Gloo's threads release a collective's tensors some time after the collective ends. A thread
    that needs the interpreter for that, while the interpreter is being torn down, aborts the process (pytorch/pytorch#179291).
    DTensor's caches keep the process group, and so these threads, alive to the end.
    """
    if dist.is_initialized():
        if status == 0:  # after a failure, ranks could wait here for each other forever
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Scorer(torch.nn.Module):
    """The policy as a module from N rollouts to log-probabilities, (N, width), so that DDP and FSDP2 see one forward pass."""

    def __init__(self, model: PreTrainedModel, pad: int, checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        self._pad = pad
        self._checkpointing = checkpointing
        if checkpointing:
            checkpointed_layers(model)  # raises if there are none

    def forward(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], width: int) -> torch.Tensor:
        # FSDP2 registers hooks on the output, which must not be a view.
        return completion_logprobs(self.model, prompts, completions, self._pad, width, self._checkpointing).clone()


def distribute(scorer: Scorer, strategy: Distributed, world: World) -> torch.nn.Module:
    """`scorer`, with backward passes that average gradients over ranks.

    "fsdp2" shards the model in place. The shards are float32, and gathered parameters have the model's present dtype. All ranks
    must make the same number of passes, with the same `width`.
    """
    if world.size == 1:
        return scorer
    if strategy == "ddp":
        return DistributedDataParallel(scorer)
    model = scorer.model
    mesh = init_device_mesh(model.device.type, (world.size,))
    precision = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(scorer, mesh=mesh, mp_policy=precision)
    return scorer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor, detached. All ranks must call this for a sharded tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Parameters = Mapping[str, torch.Tensor]  # by name, sharded or not


def whole_parameters(parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and unsharded values of the parameters. All ranks must iterate together."""
    for name, parameter in parameters.items():
        yield name, whole(parameter)


def whole_optimizer_state(parameters: Parameters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimiser's unsharded tensors, named as in "exp_avg/model.norm.weight". All ranks must iterate together."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", whole(value)


@torch.no_grad()
def load_parameters(parameters: Parameters, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Set parameters to unsharded values by name."""
    for name, value in values:
        parameters[name].copy_(_laid_out_like(parameters[name], value))


def load_optimizer_state(
    parameters: Parameters, optimizer: torch.optim.Optimizer, values: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Set the optimiser's tensors to unsharded values named as in `whole_optimizer_state`."""
    for path, value in values:
        key, name = path.split("/", 1)
        # AdamW keeps its step counter on the CPU.
        optimizer.state[parameters[name]][key] = value if key == "step" else _laid_out_like(parameters[name], value)


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else value
