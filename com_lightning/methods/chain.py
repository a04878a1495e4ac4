"""Rules in closed form, from the statistics of each layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.chain.ranks import with_ranks
from com_lightning.core.chain.task_tensors import task_tensors, warn_of_uncorrected, without_copies
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.errors import MergeError
from com_lightning.methods.base import MergeJob, MergingMethod
from com_lightning.methods.combined import start_from_average


class ClosedForm(MergingMethod):
    """A rule whose layers are solved by :func:`~com_lightning.core.chain.chain.merge_layers`."""

    options: ChainOptions

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        importance = self.weights([task.name for task in job.tasks])
        own: dict[str, list[Tensor]] = {}
        options = self.options
        if options.task_share:
            options = with_ranks(job.tasks, job.merged, importance, options, job.context)
        anchor, others = self.anchored(job)
        if options.private_biases or self.has_corrections:
            own = task_tensors(job.tasks, job.merged, weights=self.has_corrections)
        records = merge_layers(job.tasks, job.merged, importance, options, job.context, anchor, own)
        job.task_tensors.update(without_copies(own, records))
        if self.has_corrections:
            job.warnings += warn_of_uncorrected(job.tasks, job.merged, records, options.ranks)
        if self.options.refit_heads:
            head_records, heads = refit(job.tasks, job.merged, job.task_tensors, self.options, job.context)
            job.heads.update(heads)
            others += head_records
        return records + others

    def anchored(self, job: MergeJob) -> tuple[Mapping[str, Tensor] | None, list[LayerRecord]]:
        """Return what the ridge pulls towards, if it is not the average, and records of how that was merged."""
        return job.base, []

    def describe(self) -> dict[str, Any]:
        settings = super().describe()  # whose importance says what by_similarity does
        options = vars(self.options).items()
        return {**settings, **{n: v for n, v in options if n not in settings and n != "by_similarity"}}

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        ridge = self.options.ridge
        if not 0 <= ridge < math.inf:
            problems.append(f"ridge: must be 0 or more, and finite, got {ridge}")
        if self.options.task_rank < 0:
            problems.append(f"task_rank: must be 0 or more, got {self.options.task_rank}")
        problems += share_problems(self.options)
        if self.options.balance and len(self.options.streams) < 2:
            problems.append("balance: needs target='expert', which measures how far the inputs of a layer have drifted")
        return problems


def share_problems(options: ChainOptions) -> list[str]:
    """What is wrong with the budget of corrections."""
    problems = []
    if not 0 <= options.task_share < 1:
        problems.append(f"task_share: must be at least 0 and less than 1, got {options.task_share}")
    if options.task_share and options.task_rank:
        problems.append("task_share: chooses the ranks itself; leave task_rank out")
    if options.task_share and not options.sensitivity:
        problems.append("task_share: needs sensitivity, which tells what a rank of each layer is worth; set it")
    return problems


class ChainOfMerges(ClosedForm):
    """Chain of Merges: layer by layer, in closed form, on the activations of the model merged so far.

    Each layer ``W`` minimises ``sum_i a_i / N_i sum_n s_n || W x̂_n - t_n ||² + l || W - W̄ ||²``. ``x̂`` is the layer's
    input in the model merged so far, ``t`` the target, ``s`` the weight of a row, ``a_i`` the importance of task i, and
    ``W̄`` the average of the experts. Then the private layers of each task, such as its head, are solved for the
    features of the merged model.

    The idea is from Buzzega et al., "Rethinking Layer-wise Model Merging through Chain of Merges", arXiv 2508.21421
    (abstract). The equations are ours. The bias is ours too: it is solved together with the weight. The defaults are
    those that were best on our benchmarks (``benchmarks/results``). ``--config paper`` has the paper's rule, as far as
    it is known.

    Args:
        target: ``"expert"``: ``t = W_i x``, the expert's output on the expert's own input (two-sided). Layers then also
            correct the drift that earlier merges caused. ``"merged"``: ``t = W_i x̂`` (one-sided). It needs half the
            forwards.
        normalize: count each row by its direction, not by its size (cosine normalisation). ``1 / s``
            is then the larger of ``||x̂||²`` and ``||x||²``: with ``||x̂||²`` alone, rows that are small in the merged
            model, but have large targets, would dominate the fit. In the norms, the bias counts as one more input that
            is always 1. By default ``s`` is 1.
        importance: task -> its weight, relative to the others. The default is uniform. ``"similarity"``: computed layer
            by layer, the larger the more similar the task's inputs ``x̂`` are to each other (our reading of the paper's
            public reviews, see :mod:`com_lightning.core.solve.similarity`). This takes one more Gram matrix of each
            task.
        ridge: pull towards the average (``l`` above), relative to the mean of the diagonal of the Gram matrix.
        residual: repair residual streams. Where a layer's output is added to a residual stream, the target becomes
            ``t = W_i x + (r - r̂)`` with ``r`` and ``r̂`` the stream in the expert and in the merged model. Beyond the
            paper; ``benchmarks/results`` shows what it brings. It changes nothing in a one-sided merge.
        sensitivity: weight errors in a layer's outputs by their effect on the expert's predictions (beyond the paper,
            see :mod:`com_lightning.core.chain.sensitivity`). ``"probabilities"`` is for classifiers and language
            models: the outputs of the last layer are taken for logits. ``"numbers"`` is for all other models. It needs
            no labels. Each expert runs forward and backward once, and layers are solved by conjugate gradients.
            ``None``: all errors count alike.
        private_biases: solve biases and normalisation parameters for each task, which keeps them (beyond the paper,
            see :mod:`com_lightning.core.solve.task_biases`). The result is one set of matrices and a small set of
            vectors for each task. Use it for models that know their task when they are used, for instance because each
            task has its own head.
        task_rank: give each task a correction of this rank to the weight of every layer that has a matrix, an
            adapter that is solved with the shared weight, and its own biases and normalisation parameters as with
            ``private_biases`` (beyond the paper, see :mod:`com_lightning.core.solve.task_adapters`). Use it for models
            that know their task when they are used. 0: none.
        task_share: in place of ``task_rank``, give each task biases, normalisation parameters and corrections with at
            most this share of the shared parameters' values. A first chain measures what each rank of each layer
            brings, see :mod:`com_lightning.core.chain.ranks`. It needs ``sensitivity``.
        refit_heads: once the shared layers are merged, solve the private layers, such as heads, for the features of the
            merged model (beyond the paper, see :mod:`com_lightning.core.chain.heads`). It needs no labels, and the
            result has no more parameters. It takes one more forward of the experts and of the merged model. The report
            names the private parameters that stay as they are, and why. What all experts have alike stays. Where
            nothing is private, it does nothing. :class:`Refitted` does the same for any rule.
        balance: give more importance, layer by layer, to tasks whose inputs have drifted more from the expert's (beyond
            the paper, see :func:`com_lightning.core.chain.fit.balanced`). It raises the task that loses most.
        anchor: what takes the place of ``W̄`` (beyond the paper): the average, the base, or what another rule gives,
            such as :class:`TSVM`. With a rule, what the chain does not solve is as that rule gives it, too: layers
            without a closed form, and what no data reach. The rule has its own importance, and must not merge layer by
            layer itself.

    Raises:
        MergeError: if the anchor is something else.
    """

    def __init__(
        self,
        target: Literal["expert", "merged"] = "expert",
        normalize: bool = False,
        importance: dict[str, float] | Literal["similarity"] | None = None,
        ridge: float = 0.01,
        residual: bool = True,
        sensitivity: Distance | None = None,
        private_biases: bool = False,
        refit_heads: bool = True,
        balance: bool = False,
        task_rank: int = 0,
        task_share: float = 0.0,
        anchor: MergingMethod | Literal["average", "base"] = "average",
    ) -> None:
        super().__init__(importance)
        if not isinstance(anchor, MergingMethod) and anchor not in ("average", "base"):
            raise MergeError([f"anchor: must be a rule, 'average' or 'base', got {anchor!r}"])
        self.anchor = anchor
        if isinstance(anchor, MergingMethod):
            self.needs = self.needs | anchor.needs
        elif anchor == "base":
            self.needs = self.needs | {"base"}
        self.options = ChainOptions(
            "merged",
            target,
            normalize,
            ridge,
            residual=residual,
            sensitivity=sensitivity,
            private_biases=private_biases,
            refit_heads=refit_heads,
            balance=balance,
            task_rank=task_rank,
            task_share=task_share,
            by_similarity=importance == "similarity",
            anchor="rule" if isinstance(anchor, MergingMethod) else anchor,
        )

    def anchored(self, job: MergeJob) -> tuple[Mapping[str, Tensor] | None, list[LayerRecord]]:
        if not isinstance(self.anchor, MergingMethod):
            return super().anchored(job)
        if self.anchor.importance != self.importance:
            start_from_average(job, job.merged, self.anchor)
        records = self.anchor.merge(job)
        copies = {id(tensor): tensor.detach().clone() for tensor in job.merged.values()}
        return {name: copies[id(tensor)] for name, tensor in job.merged.items()}, records

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if isinstance(self.anchor, MergingMethod):
            problems += [f"anchor: {problem}" for problem in self.anchor.problems(tasks)]
            if self.anchor.runs_calibration_forwards:
                name = type(self.anchor).__name__
                problems.append(f"anchor: {name} merges layer by layer itself; give a rule such as TSVM or TIES")
        return problems


class RegMean(ClosedForm):
    """RegMean: every layer is merged on its own, on the experts' activations.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849, section 3.2. We
    regularise with a ridge towards the average; the paper scales off-diagonal entries instead. We solve every layer
    that has a closed form, and not only linear ones.

    Args:
        normalize: count each row by its direction, not by its size. The paper does not do this.
        importance: task -> its weight, relative to the others. The default is uniform.
        ridge: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
    """

    def __init__(
        self,
        normalize: bool = False,
        importance: dict[str, float] | None = None,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(importance)
        self.options = ChainOptions("expert", "merged", normalize, ridge)


class RegMeanPlusPlus(ClosedForm):
    """RegMean++: RegMean on the activations of the model merged so far.

    Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", arXiv
    2508.03121. The statistics of a layer come from a model whose earlier layers are merged. The authors merge by
    transformer blocks: within a block, activations are those of the expert's block on the merged model's input. We
    merge by layers, so all earlier layers are merged. Ridge, bias and layers are as in :class:`RegMean`. This is the
    one-sided :class:`ChainOfMerges` with ``refit_heads=False``.

    Args:
        normalize: count each row by its direction, not by its size. The paper does not do this.
        importance: task -> its weight, relative to the others. The default is uniform. ``"similarity"``: computed layer
            by layer, as in :class:`ChainOfMerges`.
        ridge: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
    """

    def __init__(
        self,
        normalize: bool = False,
        importance: dict[str, float] | Literal["similarity"] | None = None,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(importance)
        by_similarity = importance == "similarity"
        self.options = ChainOptions("merged", "merged", normalize, ridge, by_similarity=by_similarity)
