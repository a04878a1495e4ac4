"""What a merge tells the trainer's loggers: values of each layer and task, and the picture where they take one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.results.plots import draw
from com_lightning.results.report import MergeReport


def log_layer(loggers: Sequence[Logger], record: LayerRecord, step: int) -> None:
    """Shift, residual and conditioning of a layer, under ``merge/``.

    Args:
        loggers: of the trainer.
        record: of the layer.
        step: its number in the order of merging.
    """
    values = {"residual": record.residual, "condition": record.condition, "seconds": record.seconds}
    values.update({f"shift/{task}": value for task, value in record.distance.items()})
    values.update({f"cosine/{task}": value for task, value in record.cosine.items()})
    known = {f"merge/{name}": value for name, value in values.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(known, step=step)


def log_tasks(loggers: Sequence[Logger], report: MergeReport, step: int) -> None:
    """Every metric of every task, ``task/metric``, and as a share of the expert's; and the report's picture, for
    TensorBoard, Weights & Biases, and whatever has their methods for it."""
    values = report.metrics["merged"]
    named = {f"{task}/{metric}": value for task, metrics in values.items() for metric, value in metrics.items()}
    for task in values:
        if (ratio := report.normalized("merged", task)) is not None:
            named[f"{task}/normalized_{report.metric}"] = ratio
    for logger in loggers:
        logger.log_metrics(named, step=step)
        _log_picture(logger, report, step)
        logger.save()


@rank_zero_only
def _log_picture(logger: Logger, report: MergeReport, step: int) -> None:
    images = getattr(logger, "log_image", None)
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    pixels = _pixels(report) if (images or add_image) and not isinstance(logger, DummyLogger) else None
    if pixels is not None and images:
        images("merge/report", [pixels])
    elif pixels is not None and add_image:
        add_image("merge/report", pixels, global_step=step, dataformats="HWC")


def _pixels(report: MergeReport) -> Any:
    """Height x width x 3, or ``None`` if there is no picture."""
    figure = draw(report)
    if figure is None:
        return None
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
