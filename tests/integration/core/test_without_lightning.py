"""The core stands alone."""

from __future__ import annotations

import subprocess
import sys


def test_the_core_needs_no_lightning() -> None:
    code = "import sys; sys.modules['lightning'] = None; import com_lightning.core.chain.chain; print('fine')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "fine", result.stderr
