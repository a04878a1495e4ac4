"""What a merge sends to the trainer's loggers: values of each layer and task, and the picture of the report."""

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
    """Log the drift, residual and conditioning of a layer, under ``merge/``.

    Args:
        loggers: Loggers of the trainer.
        record: Record of the layer.
        step: Number of the layer in the order of merging.
    """
    values = {"residual": record.residual, "condition": record.condition, "seconds": record.seconds}
    values.update({f"drift/{task}": value for task, value in record.distance.items()})
    values.update({f"cosine/{task}": value for task, value in record.cosine.items()})
    metrics = {f"merge/{name}": value for name, value in values.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(metrics, step=step)


def log_tasks(loggers: Sequence[Logger], report: MergeReport, step: int) -> None:
    """Log every metric of every task as ``<task>/<metric>``, and the monitored one as a share of the expert's.

    Loggers that accept pictures, such as TensorBoard and Weights & Biases, also get the picture of the report.

    Args:
        loggers: Loggers of the trainer.
        report: Report of the merge.
        step: Number of merged layers.
    """
    merged = report.metrics["merged"]
    values = {f"{task}/{metric}": value for task, metrics in merged.items() for metric, value in metrics.items()}
    for task in merged:
        if (ratio := report.normalized("merged", task)) is not None:
            values[f"{task}/normalized_{report.monitor}"] = ratio
    for logger in loggers:
        logger.log_metrics(values, step=step)
        _log_picture(logger, report, step)
        logger.save()


@rank_zero_only
def _log_picture(logger: Logger, report: MergeReport, step: int) -> None:
    log_image = getattr(logger, "log_image", None)
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    pixels = _pixels(report) if (log_image or add_image) and not isinstance(logger, DummyLogger) else None
    if pixels is not None and log_image:
        log_image("merge/report", [pixels])
    elif pixels is not None and add_image:
        add_image("merge/report", pixels, global_step=step, dataformats="HWC")


def _pixels(report: MergeReport) -> Any:
    """An array of height x width x 3, or ``None`` if there is no picture."""
    figure = draw(report)
    if figure is None:
        return None
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
