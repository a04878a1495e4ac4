"""Rules in closed form, from the statistics of each layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Dict, Literal, Optional, Union

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import HELD_OUT, Balance, Distance, Rule
from com_lightning.core.solve.task_biases import own_tensors
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.methods.base import MergeJob, MergingMethod
from com_lightning.methods.enough import merge_with_enough


class ClosedForm(MergingMethod):
    """A rule whose layers are solved by :func:`~com_lightning.core.chain.chain.merge_layers`."""

    rule: Rule
    enough: float | None = None

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        if self.enough is None:
            return self._merge(job)
        return merge_with_enough(job, self._merge, self.enough)

    def _merge(self, job: MergeJob) -> list[LayerRecord]:
        weights = self.weights([task.name for task in job.tasks])
        if self.rule.private_biases:
            job.own.update(own_tensors(job.tasks, job.merged))
        records = merge_layers(job.tasks, job.merged, weights, self.rule, job.run, job.base, job.own)
        if self.rule.refit_private:
            refitted, found = refit(job.tasks, job.merged, job.own, self.rule, job.run)
            job.refitted.update(found)
            records += refitted
        return records

    def problems(self, tasks: Sequence[str]) -> list[str]:
        found = super().problems(tasks)
        ridge = self.rule.ridge
        if ridge != HELD_OUT and (isinstance(ridge, str) or not 0 <= ridge < math.inf):
            found.append(f"ridge: must be 0 or more, and finite, or '{HELD_OUT}', got {ridge!r}")
        if self.rule.balance and len(self.rule.streams) < 2:
            found.append("balance: needs target='expert', which tells how far the inputs of a layer have drifted")
        if self.enough is not None and not 0 < self.enough < 1:
            found.append(f"enough: must be between 0 and 1, got {self.enough}")
        if self.enough is not None and len(self.rule.streams) < 2:
            found.append("enough: needs target='expert', as errors are taken by the experts' outputs")
        if self.rule.perturbed_copies < 0:
            found.append(f"perturbed_copies: must be 0 or more, got {self.rule.perturbed_copies}")
        return found


class ChainOfMerges(ClosedForm):
    """Chain of Merges: layer by layer, in closed form, on the activations of the model merged so far.

    Each layer ``W`` minimises ``sum_i a_i / N_i sum_n s_n || W x̂_n - t_n ||² + l || W - W̄ ||²``, where ``x̂`` is the
    layer's input in the model merged so far, ``t`` the target, ``s`` the cosine normalisation, ``a_i`` the importance
    of task i and ``W̄`` the average of the experts. The idea is that of Buzzega et al., "Rethinking Layer-wise Model
    Merging through Chain of Merges", arXiv 2508.21421 (abstract); the equations are ours. So are the bias, which is
    solved jointly and counts in the norms as a further input that is always 1, and the choice of the larger of
    ``||x̂||²`` and ``||x||²`` for ``1 / s``: with ``||x̂||²`` alone, rows that the merged model has nearly lost rule the
    fit.

    Args:
        target: ``"expert"``: ``t = W_i x``, the expert's output on the expert's own input (two-sided): layers also
            correct what earlier merges have shifted. ``"merged"``: ``t = W_i x̂`` (one-sided): half the forwards.
        normalize: count each row by its direction rather than its size (cosine normalisation, ``s`` above).
        importance: task -> its weight, relative to the others; uniform by default.
        ridge: pull towards the average (``l`` above), relative to the mean of the diagonal of the Gram matrix;
            ``"held_out"``: chosen at each layer, on the statistics of batches that it is then not solved with, in the
            same pass (beyond the paper, see :mod:`com_lightning.core.solve.held_out`). Needs two batches of each task.
        residual: where a layer's output is added to a residual stream, ``t = W_i x + (r - r̂)`` with ``r`` and ``r̂``
            the stream in the expert and in the merged model: the layer repairs what the stream has lost as well. Beyond
            the paper; see ``benchmarks/results`` for what it brings. Without effect on a one-sided merge
            and where nothing is added to a layer's output.
        sensitivity: count errors in a layer's outputs by what they do to the expert's predictions (beyond the paper,
            see :mod:`com_lightning.core.chain.sensitivity`): to the ``"probabilities"`` that the outputs of its last layer
            stand for as logits, or to these ``"numbers"`` themselves, for what is no classifier and no language model.
            No labels are needed; each expert is run forward and backward once, and layers are solved by conjugate
            gradients. ``None``: all errors count alike.
        private_biases: each task keeps biases and normalisation parameters of its own, solved for it (beyond the paper,
            see :mod:`com_lightning.core.solve.task_biases`). For models that know their task when they are used, as they do if
            each has its own head: the result is one set of matrices and, for each task, a small set of vectors.
        refit_private: once the shared layers are merged, solve the private ones, heads say, for the features of the
            merged model (beyond the paper, see :mod:`com_lightning.core.chain.heads`). The result has no more parameters;
            it takes one more forward of the experts and the merged model. :class:`Refitted` does it for any rule.
        perturbed_copies: calibrate with so many copies of each batch besides, in which parts of samples are swapped
            and numbers get noise (beyond the paper, see :mod:`com_lightning.data.augmentation`). For few samples, and
            best with ``sensitivity``: cost and memory are those of as many more.
        balance: multiply the importance of each task, layer by layer, by a power of how far its inputs have drifted
            from the expert's so far (beyond the paper, see :func:`com_lightning.core.chain.fit.balanced`): ``"mean"``,
            its distance, for the mean over tasks, or ``"worst"``, the square of it, for the task that loses most.
        enough: use no more of the calibration samples than help: merge with an eighth of them, with twice as many, and
            so on, until that lowers the error on samples not calibrated with by less than this share (0.05, say); see
            :mod:`com_lightning.methods.enough`.
    """

    def __init__(
        self,
        target: Literal["expert", "merged"] = "expert",
        normalize: bool = True,
        importance: Optional[Dict[str, float]] = None,
        ridge: Union[float, Literal["held_out"]] = 0.01,
        residual: bool = True,
        sensitivity: Optional[Distance] = None,
        private_biases: bool = False,
        refit_private: bool = False,
        perturbed_copies: int = 0,
        balance: Optional[Balance] = None,
        enough: Optional[float] = None,
    ) -> None:
        super().__init__(importance)
        self.rule = Rule(
            "merged",
            target,
            normalize,
            ridge,
            residual=residual,
            sensitivity=sensitivity,
            private_biases=private_biases,
            refit_private=refit_private,
            perturbed_copies=perturbed_copies,
            balance=balance,
        )
        self.enough = enough


class RegMean(ClosedForm):
    """RegMean: every layer is merged on its own, on the experts' activations.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849, section 3.2. We
    regularise with a ridge towards the average, where the paper scales off-diagonal entries, and solve every layer that
    has a closed form, not only linear ones.

    Args:
        normalize: count each row by its direction rather than its size; the paper does not.
        importance: task -> its weight, relative to the others; uniform by default.
        ridge: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
    """

    def __init__(
        self,
        normalize: bool = False,
        importance: Optional[Dict[str, float]] = None,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(importance)
        self.rule = Rule("expert", "merged", normalize, ridge)


class RegMeanPlusPlus(ClosedForm):
    """RegMean++: RegMean on the activations of the model merged so far.

    Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", arXiv
    2508.03121: statistics are taken where layers before have been merged already. The authors go by transformer blocks,
    and take what is within a block from the expert's block on the merged model's input; we go by layers, so that all
    that comes before is merged. Ridge, bias and layers are as in :class:`RegMean`. It is the one-sided
    :class:`ChainOfMerges` without its normalisation.

    Args:
        normalize: count each row by its direction rather than its size; the paper does not.
        importance: task -> its weight, relative to the others; uniform by default.
        ridge: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
    """

    def __init__(
        self,
        normalize: bool = False,
        importance: Optional[Dict[str, float]] = None,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(importance)
        self.rule = Rule("merged", "merged", normalize, ridge)
