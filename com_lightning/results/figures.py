"""Figures of matplotlib that are drawn without a display; where it is missing, a warning in place of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

from com_lightning.extras import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def no_pictures() -> str:
    """Why there are no pictures; empty where matplotlib is installed."""
    return missing("matplotlib", "pictures")


def new_figure(width: float, height: float) -> Figure | None:
    """Return an empty figure of a size in inches, or ``None``, with a warning, where matplotlib is missing."""
    if problem := no_pictures():
        rank_zero_warn(problem)
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
