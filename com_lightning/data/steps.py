"""Run the steps of a user's module on calibration batches: validation, training and prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from com_lightning.core.sweep.task import Padding
from com_lightning.errors import MergeError


@dataclass
class Batch:
    """A calibration batch on the device.

    Attributes:
        content: the batch as the module's steps take it.
        dataloader_idx: the number of its loader.
        masks: its padding, see :func:`~com_lightning.data.padding.padding_masks`.
    """

    content: Any
    dataloader_idx: int
    masks: Mapping[str, Padding] = field(default_factory=dict)


@dataclass
class CalibrationStep:
    """Runs a module's ``calibration_step``, or else its ``validation_step``, with ``log`` muted."""

    trainer: Trainer

    def __call__(self, module: nn.Module, batch: Batch, index: int) -> None:
        model, content = _prepared(module, batch, self.trainer)
        with self.trainer.precision_plugin.forward_context():
            if callable(calibration_step := getattr(model, "calibration_step", None)):
                calibration_step(content)
                return
            model.on_validation_start()
            model.on_validation_epoch_start()
            start = model.on_validation_batch_start
            start(*_arguments(start, content, index, batch.dataloader_idx))
            model.validation_step(*_arguments(model.validation_step, content, index, batch.dataloader_idx))


@dataclass
class TrainingLoss:
    """Computes the loss that a module's ``training_step`` returns, with ``log`` muted.

    Raises:
        MergeError: if it returns no loss, or one without a gradient.
    """

    trainer: Trainer
    task: str

    def __call__(self, module: nn.Module, batch: Batch, index: int) -> Tensor:
        model, content = _prepared(module, batch, self.trainer)
        with self.trainer.precision_plugin.forward_context():
            # Lightning passes no dataloader_idx to a training_step.
            returned = model.training_step(*_arguments(model.training_step, content, index))
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            return loss.reshape(())
        result = _described(loss) if loss is returned else f"a dictionary whose 'loss' is {_described(loss)}"
        raise MergeError(
            [
                f"task '{self.task}', batch {index}: training_step returns {result}; the method needs a loss to "
                "differentiate, one number, or a dictionary with it as 'loss' (which manual optimization does not give)"
            ]
        )


@dataclass
class Prediction:
    """Computes the logits that a module's ``predict_step`` returns, or else its ``forward``, with ``log`` muted.

    Raises:
        MergeError: if they are not a floating-point tensor ``(n, classes)`` with a gradient.
    """

    trainer: Trainer
    task: str

    def __call__(self, module: nn.Module, batch: Batch, index: int) -> Tensor:
        model, content = _prepared(module, batch, self.trainer)
        label, advice = f"task '{self.task}', batch {index}", "override predict_step, and return logits, (n, classes)"
        with self.trainer.precision_plugin.forward_context():
            if is_overridden("predict_step", model):
                source = "predict_step"
                logits = model.predict_step(*_arguments(model.predict_step, content, index, batch.dataloader_idx))
            elif isinstance(content, Tensor) or (isinstance(content, (list, tuple)) and content):
                source = "forward"
                logits = model(content if isinstance(content, Tensor) else content[0])
            else:
                raise MergeError([f"{label}: forward has no first element to be given; {advice}"])
        fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() == 2
        if not (fits and len(logits) and logits.shape[1] > 1):
            raise MergeError([f"{label}: {source} returns {_described(logits)}, not logits; {advice}"])
        if not logits.requires_grad:
            raise MergeError([f"{label}: what {source} returns does not depend on the shared parameters; {advice}"])
        assert isinstance(logits, Tensor)
        return logits


def samples_in(batch: Batch) -> int:
    """Number of samples in a batch."""
    return max(extract_batch_size(batch.content), 1)


def _prepared(module: nn.Module, batch: Batch, trainer: Trainer) -> tuple[LightningModule, Any]:
    assert isinstance(module, LightningModule)
    module.trainer = trainer
    for part in module.modules():
        if isinstance(part, LightningModule):
            for name in ("log", "log_dict"):
                object.__setattr__(part, name, lambda *args, **kwargs: None)
    return module, _copied(batch.content)


def _copied(content: Any) -> Any:
    """A copy of a batch: several forwards run on it, and a step may remove things from it, or change them in place."""
    clones: dict[int, Any] = {}  # not of the storage that a tensor is a view of

    def clone(tensor: Tensor) -> Tensor:
        clones[id(tensor)] = tensor.clone()
        return tensor

    apply_to_collection(content, Tensor, clone)
    try:
        return copy.deepcopy(content, clones)
    except Exception as error:  # an object of the user's that cannot be copied, such as an open file
        rank_zero_warn(
            f"calibration batches hold an object that cannot be copied ({type(error).__name__}: {error}); a step that "
            "changes it in place changes it for all forwards on that batch"
        )
        return apply_to_collection(content, Tensor, torch.clone)


def _arguments(step: Callable[..., Any], content: Any, index: int, dataloader_idx: int | None = None) -> list[Any]:
    """The arguments of a step, chosen by its signature as Lightning does."""
    arguments = [content]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(index)
    if dataloader_idx is not None and is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
        arguments.append(dataloader_idx)
    return arguments


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "nothing" if value is None else f"a {type(value).__name__}"
    without = "" if value.requires_grad else ", without a gradient"
    return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}{without}"
