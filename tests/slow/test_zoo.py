"""Well-known architectures, small: all but the few of tests/integration/core/test_zoo.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.zoo import ZOO
from tests.helpers.zoo.checks import CHECKS, FEW


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [name for name in ZOO if name not in FEW])
def test_a_merge(name: str, check: Callable[[str], None]) -> None:
    check(name)
