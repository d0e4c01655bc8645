"""Energies against gradients of the logits, and at the limits of floating point."""

import numpy as np
import pytest
import torch

from v05.energy import completion_energy


def test_the_energy_is_the_squared_norm_of_the_gradient_of_the_logits():
    logits = (3 * torch.randn(7, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    tokens = torch.arange(7)[:, None]
    logprobs = torch.log_softmax(logits, -1).gather(1, tokens)
    logprobs.sum().backward()
    squares = torch.softmax(logits, -1).square().sum(-1)
    energy = completion_energy(logprobs.detach().squeeze(1).numpy(), squares.detach().numpy())
    assert energy == pytest.approx(float(logits.grad.square().sum()), rel=1e-12)


def test_the_proxy_is_the_most_that_the_energy_can_be():
    logprobs = np.log(np.array([0.9, 0.5, 0.01]))
    one_other = logprobs, np.exp(2 * logprobs) + (1 - np.exp(logprobs)) ** 2
    proxy = completion_energy(logprobs)
    assert proxy == pytest.approx(2 * (0.1**2 + 0.5**2 + 0.99**2))
    assert completion_energy(*one_other) == pytest.approx(proxy)
    assert completion_energy(logprobs, np.exp(2 * logprobs)) == pytest.approx(proxy / 2)


def test_certain_tokens_have_small_energies_and_none_below_0():
    nearly = np.array([-1e-6], dtype=np.float32)
    assert completion_energy(nearly) == pytest.approx(2e-12, rel=1e-5)
    assert completion_energy(nearly, np.exp(2 * nearly.astype(np.float64))) == pytest.approx(1e-12, rel=1e-3)
    assert completion_energy(np.zeros(3, dtype=np.float32), np.full(3, 1 - 1e-16)) == 0
