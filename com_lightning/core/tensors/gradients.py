"""Gradients of a user's module. They do not depend on the state in which the trainer left autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def gradients_enabled(module: nn.Module) -> Iterator[None]:
    """Switch gradients on. cuDNN's recurrent layers are off, because they have no gradients in eval mode."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), without:
        yield


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The dense gradient with respect to each leaf. ``None`` for a leaf that the loss does not depend on."""
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


@contextmanager
def seeded(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Seed the random numbers in this context, so that a batch gives the same result in each process."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng([device.index or 0 for device in devices]):
        torch.manual_seed(seed)
        yield
