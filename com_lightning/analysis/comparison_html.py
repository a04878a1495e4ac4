"""A comparison as one web page that works offline, and as the fragment that a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from com_lightning.analysis.comparison import Comparison
from com_lightning.analysis.comparison_plots import save_pictures
from com_lightning.results.figures import no_pictures
from com_lightning.results.html import folded, fragment, html_table, image_grid, page, with_code
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
    heading = _heading(comparison)
    return page(heading, [f"<h1>{escape(heading)}</h1>", *_body(comparison, _pictures(folder))])


def comparison_fragment(comparison: Comparison) -> str:
    """The comparison for a notebook, with its pictures if matplotlib is installed.

    Args:
        comparison: what was measured.

    Returns:
        The HTML.
    """
    if not comparison.outcomes:
        return f"<p>{escape(str(comparison))}</p>"
    with TemporaryDirectory() as folder:
        save_pictures(comparison, Path(folder))
        drawn = _pictures(Path(folder))
    return fragment([f"<h3>{escape(_heading(comparison))}</h3>", *_body(comparison, drawn)])


def _pictures(folder: Path) -> list[tuple[bytes, str]]:
    paths = {folder / name: described for name, described in _PICTURES.items()}
    return [(path.read_bytes(), described) for path, described in paths.items() if path.is_file()]


def _heading(comparison: Comparison) -> str:
    return f"{len(comparison.rows)} ways to merge {', '.join(comparison.tasks)}"


def _body(comparison: Comparison, drawn: Sequence[tuple[bytes, str]]) -> list[str]:
    monitor = labelled(f"<code>{escape(str(comparison.monitor))}</code>", comparison.lower_is_better)
    parts = [f"<p>{monitor}</p>", html_table(_means_first(comparison))]
    parts += [f"<p>{with_code(line)}</p>" for line in comparison.splits.splitlines()]
    warns = ["warning" if note.startswith("Warning") else "note" for note in comparison.notes()]
    parts += [f'<p class="{kind}">{with_code(note)}</p>' for kind, note in zip(warns, comparison.notes())]
    parts.append(image_grid(drawn))
    parts += [f'<p class="note">{escape(problem)}</p>'] if (problem := no_pictures()) else []
    rows = comparison.settings_rows()
    return [*parts, folded(f"Settings that were tried ({len(rows) - 1})", [html_table(rows)]) if len(rows) > 1 else ""]


def _means_first(comparison: Comparison) -> list[list[str]]:
    """The cells of the table with means before tasks, which may be too many for a screen."""
    count = len(comparison.tasks)
    order = [0, count + 2, count + 1, *range(1, count + 1)]
    return [[*(row[column] for column in order), *row[count + 3 :]] for row in comparison.table_rows()]
