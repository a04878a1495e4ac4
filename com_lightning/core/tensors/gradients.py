"""Gradients of a user's module, in whatever state the trainer has left autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def gradients_enabled(module: nn.Module) -> Iterator[None]:
    """Gradients are on, and cuDNN's recurrent layers, which have none in eval mode, are off."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), without:
        yield


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradient by each leaf, dense; ``None`` where it has no part in the loss."""
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


@contextmanager
def seeded(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Random numbers that depend on the seed alone, so that a batch gives the same in whichever process it is."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng([device.index or 0 for device in devices]):
        torch.manual_seed(seed)
        yield
