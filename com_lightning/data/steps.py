"""Run the steps of a user's module on calibration batches: validation, training and prediction."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from com_lightning.core.sweep.distributed import NoCommunication
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
    """Runs a module's ``calibration_step``, or else its ``validation_step``, with ``log`` muted.

    The hooks around ``validation_step`` run as in ``trainer.validate``: those of the epoch once, before all batches.
    ``on_validation_batch_end`` does not run: it could change no statistics, because the layers have been called before.
    """

    trainer: Trainer
    validates: bool = False
    """Whether to run ``validation_step`` in any case."""

    def calibration_step(self, model: nn.Module) -> Callable[[Any], Any] | None:
        """The module's ``calibration_step``, if it is to be run."""
        step = None if self.validates else getattr(model, "calibration_step", None)
        return step if callable(step) else None

    def prepare(self, module: nn.Module) -> None:
        """Run what comes before the first batch."""
        model = _attached(module, self.trainer)
        if self.calibration_step(model) is None:
            model.on_validation_start()
            model.on_validation_epoch_start()

    def __call__(self, module: nn.Module, batch: Batch, index: int) -> None:
        model, content = _attached(module, self.trainer), _copied(batch.content)
        if calibration_step := self.calibration_step(model):
            with self.trainer.precision_plugin.forward_context():
                calibration_step(content)
            return
        start, step = model.on_validation_batch_start, model.validation_step
        is_watched = is_overridden("on_validation_batch_start", model)
        with _layers_called(model, is_watched) as before:
            start(*_arguments(start, content, index, batch.dataloader_idx))
        with _layers_called(model, bool(before)) as within, self.trainer.precision_plugin.forward_context():
            step(*_arguments(step, content, index, batch.dataloader_idx))
        if twice := sorted(before & within):
            label = f"{type(model).__name__}: on_validation_batch_start calls {', '.join(twice[:4])}"
            raise MergeError(
                [
                    f"{label}, and validation_step does so again, but a layer is merged from its first call; give the "
                    "module a calibration_step(batch) that only runs the network on the batch"
                ]
            )


@dataclass
class TrainingLoss:
    """Computes the loss that a module's ``training_step`` returns, with ``log`` muted.

    Raises:
        MergeError: if it returns no loss, or one without a gradient.
    """

    trainer: Trainer
    task: str

    def __call__(self, module: nn.Module, batch: Batch, index: int) -> Tensor:
        model, content = _attached(module, self.trainer), _copied(batch.content)
        with self.trainer.precision_plugin.forward_context(), _by_itself(self.trainer, self.task, model):
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
        model, content = _attached(module, self.trainer), _copied(batch.content)
        label, advice = f"task '{self.task}', batch {index}", "override predict_step, and return logits, (n, classes)"
        with self.trainer.precision_plugin.forward_context(), _by_itself(self.trainer, self.task, model):
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


@contextmanager
def _layers_called(model: nn.Module, watches: bool) -> Iterator[set[str]]:
    """The names of the modules with parameters that are called within."""
    called: set[str] = set()
    layers = model.named_modules() if watches else ()
    own = [(name, layer) for name, layer in layers if any(p is not None for p in layer._parameters.values())]
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in own]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _by_itself(trainer: Trainer, task: str, model: nn.Module) -> AbstractContextManager[Any]:
    """Makes a step that waits for other processes an error, if there are any."""
    if trainer.world_size < 2:
        return nullcontext()
    return NoCommunication(f"task '{task}': {type(model).__name__}")


def shortened(batch: Batch, samples: int = 2) -> Batch:
    """Return a batch with only the first samples of another one, as far as it consists of tensors and lists."""
    sizes = Counter[int]()
    apply_to_collection(batch.content, Tensor, lambda tensor: sizes.update(tensor.shape[:1]))
    size = sizes.most_common(1)[0][0] if sizes else 0
    if size <= samples:
        return batch

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:samples] if value.dim() and len(value) == size else value
        if isinstance(value, dict):
            return type(value)({key: part(entry) for key, entry in value.items()}) if type(value) is dict else value
        if type(value) in (list, tuple):
            is_column = len(value) == size and not all(isinstance(e, Tensor) and len(e) == size for e in value)
            return value[:samples] if is_column else type(value)(map(part, value))
        return value

    return Batch(part(batch.content), batch.dataloader_idx)  # nothing is gathered from it, so it needs no masks


def _attached(module: nn.Module, trainer: Trainer) -> LightningModule:
    assert isinstance(module, LightningModule)
    module.trainer = trainer
    for part in module.modules():
        if isinstance(part, LightningModule):
            for name in ("log", "log_dict"):
                object.__setattr__(part, name, lambda *args, **kwargs: None)
    return module


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
