"""What became of a parameter in a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal[
    "solved",
    "solved in part",
    "averaged",
    "merged",
    "re-estimated",
    "buffer",
    "private",
    "private, solved for each task",
    "private, solved for the merged model",
    "folded",
]


@dataclass(frozen=True)
class ParameterOutcome:
    """What became of one parameter or buffer. As text, it reads like ``averaged: no calibration forward uses it``.

    Attributes:
        status: One of

            - ``"solved"``: merged in closed form; ``"solved in part"``: no data, or only zeros, reached its other
              values;
            - ``"averaged"``: averaged instead of being solved, or by a method that only averages;
            - ``"merged"``: merged by a rule that treats each parameter on its own;
            - ``"re-estimated"``: running statistics, computed from the merged model's inputs;
            - ``"buffer"``: any other buffer, which each task keeps; one that was averaged counts as ``"averaged"``;
            - ``"private"``: kept by each task; ``"private, solved for each task"``: it would be shared by default;
              ``"private, solved for the merged model"``: refitted to the features of the merged model;
            - ``"folded"``: part of an adapter that was merged into its layer.
        detail: Why the parameter was not solved, or the name of the rule that merged it.
    """

    status: Status
    detail: str | None = None

    def __str__(self) -> str:
        if self.detail is None:
            return self.status
        return f"{self.status}{' by ' if self.status == 'merged' else ': '}{self.detail}"
