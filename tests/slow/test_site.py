"""The documentation as a site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.running import ROOT


def test_the_site_asks_nothing_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert not [found for page in pages for found in loaded.findall(page.read_text())]
    method = (site / "docs" / "method.html").read_text()
    assert method.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') > 8
    assert not [page for page in pages if '<div class="arithmatex">' in page.read_text()]  # a formula that is not drawn
    assert not re.findall(r"<p>[^<]*\$[^<]*</p>|\\\\mathrm|\\\\frac", method)
    options = (site / "docs" / "api" / "cli.html").read_text()
    assert "--output_dir" in options
    assert "--methods" in options
    text = "".join(page.read_text() for page in (site / "docs" / "api").glob("*.html"))
    assert not re.findall(r":(?:class|func|meth|mod|attr|data):", text)  # roles of Sphinx
    assert "Example::" not in text
