"""Float32 masters of the weights that a policy in bfloat16 learns.

An update of AdamW is often smaller than the distance between a bfloat16 weight and the next one, and would be rounded away. So the
optimiser steps on float32 copies, the masters, and the policy's weights are the masters rounded. The gradients of several backward
passes add up in float32, too.
"""

from __future__ import annotations

import torch


class MasterWeights:
    """The trainable parameters of `model` as an optimiser is to see them. A float32 parameter is its own master.

    Attributes:
        parameters: float32 masters by the names of the parameters; of tied parameters the first.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.parameters = {
            name: parameter if parameter.dtype == torch.float32 else torch.nn.Parameter(parameter.detach().float())
            for name, parameter in trained.items()
        }
        self._pairs = [(p, self.parameters[name]) for name, p in trained.items() if p is not self.parameters[name]]

    def take_gradients(self) -> None:
        """Add the gradients that a backward pass has left at the parameters to those of the masters."""
        for parameter, master in self._pairs:
            if parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def round_to_model(self) -> None:
        """Set the model's parameters to the masters, rounded to their dtype."""
        for parameter, master in self._pairs:
            parameter.copy_(master)
