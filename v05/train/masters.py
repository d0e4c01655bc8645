"""Float32 master weights for a policy that is trained in bfloat16.

An update of AdamW is often smaller than the distance between neighbouring bfloat16 numbers, and would be lost in rounding. The
optimiser therefore updates float32 copies, the masters, and the policy's weights are the rounded masters. Gradients of several
backward passes are also added up in float32.
"""

from __future__ import annotations

import torch


class MasterWeights:
    """Float32 masters of the trainable parameters of `model`, for the optimiser. A float32 parameter is its own master.

    Attributes:
        parameters: float32 masters by parameter name; tied parameters have one master, under the first name.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.parameters = {
            name: parameter if parameter.dtype == torch.float32 else torch.nn.Parameter(parameter.detach().float())
            for name, parameter in trained.items()
        }
        self._pairs = [(p, self.parameters[name]) for name, p in trained.items() if p is not self.parameters[name]]

    def take_gradients(self) -> None:
        """Move the parameters' gradients to the masters, adding to gradients that are there already."""
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
