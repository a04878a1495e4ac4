"""Well-known architectures, small: one of each kind; the others are in tests/slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.zoo.checks import CHECKS, FEW


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FEW)
def test_a_merge(name: str, check: Callable[[str], None]) -> None:
    check(name)
