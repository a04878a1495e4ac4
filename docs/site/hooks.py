"""The site's files are the repository's, under their own paths, so that a relative link means one thing in both.

Pages are README.md, what is in docs/ and benchmarks/results/, and whatever they link to: other pages, pictures, and
files of code and notebooks, which are shown as pages of their own.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from com_lightning.answers import answer

os.environ["COLUMNS"] = "80"  # how wide the help of the command line is
ROOT = Path(__file__).parents[2]
LANGUAGES = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".cff": "yaml"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
HELP = re.compile(r"^<!-- com-lightning (.*) -->$", re.MULTILINE)
NOTEBOOK = ".ipynb"
LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    docs = Path(config.docs_dir)
    for file in list(files):
        if file.abs_src_path is not None and docs in Path(file.abs_src_path).parents:
            files.remove(file)
    starts = [ROOT / "README.md", *docs.rglob("*"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    waiting = [path.relative_to(ROOT).as_posix() for path in starts if path.suffix != ".py"]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():  # MkDocs tells of links to what is not there
            continue
        seen.add(path)
        suffix = Path(path).suffix
        if suffix in (".md", NOTEBOOK):
            text = (ROOT / path).read_text(encoding="utf-8")
            text = notebook_page(text) if suffix == NOTEBOOK else text
            waiting += [posixpath.normpath(posixpath.join(posixpath.dirname(path), to)) for _, to in LINK.findall(text)]
        if suffix in LANGUAGES:
            code = (ROOT / path).read_text(encoding="utf-8")
            shown = f"# {path}\n\n````{LANGUAGES[suffix]}\n{code}````\n"
            files.append(File.generated(config, f"{path}.md", content=shown))
        elif suffix == NOTEBOOK:
            files.append(File.generated(config, f"{path}.md", content=text))
        else:
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return latex2mathml.converter.convert(unescape(formula[2]), display=display)

    return FORMULA.sub(drawn, html)


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its text, its code, and what the cells have shown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = "".join(output.get("text") or data.get("text/html") or data["text/plain"])
            parts.append(shown if "text/html" in data else f'<pre class="output">{escape(shown.rstrip())}</pre>')
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    is_notebook = page.file.src_uri.endswith(f"{NOTEBOOK}.md")
    if page.file.src_uri.startswith("benchmarks/") or (page.file.generated_by and not is_notebook):
        # wide tables of figures, and code
        page.meta.update({"hide": ["toc"], "search": {"exclude": True}})
    markdown = HELP.sub(lambda m: f"```text\n{answer(m[1].split(), '')}```", markdown)
    return LINK.sub(lambda m: f"{m[1]}{m[2]}{'.md' if Path(m[2]).suffix in {*LANGUAGES, NOTEBOOK} else ''}", markdown)
