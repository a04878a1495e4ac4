"""Rules on top of another rule, which they leave as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from com_lightning.methods.averaging import Average
from com_lightning.methods.base import MergingMethod, Need
from com_lightning.methods.parameterwise import Combine, ParameterRule, SharedParameter


class OnTop(ParameterRule):
    """A rule that changes what another one merges, or its result.

    Args:
        method: the rule below. It must merge each parameter on its own, or be Average. Its importance counts.
    """

    def __init__(self, method: MergingMethod) -> None:
        super().__init__(method.importance)
        self.method = method
        self.needs = frozenset[Need]([*method.needs, "base"])

    @abstractmethod
    def combiner(self, parameters: Sequence[SharedParameter]) -> Combine: ...

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        return self.combiner([parameter])(parameter)

    def below(self, parameters: Sequence[SharedParameter]) -> Callable[[SharedParameter], Tensor]:
        """What the rule below makes of a parameter; the average, where it has none of its own."""
        rule = self.method.combiner(parameters) if isinstance(self.method, ParameterRule) else None

        def combine(parameter: SharedParameter) -> Tensor:
            value = rule(parameter) if rule else None
            return parameter.average() if value is None else value

        return combine

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = [f"method: {problem}" for problem in self.method.problems(tasks)]
        if not isinstance(self.method, (ParameterRule, Average)):
            problems.append(
                f"method: {type(self).__name__} goes on top of rules that merge task vectors, parameter by parameter, "
                f"such as TaskArithmetic, TIES and TSVM; {type(self.method).__name__} does not"
            )
        return problems
