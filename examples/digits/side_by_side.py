"""Several merges of the same experts in one table, from the `report.json` in each result's folder.

python -m examples.digits.side_by_side outputs/digits/merged outputs/digits/accurate
"""

import json
import sys
from pathlib import Path

from com_lightning.results.tables import mean, number, percent, table


def side_by_side(folders: list[Path]) -> str:
    """A row per task with the accuracy of its expert, the plain average and each merge, then the means.

    Args:
        folders: Results of merges of the same experts, validated on the same images.
    """
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    first, monitor = reports[0], reports[0]["monitor"]
    models = {"expert": first["metrics"]["expert"], "average": first["metrics"]["average"]}
    models.update({folder.name: report["metrics"]["merged"] for folder, report in zip(folders, reports)})
    values = {name: [metrics[task][monitor] for task in first["tasks"]] for name, metrics in models.items()}
    rows = [["task", *values]]
    rows += [[task, *map(number, row)] for task, row in zip(first["tasks"], zip(*values.values()))]
    rows.append(["mean", *(number(mean(column)) for column in values.values())])
    shares = ([value / expert for value, expert in zip(column, values["expert"])] for column in values.values())
    return table([*rows, ["of expert", *(percent(mean(share)) for share in shares)]])


if __name__ == "__main__":
    print(side_by_side([Path(folder) for folder in sys.argv[1:]]))
