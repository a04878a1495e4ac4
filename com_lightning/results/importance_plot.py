"""A picture of how much tasks count at each layer, beside the similarity of their inputs that this follows from.

There is one only for merges with ``importance="similarity"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.results.figures import new_figure

LayerImportance = tuple[str, dict[str, float], dict[str, float]]
"""Name of a layer, and task -> similarity of its inputs, and task -> its importance."""


def importance_of(records: Iterable[LayerRecord]) -> list[LayerImportance]:
    """Return the layers at which similarity was measured, in the order of merging."""
    return [(record.name, dict(record.similarity), dict(record.importance)) for record in records if record.similarity]


def save_importance(rules: Mapping[str, Sequence[LayerImportance]], path: Path) -> bool:
    """Draw similarity and importance, and save the picture. Returns whether :func:`draw_importance` has drawn one."""
    figure = draw_importance(rules)
    if figure is not None:
        figure.savefig(path, dpi=130)
    return figure is not None


def draw_importance(rules: Mapping[str, Sequence[LayerImportance]]) -> Any:
    """Draw similarity and importance.

    Args:
        rules: name of each rule -> its layers, see :func:`importance_of`. Each rule gets a row of three panels.

    Returns:
        A ``matplotlib.figure.Figure``; ``None`` without matplotlib, or if there is nothing to draw.
    """
    drawn = {rule: layers for rule, layers in rules.items() if layers}
    if not drawn or (figure := new_figure(13, 0.4 + 3.8 * len(drawn))) is None:
        return None
    rows = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for row, (rule, layers) in zip(rows, drawn.items()):
        if len(drawn) > 1:
            row.suptitle(rule, fontsize=9)
        _draw_row(row.subplots(1, 3), layers)
    return figure


def _draw_row(panels: Sequence[Any], layers: Sequence[LayerImportance]) -> None:
    similarity, importance, both = panels
    for task in layers[0][2]:
        points = [(x, alike.get(task), shares[task]) for x, (_, alike, shares) in enumerate(layers)]
        measured = [(x, alike, share) for x, alike, share in points if alike is not None]
        style = {"marker": ".", "linewidth": 1, "label": task}
        similarity.plot([x for x, _, _ in measured], [alike for _, alike, _ in measured], **style)
        importance.plot([x for x, _, _ in points], [share for _, _, share in points], **style)
        both.scatter([alike for _, alike, _ in measured], [share for _, _, share in measured], s=12, label=task)
    similarity.set_title("similarity of each task's inputs", fontsize=10)
    similarity.set_ylabel("root mean square cosine")
    importance.set_title("importance that follows from it", fontsize=10)
    for axes in (similarity, importance):
        axes.set_xlabel("layer, in the order of merging")
        axes.xaxis.get_major_locator().set_params(integer=True)
    both.set_title("importance against similarity, a point per layer", fontsize=10)
    both.set_xlabel("root mean square cosine")
    for axes in (importance, both):
        axes.set_ylabel("importance")
        axes.axhline(1 / len(layers[0][2]), color="#9aa5b1", linestyle="--", linewidth=1, zorder=0, label="equal")
    for axes in panels:
        axes.margins(0.05, 0.08)
    similarity.set_ylim(bottom=0)
    both.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
