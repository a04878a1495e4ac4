"""The pagers that a merge makes."""

from __future__ import annotations

from typing import Any

import pytest

from com_lightning.core.chain import chain
from com_lightning.core.sweep.offload import Pager


def recorded_pagers(monkeypatch: pytest.MonkeyPatch) -> list[Pager]:
    """All that are made from now on."""
    made: list[Pager] = []

    class Recorded(Pager):  # type: ignore[no-untyped-call]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(chain, "Pager", Recorded)
    return made
