"""`token_statistics` computes log-probabilities, entropies and sums of squared probabilities of tokens, with gradients.

It reads logits, or hidden states and the output layer that turns them into logits, and never stores the softmax of all tokens.
`cpu.py` and `kernels/token_statistics` compute sums over the vocabulary, which `sums.py` defines. `v05/reference/tokens.py`
specifies the statistics and their gradients.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from v05.arguments import flag
from v05.energy import token_energy
from v05.ops.token_statistics.inputs import IGNORED, read_chunk, read_hidden, read_logits, read_targets, read_temperature
from v05.ops.token_statistics.library import of_hidden_states, of_logits
from v05.ops.token_statistics.linear import Layer
from v05.ops.token_statistics.shards import name_of

__all__ = ["IGNORED", "TokenStatistics", "token_statistics"]


class TokenStatistics(NamedTuple):
    """Statistics of a policy's distribution pi at each token. The first three have the shape of the targets.

    Attributes:
        logprob: float32, log pi(y) of the target y, nats; 0 for ignored tokens.
        entropy: float32, nats; 0 for ignored tokens.
        sum_pi_squared: float32, the sum of pi(v)^2 over the vocabulary, without a gradient; 0 for ignored tokens.
        nonfinite: int64 scalar, the number of tokens, other than ignored ones, whose logprob is NaN or infinite.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    sum_pi_squared: torch.Tensor
    nonfinite: torch.Tensor

    @property
    def energy(self) -> torch.Tensor:
        """Float32, shaped like the targets: the squared norm of the gradient of log pi(y) in logits / temperature (`v05.energy`).

        0 for ignored tokens. It carries no gradient.
        """
        energy: torch.Tensor = token_energy(-self.logprob.detach().expm1(), self.sum_pi_squared)
        return energy


def token_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: Literal["cpu", "triton"] | None = None,
) -> TokenStatistics:
    """Compute statistics of pi = softmax(logits / temperature) at each token, with gradients through `logprob` and `entropy`.

    V is the size of the vocabulary and H the width of the hidden states. torch.compile and torch.export accept the call as one
    registered operator.

    Args:
        logits: (tokens, V) or (N, T, V) float32, bfloat16 or float16. Rows may have any stride, so a slice such as
            `logits[:, :-1]` is read without a copy. With `weight`, pass hidden states (tokens, H) or (N, T, H) here instead.
        targets: (tokens,) or (N, T) int32 or int64 ids in 0 .. V - 1. The statistics and the gradient of a token with the target
            IGNORED (-100) are 0, whatever its logits are.
        weight: (V, H), the matrix of the output layer. Logits are hidden @ weight.T + bias. They are computed for `chunk` tokens at
            a time, in the forward pass and again in the backward pass, so (tokens, V) is never stored. On the CPU the products
            are computed in float32, on a GPU in the dtype of the hidden states; `weight` may have another dtype. Logits are
            float32.
        bias: (V,), the bias of the output layer. Requires `weight`.
        temperature: the finite number above 0 that logits are divided by.
        chunk: how many tokens' logits are computed together. None takes 64 MiB of logits on the CPU and 512 MiB on a GPU. Requires
            `weight`.
        inplace_backward: write the gradient of the logits into the memory of the logits, which saves a buffer of their size. The
            logits must not be needed afterwards, and a second backward pass is impossible; torch raises an error if one is tried.
            Not available with `weight` or under torch.compile.
        process_group: the ranks over which the vocabulary is split in equal shards. Logits, or weight and bias, hold the columns
            of this rank. Targets are ids of the whole vocabulary; targets and hidden states are the same on all ranks. Every rank
            gets the statistics of the whole vocabulary. The upstream gradients must be the same on all ranks; the gradient of
            the hidden states is summed over the ranks.
        backend: "cpu" or "triton"; None chooses by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        TokenStatistics. Compared with float64, relative errors are below 1e-6 for `logprob`, also for probabilities near 1 and
        logits of +-1e4, and below 1e-5 for gradients. A logit of -inf masks a token of the vocabulary. If a row has a NaN or +inf
        logit, or only -inf, the statistics and the gradient of that token are NaN. If the target itself is masked, its `logprob` is
        -inf. Both cases are counted in `nonfinite`.

    Raises:
        ValueError: an argument is invalid. The message names the argument, the value seen and the remedy. On a GPU the values of
            targets are not inspected, so that nothing synchronises: an id outside the vocabulary has a `logprob` of -inf.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> out = token_statistics(logits, torch.tensor([1, -100]))
        >>> out.logprob.tolist(), out.entropy.tolist()  # log(1/2), log(2)
        ([-0.6931471824645996, 0.0], [0.6931471824645996, 0.0])
        >>> out.logprob.sum().backward()
        >>> logits.grad.tolist()
        [[-0.5, 0.5], [0.0, 0.0]]
    """
    group = name_of(process_group)
    temperature, in_place = read_temperature(temperature), flag("inplace_backward", inplace_backward)
    if weight is not None:
        if in_place:
            raise ValueError(
                "inplace_backward=True: with weight no logits are given, so their memory cannot be reused; leave it out"
            )
        layer = Layer(read_hidden(logits, weight, bias), weight, bias)
        made = of_hidden_states(layer, read_targets(targets, logits), temperature, read_chunk(chunk), backend, group)
    else:
        for name, given in {"bias": bias, "chunk": chunk}.items():
            if given is not None:
                raise ValueError(f"{name}: needs weight, the output layer; give it with hidden states, or leave {name} out")
        if in_place and torch.compiler.is_compiling():
            raise ValueError("inplace_backward=True: torch.compile plans the memory itself; leave it out")
        made = of_logits(read_logits(logits), read_targets(targets, logits), temperature, in_place, backend, group)
    logprob, entropy, sum_pi_squared, nonfinite, _ = made
    return TokenStatistics(logprob, entropy, sum_pi_squared.detach(), nonfinite)
