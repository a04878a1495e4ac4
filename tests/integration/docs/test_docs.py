"""The documentation: its commands and code do what it says, its pages are found, its links lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from com_lightning.cli import main
from com_lightning.overlays import overlays

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory that scripts can import from, and whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def run(command: str, fresh: bool = False) -> None:
    """A line of bash that calls Python or com-lightning; in a process of its own only if that is the point."""
    program, *args = shlex.split(command.replace("\\\n", " "))
    if fresh:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
    elif program == "python":
        runpy.run_path(args[0], run_name="__main__")
    else:
        assert program == "com-lightning"
        main(args)


def same(shown: str, told: str) -> bool:
    """Whether a line is what the page shows, but for what differs between machines."""
    shown, told = (re.sub(r"; [\d.]+ s, peak memory .*", "", line) for line in (shown, told))
    texts = [re.sub(r"[-\s]+", "", NUMBER.sub("#", line)) for line in (shown, told)]
    values = [[float(n.replace(",", "")) for n in NUMBER.findall(line)][:5] for line in (shown, told)]
    close = all(abs(a - b) <= (0.1 if a <= 1 else 10) for a, b in zip(*values))
    return texts[0] == texts[1] and close


def test_the_tutorial_and_what_goes_on_from_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, commands = "", list[str]()
    pages = [(DOCS / name).read_text() for name in ("tutorial.md", "extending.md")]
    for language, block in (block for page in pages for block in BLOCK.findall(page)):
        if language == "bash":
            run(block, fresh="use.py" in block)
            output = capsys.readouterr().out
            commands.append(block)
        elif language == "text":
            for line in filter(None, block.splitlines()):
                assert any(same(line, told) for told in output.splitlines()), f"{line}\nis not in\n{output}"
        else:
            name = re.match(r"# (\S+)", block)
            assert name is not None
            (folder / name[1]).write_text(block)
    assert len(commands) == 9
    assert (folder / "comparison" / "report.md").is_file()


def nav(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for part in entry:
            yield from nav(part)
    elif isinstance(entry, dict):
        yield from nav(list(entry.values()))


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(nav(config["nav"]))
    pages = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    assert pages <= listed
    files = [page.removesuffix(".md") if ".ipynb" in page else page for page in listed]
    assert all((ROOT / page).is_file() for page in files)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_configurations_that_are_named_exist() -> None:
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "configs").glob("*")]
    given = {
        name for page in pages if page.is_file() for name in re.findall(r"--config[ =]([\w/.]+)", page.read_text())
    }
    named = {name for name in given if "/" not in name and "." not in name}
    assert len(named) > 30
    assert named <= {*overlays(), "FILE", "NAME"}
    assert all((ROOT / name).is_file() for name in given if name.startswith("configs/"))


def test_the_glossary_has_words_and_options_that_are_used() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", (DOCS / "glossary.md").read_text(), re.MULTILINE)[2:]
    assert len(rows) > 30
    pages = " ".join(p.read_text() for p in [ROOT / "README.md", *DOCS.rglob("*.md")] if p.name != "glossary.md")
    source = " ".join(path.read_text() for path in (ROOT / "com_lightning").rglob("*.py"))
    used = re.sub(r"\s+", " ", f"{pages} {source}").lower()
    assert not [word for row in rows for word in row[0].split(", ") if word.lower() not in used]
    names = {name for _, meaning in rows for name in re.findall(r"`(\w+)`", meaning)}
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\b{name}\b", source)]


def test_figures_are_those_of_the_results() -> None:
    results = " ".join(path.read_text() for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")))
    text = (DOCS / "which_method.md").read_text()
    figures = set(re.findall(r"\d+\.\d(?: ± \d+\.\d)?", text.partition("## Figures")[2].partition("## Cost")[0]))
    assert len(figures) > 25
    assert not {figure for figure in figures if figure not in results}
