"""A report as one web page that works offline: styles and picture are inside, and there is no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from com_lightning.results.figures import no_pictures
from com_lightning.results.model_size import size_rows
from com_lightning.results.report import (
    LAYER_COLUMNS,
    SIZE_COLUMNS,
    MergeReport,
    averaged_rows,
    conclusion,
    layer_rows,
    settings,
    task_rows,
    title,
    versions,
)
from com_lightning.results.tables import labelled

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #2a6f97; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid var(--accent); } td.number, th.number { text-align: right; }
.wide { overflow-x: auto; } img { max-width: 100%; background: white; border-radius: 4px; }
.warning { border-left: 4px solid #c1553b; padding: .3rem .8rem; margin: .6rem 0; }
.note, summary { color: #777; } summary { cursor: pointer; }
"""


def html_report(report: MergeReport, picture: bytes | None = None, importance: bytes | None = None) -> str:
    """The whole report as one HTML page.

    Args:
        report: Report of a merge.
        picture: A PNG to show, see :func:`~com_lightning.results.plots.save_figure`.
        importance: Another one, see :func:`~com_lightning.results.importance_plot.save_importance`.

    Returns:
        The page.
    """
    heading, options = title(report), settings(report)
    parts = [f"<h1>{escape(heading)}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in conclusion(report)]
    parts += [f'<p class="note">{escape(options)}</p>'] if options else []
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings]
    if report.metrics:
        rows = task_rows(report)
        monitor = labelled(f"<code>{escape(str(report.monitor))}</code>", report.lower_is_better)
        parts += ["<h2>Tasks</h2>", f"<p>{monitor}</p>", html_table(rows)]
    if picture:
        description = "each task before and after the merge, and the drift of inputs from layer to layer"
        parts.append(image(picture, description))
    elif problem := no_pictures():
        parts.append(f'<p class="note">{escape(problem)}</p>')
    if importance:
        parts.append(image(importance, "similarity of each task's inputs, and its importance, from layer to layer"))
    parts += ["<h2>Data and cost</h2>", *(f"<p>{escape(line)}</p>" for line in report.summary().splitlines())]
    if report.checks:
        parts += ["<h2>Checked</h2>", *(f"<p>{escape(check)}</p>" for check in report.checks)]
    if report.size.tasks:
        parts += ["<h2>Size</h2>", f'<p class="note">{escape(SIZE_COLUMNS)}</p>', html_table(size_rows(report.size))]
    if report.layers:
        note = f'<p class="note">{escape(LAYER_COLUMNS)}</p>'
        parts += ["<h2>Layers</h2>", note, html_table(layer_rows(report))]
    if rows := averaged_rows(report):
        summary = f"<summary>{len(rows) - 1} of them</summary>"
        parts += [f"<h2>Averaged parameters</h2><details>{summary}", html_table(rows), "</details>"]
    parts.append(f'<p class="note">{escape(versions(report))}</p>')
    return page(heading, parts)


def page(heading: str, parts: Sequence[str]) -> str:
    """A whole HTML page.

    Args:
        heading: its title.
        parts: what is in its body, as HTML.

    Returns:
        The page.
    """
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(heading)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def image(picture: bytes, description: str) -> str:
    """A picture inside a page.

    Args:
        picture: a PNG.
        description: what it shows.

    Returns:
        The HTML.
    """
    encoded = base64.b64encode(picture).decode("ascii")
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{encoded}"></p>'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Args:
        rows: cells of each row. The first row is the head.

    Returns:
        The HTML. Columns of numbers are aligned to the right.
    """
    head, *body = rows
    numbers = [all(re.match(r"[-–.\d]|$", row[c]) for row in body) for c in range(len(head))]

    def line(row: Sequence[str], tag: str) -> str:
        classes = [' class="number"' if number else "" for number in numbers]
        return "<tr>" + "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, row)) + "</tr>"

    lines = "\n".join(line(row, "td") for row in body)
    return f'<div class="wide"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'
