"""A comparison as one web page that works offline."""

from __future__ import annotations

from html import escape
from pathlib import Path

from com_lightning.analysis.comparison import Comparison
from com_lightning.results.figures import no_pictures
from com_lightning.results.html import html_table, image, page
from com_lightning.results.tables import labelled

_PICTURES = {
    "size.png": "accuracy against size",
    "methods.png": "means of all rules",
    "tasks.png": "each task under each rule",
    "drift.png": "drift of inputs from layer to layer",
}


def comparison_html(comparison: Comparison, folder: Path) -> str:
    """The whole comparison as an HTML page.

    Args:
        comparison: what was measured.
        folder: where the pictures are. Those that are missing are left out.

    Returns:
        The page.
    """
    heading = f"{len(comparison.rows)} ways to merge {', '.join(comparison.tasks)}"
    monitor = labelled(f"<code>{escape(str(comparison.monitor))}</code>", comparison.lower_is_better)
    parts = [f"<h1>{escape(heading)}</h1>", f"<p>{monitor}</p>"]
    parts += [html_table(comparison.table_rows())]
    parts += [f"<p>{escape(line)}</p>" for line in comparison.splits.splitlines()]
    warns = ["warning" if note.startswith("Warning") else "note" for note in comparison.notes()]
    parts += [f'<p class="{kind}">{escape(note)}</p>' for kind, note in zip(warns, comparison.notes())]
    if len(rows := comparison.settings_rows()) > 1:
        parts += ["<h2>Settings</h2>", html_table(rows)]
    pictures = {folder / name: description for name, description in _PICTURES.items()}
    parts += [image(path.read_bytes(), description) for path, description in pictures.items() if path.is_file()]
    parts += [f'<p class="note">{escape(problem)}</p>'] if (problem := no_pictures()) else []
    return page(heading, parts)
