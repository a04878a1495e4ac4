"""What a merge sends to the trainer's loggers: settings, values of each layer and task, the picture of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def task_metrics(report: MergeReport) -> dict[str, float]:
    """The metrics of all tasks under names of their own, for loggers and for ``trainer.callback_metrics``.

    Args:
        report: Report of the merge.

    Returns:
        ``<task>/<metric>`` -> value of the merged model; ``<task>/normalized_<monitor>`` -> its share of the expert's;
        ``merged/mean``, and if they were validated ``expert/mean`` and ``average/mean`` -> mean of the monitored metric
        over tasks; ``merged/mean_normalized`` -> mean share.
    """
    values: dict[str, float | None] = {
        f"{task}/{metric}": value
        for task, metrics in report.metrics["merged"].items()
        for metric, value in metrics.items()
    }
    values.update({f"{task}/normalized_{report.monitor}": report.normalized("merged", task) for task in report.tasks})
    values.update({f"{model}/mean": report.mean(model) for model in report.metrics})
    values["merged/mean_normalized"] = report.mean_normalized("merged")
    # Lightning keeps the name `dataloader_idx` for itself.
    known = {name: value for name, value in values.items() if value is not None}
    return {name.replace("/dataloader_idx_", "/loader_"): value for name, value in known.items()}


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any]) -> None:
    """Log how a merge is made as hyperparameters, under ``merge/``.

    Args:
        loggers: Loggers of the trainer.
        settings: Name -> plain value; ``class`` is that of the rule.
    """
    names = {"class": "method"}
    for logger in loggers:
        logger.log_hyperparams({f"merge/{names.get(name, name)}": value for name, value in settings.items()})


def log_picture(loggers: Sequence[Logger], report: MergeReport, step: int) -> None:
    """Log the picture of the report, if a logger accepts pictures, as TensorBoard and Weights & Biases do.

    Args:
        loggers: Loggers of the trainer.
        report: Report of the merge.
        step: Number of merged layers.
    """
    for logger in loggers:
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
