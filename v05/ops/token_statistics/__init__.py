"""`token_statistics`: logits, or the hidden states that they are made of, in; log-probabilities, entropies and sums of squared
probabilities of tokens out, with gradients, and without ever holding a softmax of all tokens.

The sums over the vocabulary are made by `cpu.py` or by the kernels of `kernels/token_statistics`; `sums.py` says what they are.
`v05/reference/tokens.py` specifies the statistics and their gradients.
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
    """What a policy's distribution says of each token.

    logprob: float32, of the shape of the targets, nats: log pi(y). entropy: likewise, nats. sum_pi_squared: likewise, the sum of
    pi(v)^2 over the vocabulary; it carries no gradient. All are 0 for ignored tokens. nonfinite: int64 number, on the device of the
    others, of tokens that are not ignored and whose logprob is NaN or infinite.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    sum_pi_squared: torch.Tensor
    nonfinite: torch.Tensor

    @property
    def energy(self) -> torch.Tensor:
        """The squared norm of the gradient of log pi(y) in the logits (`v05.energy`), at temperature 1; it carries no gradient.
        0 for ignored tokens.
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
    """Statistics of pi = softmax(logits / temperature) at each token, with gradients through `logprob` and `entropy`.

    Args:
        logits: (tokens, V) or (N, T, V) float32, bfloat16 or float16, with any stride between rows: a slice such as
            `logits[:, :-1]` is read where it lies. With `weight`, hidden states (tokens, H) or (N, T, H) instead.
        targets: (tokens,) or (N, T) int64 ids in 0 .. V - 1, or IGNORED (-100): statistics and gradient of such a token are 0,
            whatever its logits are.
        weight: (V, H), the output layer: logits are hidden @ weight.T + bias, made for `chunk` tokens at a time, forward and again
            backward, so that (tokens, V) never exists. The products are in the dtype of the hidden states (on the CPU in
            float32), logits in float32. It may be of another dtype than the hidden states.
        bias: (V,), of the output layer.
        temperature: above 0; logits are divided by it.
        chunk: tokens whose logits are made together; None: as many as take 64 MiB on the CPU, 512 MiB on a GPU. Read with `weight`.
        inplace_backward: write the gradient of the logits into their own memory, which spares as much again. Nothing else may
            need the logits afterwards, and no second backward is possible; torch says so if it is tried. Not with `weight`, and not
            under torch.compile.
        process_group: the vocabulary is split over its ranks in equal shards: logits, or weight and bias, hold the columns of
            this rank, targets are ids of the whole vocabulary, the same on all ranks, as are hidden states. Every rank gets the
            statistics of the whole, and the upstream gradients must be the same on all ranks; the gradient of hidden states is
            summed over them.
        backend: "cpu" or "triton"; None goes by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        TokenStatistics. Against float64, relative errors are below 1e-6 for `logprob`, also where the probability is near 1 and
        for logits of +-1e4, and below 1e-5 for gradients. A logit of -inf masks a token of the vocabulary. A NaN or +inf logit, or
        a row of nothing but -inf, make the statistics and the gradient of that token NaN, and are counted in `nonfinite`, as is a
        target that is masked, whose `logprob` is -inf.

    Raises:
        ValueError: names the argument, the value seen and the remedy. On a GPU targets are not inspected, so that nothing
            synchronises: an id outside the vocabulary has a `logprob` of -inf.

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
            raise ValueError("inplace_backward=True: with weight no logits are given whose memory it could take; leave it out")
        layer = Layer(read_hidden(logits, weight, bias), weight, bias)
        made = of_hidden_states(layer, read_targets(targets, logits), temperature, read_chunk(chunk), backend, group)
    else:
        for name, given in {"bias": bias, "chunk": chunk}.items():
            if given is not None:
                raise ValueError(
                    f"{name}: needs weight, the layer that makes logits of hidden states; give it, or leave {name} out"
                )
        if in_place and torch.compiler.is_compiling():
            raise ValueError("inplace_backward=True: torch.compile plans the memory itself; leave it out")
        made = of_logits(read_logits(logits), read_targets(targets, logits), temperature, in_place, backend, group)
    logprob, entropy, sum_pi_squared, nonfinite, _ = made
    return TokenStatistics(logprob, entropy, sum_pi_squared.detach(), nonfinite)
