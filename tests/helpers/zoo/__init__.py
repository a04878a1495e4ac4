"""Small versions of well-known architectures, merges of their experts, and how much of each is solved."""

from tests.helpers.zoo.merges import Merged, account, averages, make_experts, merge, run, with_values
from tests.helpers.zoo.models import ZOO
from tests.helpers.zoo.shares import row, shares

__all__ = ["ZOO", "Merged", "account", "averages", "make_experts", "merge", "row", "run", "shares", "with_values"]
