"""The chain of merges: at each layer gather statistics, solve, write the merged weight, go on."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.chain.find_positions import warn_of_doubts, with_places
from com_lightning.core.chain.find_residuals import find_residuals
from com_lightning.core.chain.fit import Fit, Solve, fit
from com_lightning.core.chain.gather import Gatherer
from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.output_error import OutputError, relative_error
from com_lightning.core.chain.residual_stream import ResidualStreams
from com_lightning.core.chain.sensitivity import roots
from com_lightning.core.chain.soundness import check_solution
from com_lightning.core.chain.task_tensors import own_parts, record_of_tasks
from com_lightning.core.solve.statistics import InputMeans
from com_lightning.core.sweep.context import Context, Solved, one_at_a_time
from com_lightning.core.sweep.layer import CalibrationForward, Layer, forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.sweep import Extent, Sweep, Visitor
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch, Task
from com_lightning.core.tensors import private_torch
from com_lightning.errors import some

Solution = tuple[LayerRecord, list[Extent], list[SkippedBatch]]
"""What the owner of a layer tells the others: its record, what was written, and what an earlier run skipped there."""


def merge_layers(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    importance: Sequence[float],
    options: ChainOptions,
    context: Context | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    task_tensors: Mapping[str, Sequence[Tensor]] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
    solve: Solve | None = None,
) -> list[LayerRecord]:
    """Merge every layer that has a closed form, in execution order, in one pass over the data.

    Args:
        tasks: the experts and their calibration data.
        merged: full name of each shared parameter or buffer -> the tensor that holds its merged value. On entry it
            holds the average of the experts, or the anchor that a rule gives. Solved parameters are written in place;
            the others stay as they are.
        importance: one weight per task, summing to one.
        options: what is solved.
        context: how it is carried out. With other processes, all must be given the same experts. Statistics are added
            up, each layer is solved by one process, and all end with the same merged weights and records.
        anchor: the same names -> the value that the ridge pulls towards: in the base, or as a rule gives it. Needed
            unless the anchor of the options is the average.
        task_tensors: name of what each task keeps for itself -> one tensor for each task, written in place, see
            :func:`~com_lightning.core.chain.task_tensors.task_tensors`.
        fixed: full name of what else the merged model has in place of the expert's -> tensor. It is not merged.
        solve: solves a layer in place of :func:`~com_lightning.core.chain.fit.fit`.

    Returns:
        The layers that were reached, in the order of merging, then what was used but has no closed form. A tied weight
        is merged at the first layer that uses it. A layer that is called several times in one forward is merged from
        its first call.
    """
    context = context or Context()
    with context.peers.shares_failures(), one_at_a_time():
        repairs = options.residual and options.two_sided
        experts = Models(tasks, merged, ("expert",)) if repairs or any(task.has_masks for task in tasks) else None
        tasks = with_places(tasks, experts, context)
        streams = ResidualStreams(find_residuals(tasks, merged, context, experts) if repairs else {})
        del experts
        metrics: Mapping[str, Sequence[Tensor | None]] = {}
        if options.sensitivity:
            metrics = roots(tasks, merged, options.sensitivity, context)
            if all(root is None for of_layer in metrics.values() for root in of_layer):
                context.warnings.append(
                    "sensitivity: the predictions have no gradient (is validation_step under torch.no_grad?), so all "
                    "errors count alike; a calibration_step, if the module has one, runs in place of validation_step"
                )
        pulls_towards = None if options.anchor == "average" else anchor
        models = Models(tasks, merged, options.streams, pulls_towards, task_tensors, fixed)
        solver = LayerSolver(tasks, models, importance, options, context, streams, metrics, solve)
        pager = None if context.memory_budget is None else Pager(context.memory_budget, models.device)
        records = Sweep(tasks, models, solver, context, pager=pager).run()
        context.warnings += warn_of_doubts(records, context.unplaced) + warn_of_unused_inputs(records)
        return records


def warn_of_unused_inputs(records: Sequence[LayerRecord]) -> list[str]:
    """Return warnings of layers that were called with inputs that do not count."""
    warnings = []
    if repeated := [record for record in records if record.calls > 1]:
        most = max(repeated, key=lambda record: record.calls)
        warnings.append(
            f"{some([record.name for record in repeated])}: called more than once in a forward ({most.name} "
            f"{most.calls} times) and merged from the inputs of the first call alone; if that call is not like the "
            "others (the first step of a recurrent cell, the first token of a text that is generated), give the module "
            "a calibration_step whose first calls have typical inputs"
        )
    if late := [record for record in records if record.late]:
        warnings.append(
            f"{some([record.name for record in late])}: reached by some forwards only after it was merged, so that "
            "their inputs do not count; register the layers in the order in which all batches use them"
        )
    return warnings


class LayerSolver(Visitor):
    """Solves layer after layer, and writes the merged weights.

    Args:
        tasks, importance, options, context: as for :func:`merge_layers`.
        models: that are merged.
        streams: follows the residual streams that are repaired.
        metrics: layer -> for each task, the root of the matrix by which errors count, see
            :func:`~com_lightning.core.chain.sensitivity.roots`.
        solve: as for :func:`merge_layers`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        models: Models,
        importance: Sequence[float],
        options: ChainOptions,
        context: Context,
        streams: ResidualStreams,
        metrics: Mapping[str, Sequence[Tensor | None]],
        solve: Solve | None = None,
    ) -> None:
        self.tasks, self.models, self.importance, self.options = tasks, models, importance, options
        self.context, self.streams, self.metrics, self.solve = context, streams, metrics, solve
        self.gatherer = Gatherer(options, streams)
        self.watches_outputs = options.two_sided
        self._output_error = OutputError()

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        start = time.perf_counter()
        layer = sweep.layer(name) if calls else None
        self.streams.enter(name, {forward_id(call): call.input for call in calls})
        if layer:
            layer.repairs_stream = name in self.streams.writers
        earlier = self.context.journal.get(name)
        gathered = self.gatherer.gather(sweep, layer, name, calls, earlier is not None)
        if gathered.refusal:
            return LayerRecord(name, layer.layer_type.name if layer else "", note=gathered.refusal)
        record, written = self._solve_or_restore(sweep, name, layer, earlier)
        sweep.mark_solved(written)
        owner, peers, merged = self.gatherer.owner, self.context.peers, self.models.merged
        for full in dict.fromkeys(full for full, _ in written):
            with private_torch.unversioned_write(merged[full]):
                peers.broadcast(merged[full], owner)
            sweep.mark_written(full)
        if not gathered.solved_before:
            record.seconds = time.perf_counter() - start
            values = [merged[full].detach().flatten()[first : last + 1] for full, (first, last) in written]
            self.context.journal.add(name, Solved(record, written, values, gathered.skipped))
        return record

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> None:
        batch, task = forward.id.batch, self.tasks[forward.id.batch.task]
        output = self.streams.leave(layer, forward.id, output)
        self._output_error.add(forward.id, output, task.row_mask(task.batches[batch.position], layer, "output"))

    def shared_value(self) -> tuple[float, float] | None:
        return self._output_error.sums()

    def on_left(self, record: LayerRecord | None, values: Sequence[Any]) -> None:
        error = relative_error(values)
        if record is not None and error is not None and not record.permuted:
            record.residual = error
        self._output_error = OutputError()

    def _solve_or_restore(
        self, sweep: Sweep, name: str, layer: Layer | None, earlier: Solved | None
    ) -> tuple[LayerRecord, list[Extent]]:
        """One process solves the layer, or restores what an earlier run has solved. All learn what was written."""
        mine: Solution | None = None
        if earlier:
            self._restore(earlier)
            mine = (earlier.record, earlier.written, earlier.skipped)
        elif layer and self.gatherer.inputs and self.gatherer.owner == self.context.peers.rank:
            mine = (*self._solve(sweep, layer, self.gatherer.inputs), [])
        solution = self.context.peers.exchange(mine)[self.gatherer.owner]
        record, written, skipped = solution or (LayerRecord(name, ""), [], [])
        skipped_here = sweep.bad_batches.skip_again(skipped)
        if self.gatherer.seen:
            self.gatherer.seen.forget(skipped_here)
        return record, written

    def _restore(self, earlier: Solved) -> None:
        """Write what was solved in an earlier run."""
        for (name, (first, last)), values in zip(earlier.written, earlier.values):
            whole = self.models.merged[name]
            with private_torch.unversioned_write(whole):
                flat = whole.detach().flatten()
                flat[first : last + 1] = values.to(flat.device)
                whole.copy_(flat.view(whole.shape))

    def _solve(self, sweep: Sweep, layer: Layer, inputs: LayerInputs) -> tuple[LayerRecord, list[Extent]]:
        """Solve a layer and write the merged weights."""
        start = time.perf_counter()
        record = LayerRecord(layer.name, layer.layer_type.name)
        rank = self.options.rank_of(layer.name)
        of_tasks = own_parts(layer, self.models, rank)
        if self.solve:
            result = self.solve(layer, inputs, self.importance)
        else:
            metrics = self.metrics.get(layer.name, ())
            result = fit(layer, inputs, self.options, self.importance, metrics, of_tasks)
        if isinstance(result, str):
            record.note = result
            return record, []
        means = inputs.means(layer.weights) if self.options.inputs == "merged" else None
        values = layer.layer_type.finish(layer.merged, result.weight, layer.experts, means, result.importance)
        if isinstance(values, str):
            record.note = values
            return record, []
        check_solution(layer, values, self.models.merged)
        # Task tensors come first: how a layer is finished depends on what it was.
        written = self._write_task_tensors(layer, result.task_weights, means, of_tasks)
        record_of_tasks(record, layer, self.models, rank)
        for local, part in layer.parts.items() if not self.options.keeps_shared else ():
            whole = self.models.merged[part.name]
            size = part.of(whole).numel()
            if local in values:  # if not, the present value is as good
                copies = self.models.task_tensors.get(part.name, ()) if local not in of_tasks else ()
                for full in (part.name, *copies):
                    # A forward may be about to differentiate through what was computed with other parts of it.
                    with private_torch.unversioned_write(self.models.merged[full]):
                        part.write(self.models.merged[full], values[local])
                written += [(full, part.extent(whole)) for full in copies]
            name = self.models.packed_names.get(part.name, part.name)
            if part.name in self.models.buffers:
                record.buffers.append(name)
            else:
                record.parameters[name] = record.parameters.get(name, 0) + size
        self._describe(record, layer, inputs, result)
        self._count_zeros(record, layer, result)
        record.solving = time.perf_counter() - start
        return record, written + sweep.extents(layer)

    def _count_zeros(self, record: LayerRecord, layer: Layer, result: Fit) -> None:
        """Record what keeps the average, because no data reached it or its inputs are all zero."""
        layer_type = layer.layer_type
        reaches_all = layer_type.reaches_all_groups and any(record.rows.values())
        zeros = (result.informed == 0) & ((result.reached > 0) | reaches_all)
        record.groups_of_zeros = int(zeros.sum())
        record.groups_without_data = int(((result.reached == 0) & ~zeros).sum())
        if not record.groups_of_zeros:
            return
        is_weight = torch.zeros_like(layer.weights[0])
        is_weight[..., : is_weight.shape[2] - int(layer_type.has_bias(layer.merged))] = zeros[:, None, None]
        for local, values in layer_type.from_matrix(layer.merged, is_weight).items():
            count = int(values.count_nonzero())
            for stored, part in layer.parts.items():
                name = self.models.packed_names.get(part.name, part.name)
                # A parametrised weight is computed from tensors of other shapes, so all of it has to keep its value.
                is_original = stored.startswith(f"parametrizations.{local}.") and count == values.numel()
                if count and name in record.parameters and (stored == local or is_original):
                    kept = part.of(self.models.merged[part.name]).numel() if is_original else count
                    record.kept[name] = record.kept.get(name, 0) + kept

    def _write_task_tensors(
        self,
        layer: Layer,
        weights: Sequence[Tensor],
        means: Sequence[InputMeans] | None,
        of_tasks: Collection[str],
    ) -> list[Extent]:
        """Write what each task keeps of its own solution for itself."""
        written: list[Extent] = []
        for number, weight in enumerate(weights):
            of_task = None if means is None else means[number : number + 1]
            values = layer.layer_type.finish(layer.merged, weight, layer.experts[number : number + 1], of_task, [1.0])
            assert not isinstance(values, str), "what cannot be written is not merged"
            check_solution(layer, values, self.models.merged)
            for local in of_tasks:
                part = layer.parts[local]
                name = self.models.merged_name(part.name, number)
                tensor = self.models.merged[name]
                with private_torch.unversioned_write(tensor):
                    part.write(tensor, values[local])
                written.append((name, part.extent(tensor)))
        return written

    def _describe(self, record: LayerRecord, layer: Layer, inputs: LayerInputs, result: Fit) -> None:
        """Record how a layer was solved."""
        record.groups = len(result.reached)
        record.groups_kept_average, record.cg_steps, record.residual = (
            result.groups_kept_average,
            result.cg_steps,
            result.residual,
        )
        record.gains = result.gains
        if inputs.factor is not None:
            record.ridge = self.options.ridge
            record.condition, record.jitter = inputs.factor.condition, inputs.factor.jitter
        first_layer = self.gatherer.seen.layer if self.gatherer.seen else record.name
        record.shared_with = first_layer if first_layer != record.name else None
        record.unpaired, record.permuted, record.uncorrected = inputs.unpaired, inputs.permuted, inputs.uncorrected
        record.corrected_for = list(map(str, self.streams.writers.get(record.name, ())))
        record.masked = [task.name for task in self.tasks if task.name in inputs.masked]
        record.doubtful = [task.name for task in self.tasks if task.name in inputs.doubtful]
        if self.options.balance or self.options.by_similarity:
            record.importance = {task.name: share for task, share in zip(self.tasks, result.importance)}
        for task, means in zip(self.tasks, inputs.means(layer.weights)):
            record.rows[task.name] = means.rows
            if means.similarity is not None:
                record.similarity[task.name] = means.similarity
            if means.drift_norms.rows:
                record.distance[task.name] = means.drift_norms.relative_distance
                record.cosine[task.name] = means.drift_norms.mean_cosine
