"""A report as one web page that works offline, and as the fragment that a notebook shows.

Styles and pictures are inside. The page needs no script to be read; one lets its tables be sorted.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape

from com_lightning.results.figures import no_pictures
from com_lightning.results.model_card import loading_code
from com_lightning.results.model_size import size_rows
from com_lightning.results.plots import pictures
from com_lightning.results.report import (
    LAYER_COLUMNS,
    SIZE_COLUMNS,
    MergeReport,
    averaged_rows,
    conclusion,
    layer_rows,
    origin_rows,
    task_rows,
    title,
    versions,
)
from com_lightning.results.tables import labelled

# A notebook has a theme of its own, so that colours of text and lines follow from that around them.
_STYLE = """
.com-page { font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.com-page h1, .com-page h2, .com-page h3 { line-height: 1.25; margin: 1.6em 0 .5em; }
.com-page h1 { font-size: 1.6em; margin-top: 0; } .com-page h2 { font-size: 1.2em; }
.com-page p { margin: .5em 0; } .com-page .option { white-space: nowrap; }
.com-page .headline { font-size: 1.2em; }
.com-page table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0; overflow-wrap: normal; }
.com-page th, .com-page td { border-bottom: 1px solid #8884; padding: .3em .7em; text-align: left; }
.com-page th { border-bottom: 2px solid #2a8fa8; vertical-align: bottom; }
.com-page th.number, .com-page td.number { text-align: right; } .com-page td.number { white-space: nowrap; }
.com-page td.words { min-width: 14em; overflow-wrap: anywhere; }
.com-page tr.total td { border-top: 2px solid #8888; font-weight: 600; }
.com-page .wide { overflow-x: auto; margin: .6em 0; }
.com-page .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); gap: 1em; }
.com-page img { width: 100%; max-width: 48em; background: white; border-radius: 4px; }
.com-page pre { background: #8882; border-radius: 4px; padding: .7em; margin: .6em 0; overflow-x: auto; }
.com-page code { font-size: .92em; } .com-page pre code { white-space: pre; overflow-wrap: normal; }
.com-page .warning { border-left: 4px solid #d0603c; padding: .3em .8em; background: #d0603c18; }
.com-page .note { opacity: .75; }
.com-page details { margin: .6em 0; border-top: 1px solid #8884; padding-top: .5em; }
.com-page summary { cursor: pointer; font-weight: 600; }
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
th[data-sort] { cursor: pointer; }
th[data-sort="1"]::after { content: " ▲"; }
th[data-sort="-1"]::after { content: " ▼"; }
@media (prefers-color-scheme: dark) { .com-page img { filter: invert(.9) hue-rotate(180deg); } }
@media (max-width: 30rem) {
  body { margin: 1rem auto; }
  .com-page table { font-size: .85em; } .com-page th, .com-page td { padding: .3em .25em; }
}
@media print { .com-page details > * { display: block; } }
"""

# Rows of means stay at the end. What is no number comes after all numbers.
_SORT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => {
    head.dataset.sort = "0";
    head.onclick = () => {
      const way = head.dataset.sort === "1" ? -1 : 1, number = head.classList.contains("number");
      const key = row => row.cells[column].textContent;
      const value = row => {
        const x = parseFloat(key(row).replaceAll(",", ""));
        return isNaN(x) ? Infinity * way : x;
      };
      const rows = [...table.tBodies[0].rows].filter(row => !row.className);
      rows.sort((a, b) => way * (number ? value(a) - value(b) || 0 : key(a).localeCompare(key(b))));
      table.querySelectorAll("th").forEach(other => { other.dataset.sort = "0"; });
      head.dataset.sort = way;
      table.tBodies[0].prepend(...rows);
    };
  });
}
"""


def html_report(report: MergeReport, files: Sequence[str] = (), classes: Mapping[str, str] | None = None) -> str:
    """The whole report as one HTML page.

    Args:
        report: Report of a merge.
        files: Names of the files beside the page, which it tells how to load.
        classes: Task -> full name of its module's class.

    Returns:
        The page.
    """
    heading, loading = title(report), loading_code(report.tasks, files, classes or {}) if files else ""
    return page(heading, [f"<h1>{escape(heading)}</h1>", *_body(report, loading)])


def html_fragment(report: MergeReport) -> str:
    """The report for a notebook: what :func:`html_report` shows, without a script and without the rest of a page.

    Args:
        report: Report of a merge.

    Returns:
        The HTML.
    """
    if not report.tasks:
        return f"<p>{escape(str(report))}</p>"
    return fragment([f"<h3>{escape(title(report))}</h3>", *_body(report)])


def with_code(text: str) -> str:
    """Escaped text with code: what is between backticks, and options of the command line, which lines do not break."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"--config \w+|--\w+", r'<code class="option">\g<0></code>', text)


def _body(report: MergeReport, loading: str = "") -> list[str]:
    achieved, *advice = conclusion(report)
    parts = [f'<p class="headline">{escape(achieved)}</p>', *(f"<p>{with_code(line)}</p>" for line in advice)]
    if report.date:
        parts.append(f'<p class="note">{escape(report.date)}</p>')
    parts += [f'<p class="warning">{with_code(warning)}</p>' for warning in report.warnings]
    if report.metrics:
        monitor = labelled(f"<code>{escape(str(report.monitor))}</code>", report.lower_is_better)
        parts += [f"<p>Each task's {monitor}:</p>", html_table(task_rows(report), total=True)]
    parts.append(image_grid(pictures(report)))
    if problem := no_pictures():
        parts.append(f'<p class="note">{escape(problem)}</p>')
    if loading:
        parts += ["<h2>How to load it</h2>", f"<pre><code>{escape(loading)}</code></pre>"]
    cost = [f"<p>{escape(line)}</p>" for line in report.summary().splitlines()]
    if report.size.tasks:
        cost += [html_table(size_rows(report.size)), f'<p class="note">{escape(SIZE_COLUMNS)}</p>']
    parts.append(folded("Data, cost and size", cost))
    settings = [[name, str(value)] for name, value in report.method.items() if name != "class"]
    made = [f"<pre><code>{escape(report.command)}</code></pre>"] if report.command else []
    made += [html_table(rows)] if (rows := origin_rows(report)) else []
    made += [html_table([[f"setting of {report.method.get('class')}", "value"], *settings])] if settings else []
    parts.append(folded("How it was made", [*made, f'<p class="note">{escape(versions(report))}</p>']))
    if report.checks:
        parts.append(folded("What was checked", [f"<p>{escape(check)}</p>" for check in report.checks]))
    if report.layers:
        note = f'<p class="note">{escape(LAYER_COLUMNS)}</p>'
        parts.append(folded(f"Layers ({len(report.layers)})", [html_table(layer_rows(report)), note]))
    if rows := averaged_rows(report):
        parts.append(folded(f"Averaged parameters ({len(rows) - 1})", [html_table(rows)]))
    return parts


def fragment(parts: Sequence[str]) -> str:
    """HTML with its style, for a notebook.

    Args:
        parts: what is in it, as HTML.

    Returns:
        The HTML.
    """
    return f'<div class="com-page"><style>{_STYLE}</style>\n{_joined(parts)}\n</div>'


def page(heading: str, parts: Sequence[str]) -> str:
    """A whole HTML page, whose tables are sorted by a click on the head of a column.

    Args:
        heading: its title.
        parts: what is in its body, as HTML.

    Returns:
        The page.
    """
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(heading)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}{_PAGE_STYLE}</style></head>\n'
        f'<body class="com-page">\n{_joined(parts)}\n<script>{_SORT}</script></body></html>\n'
    )


def _joined(parts: Sequence[str]) -> str:
    return "\n".join(part for part in parts if part)


def folded(summary: str, parts: Sequence[str]) -> str:
    """What is shown after a click.

    Args:
        summary: what is shown before.
        parts: the rest, as HTML.

    Returns:
        The HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>\n{_joined(parts)}\n</details>"


def image_grid(drawn: Sequence[tuple[bytes, str]]) -> str:
    """Pictures side by side, or one below the other where there is no room.

    Args:
        drawn: PNG and description of each.

    Returns:
        The HTML; empty without pictures.
    """
    images = [
        f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">'
        for picture, description in drawn
    ]
    return f'<div class="pictures">{"".join(images)}</div>' if images else ""


def html_table(rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """A table.

    Args:
        rows: cells of each row. The first row is the head.
        total: whether the last row is of means, and stays at the end.

    Returns:
        The HTML. Columns of numbers are aligned to the right, and long text is broken into lines.
    """
    head, *body = rows
    columns = [[row[c] for row in body] for c in range(len(head))]
    kinds = [
        ' class="number"'
        if all(re.match(r"[-–.\d]|$", cell) for cell in column)
        else ' class="words"' * any(len(cell) > 40 for cell in column)
        for column in columns
    ]

    def line(row: Sequence[str], tag: str, classes: str = "") -> str:
        cells = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row))
        return f"<tr{classes}>{cells}</tr>"

    last = len(body) - 1 if total else len(body)
    lines = "\n".join(line(row, "td", ' class="total"' * (number == last)) for number, row in enumerate(body))
    return f'<div class="wide"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'
