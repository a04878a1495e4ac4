"""``python -m tests.helpers.zoo`` prints the table in docs/architectures.md."""

import sys

import torch

from tests.helpers.zoo import ZOO, row

torch.set_num_threads(1)
print("| Architecture | values, tiny | solved | values, default size | solved | averaged (tiny; default size) |")
print("|---|---:|---:|---:|---:|---|")
for architecture in sys.argv[1:] or ZOO:
    print(row(architecture), flush=True)
