"""The example of several processes; what it starts: tests/slow/test_ddp_merge.py."""

from __future__ import annotations

import re

from tests.helpers.machines import EXAMPLE
from tests.helpers.running import ROOT


def test_what_the_readme_names_is_there() -> None:
    text = (EXAMPLE / "README.md").read_text()
    named = set(re.findall(r"(?:configs|examples)/[\w/.]+\w", text))
    assert {"configs/digits/merge.yaml", "examples/ddp_merge/torchrun.sh", "examples/ddp_merge/merge.sbatch"} <= named
    assert all((ROOT / name).is_file() for name in named)
