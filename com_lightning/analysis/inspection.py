"""``com-lightning inspect``: how far apart experts are, before anything is merged.

Checkpoints are compared directly, without a model. The tensors that are compared are those that all experts have under
the same name and in the same shape. :func:`inspect` compares them one by one and keeps only sums per layer, from which
distances, cosines and sign conflicts follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.sweep.context import each
from com_lightning.core.tensors.modules import matches_any
from com_lightning.errors import MergeError, paths_told
from com_lightning.experts.files import folder_problems, read_checkpoint
from com_lightning.experts.hub import local_folders
from com_lightning.experts.state_dicts import plain_state, some
from com_lightning.progress import drawn
from com_lightning.results.atomic import write_text, write_whole
from com_lightning.results.figures import new_figure
from com_lightning.results.tables import table

_QUANTILE = 0.95
"""Share of distances that the colours of the picture tell apart."""
MOST = 12
"""How many layers the command prints."""


@dataclass
class LayerDistance:
    """How far apart the experts are in one layer, or in several layers together: sums, which can be added.

    The task vector of expert i is ``τ_i = θ_i - θ``, and ``θ`` is the base or, without a base, the mean of the experts.

    Attributes:
        name: Name of the layer; empty for all layers together.
        products: Inner products ``<τ_i, τ_j>``, one row per expert.
        energy: ``||θ||²``.
        against: Magnitude of the task vectors against the majority sign of each value: ``min(Σ τ⁺, Σ τ⁻)``, summed over
            values.
        magnitude: ``Σ_i |τ_i|``, summed over values.
        values: Number of values.
    """

    name: str
    products: list[list[float]]
    energy: float = 0.0
    against: float = 0.0
    magnitude: float = 0.0
    values: int = 0

    @staticmethod
    def of(name: str, experts: Sequence[Tensor], base: Tensor | None) -> LayerDistance:
        """Compare one tensor of all experts.

        Args:
            name: Name of the layer.
            experts: The tensor in each expert.
            base: The tensor in the base; ``None``: the mean of the experts takes its place.

        Returns:
            The sums of this tensor.
        """
        wide = [expert.detach().flatten().float() for expert in experts]
        origin = base.detach().flatten().float() if base is not None else torch.stack(wide).mean(0)
        vectors = torch.stack(wide).sub_(origin)
        products = (vectors @ vectors.T).double().tolist()
        up, down = vectors.clamp_min(0).sum(0), vectors.clamp_max(0).sum(0).neg_()
        against, magnitude = torch.minimum(up, down).sum(), up.sum() + down.sum()
        energy = float(origin.square().sum())
        return LayerDistance(name, products, energy, float(against), float(magnitude), len(origin))

    def add(self, other: LayerDistance) -> None:
        """Add the sums of another tensor or layer.

        Args:
            other: What to add.
        """
        self.products = [[a + b for a, b in zip(*rows)] for rows in zip(self.products, other.products)]
        self.energy += other.energy
        self.against += other.against
        self.magnitude += other.magnitude
        self.values += other.values

    @property
    def distances(self) -> list[float]:
        """``||τ_i|| / ||θ||`` of each expert."""
        return [(max(row[i], 0.0) / max(self.energy, 1e-30)) ** 0.5 for i, row in enumerate(self.products)]

    @property
    def cosines(self) -> list[list[float]]:
        """Cosines between the task vectors; 0 if one of them is 0."""
        norms = [max(row[i], 0.0) ** 0.5 for i, row in enumerate(self.products)]
        return [
            [value / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else 0.0 for j, value in enumerate(row)]
            for i, row in enumerate(self.products)
        ]

    @property
    def conflict(self) -> float:
        """Share of the task vectors' magnitude against the majority sign: 0 if all agree, at most 1/2."""
        return self.against / self.magnitude if self.magnitude > 0 else 0.0


@dataclass
class Inspection:
    """How far apart experts are.

    Attributes:
        experts: Names of the experts.
        layers: The layers, in the order of the first expert's state dict.
        from_base: Whether task vectors start at a base rather than at the experts' mean.
        alone: Names of tensors that are not compared because not all experts have them in the same shape, mostly heads.
    """

    experts: list[str]
    layers: list[LayerDistance]
    from_base: bool
    alone: list[str]

    @cached_property
    def whole(self) -> LayerDistance:
        """All layers together."""
        zero = [[0.0] * len(self.experts) for _ in self.experts]
        total = LayerDistance("", zero)
        for layer in self.layers:
            total.add(layer)
        return total

    @cached_property
    def furthest(self) -> list[LayerDistance]:
        """The layers, those first in which an expert is furthest from the base or the mean."""
        return sorted(self.layers, key=lambda layer: max(layer.distances), reverse=True)

    def to_json(self) -> str:
        """Everything as JSON text."""

        def content_of(layer: LayerDistance) -> dict[str, Any]:
            content = {"distance": dict(zip(self.experts, layer.distances)), "values": layer.values}
            if self.from_base:
                content["cosines"] = {a: dict(zip(self.experts, row)) for a, row in zip(self.experts, layer.cosines)}
                content["conflict"] = layer.conflict
            return content

        content = {
            "experts": self.experts,
            "from_base": self.from_base,
            "whole": content_of(self.whole),
            "layers": {layer.name: content_of(layer) for layer in self.layers},
            "not compared": self.alone,
        }
        return json.dumps(content, indent=1) + "\n"

    def to_markdown(self, most: int | None = None) -> str:
        """Everything as Markdown.

        Args:
            most: How many layers to show, of those in which the experts are furthest away; by default all.

        Returns:
            The text.
        """
        whole = self.whole
        parts = [
            f"# {len(self.experts)} experts, {whole.values:,} values in {len(self.layers)} layers",
            *(self._experts_from_base() if self.from_base else self._experts_from_mean()),
            *self._layers(most),
        ]
        if self.alone:
            parts.append(f"Not compared, because not all experts have them in the same shape: {some(self.alone)}.")
        return "\n\n".join(parts) + "\n"

    def _experts_from_base(self) -> list[str]:
        whole = self.whole
        rows = [["expert", "distance from the base", *(f"cosine to {name}" for name in self.experts)]]
        for name, distance, cosines in zip(self.experts, whole.distances, whole.cosines):
            rows.append([name, f"{distance:.4f}", *(f"{cosine:.3f}" for cosine in cosines)])
        conflict = (
            f"Sign conflict: {100 * whole.conflict:.1f} % of the task vectors' magnitude is against the majority sign "
            "(0: all agree; 50: they cancel out)."
        )
        return [table(rows), conflict]

    def _experts_from_mean(self) -> list[str]:
        rows = [["expert", "distance from the mean"]]
        rows += [[name, f"{distance:.4f}"] for name, distance in zip(self.experts, self.whole.distances)]
        return [table(rows), "With a base (--base), the directions of the experts are compared too."]

    def _layers(self, most: int | None) -> list[str]:
        layers = self.furthest[:most]
        rows = [["layer", "values", *self.experts, *["sign conflict"] * self.from_base]]
        for layer in layers:
            conflict = [f"{100 * layer.conflict:.1f} %"] * self.from_base
            rows.append([layer.name, f"{layer.values:,}", *(f"{d:.4f}" for d in layer.distances), *conflict])
        which = "" if len(layers) == len(self.layers) else f", the {len(layers)} furthest of {len(self.layers)}"
        origin = "base" if self.from_base else "mean"
        return [f"Distances by layer{which}:", table(rows), f"Distances are relative to the norm of the {origin}."]


def inspect(
    experts: Mapping[str, str | Path], base: str | Path | None = None, private: Sequence[str] = ()
) -> Inspection:
    """Compare checkpoints.

    Args:
        experts: Name -> Lightning checkpoint, state dict, safetensors file, folder of ``save_pretrained``, or name on
            the Hub (``hf://owner/name``).
        base: The checkpoint that the experts were fine-tuned from, in any of these forms. It may hold only a part of
            the experts' modules, for example the transformers model in them.
        private: Patterns of parameters to leave out.

    Returns:
        Distances, cosines and sign conflicts, for all layers together and for each layer.

    Raises:
        MergeError: With all files that cannot be read, or if the experts have no tensor in common.
    """
    if len(experts) < 2:
        raise MergeError([f"inspect: needs two or more experts, got {len(experts)}"])
    states = dict[str, dict[str, Tensor]]()
    local, problems = local_folders({**experts, **({"the base": base} if base else {})})
    for name, path in local.items():
        try:
            with paths_told(f"expert '{name}'" if name in experts else "base"):
                states[name] = _tensors(Path(path))
        except MergeError as error:
            problems += error.problems
    if problems:
        raise MergeError(problems)
    origin = states.pop("the base") if base else None
    first, *others = states.values()
    names = [n for n in first if not matches_any(n, private)]
    common = [n for n in names if all(n in o and o[n].shape == first[n].shape for o in others)]
    if not common:
        raise MergeError([f"inspect: {some(list(experts))} have no tensor in common, by name and shape"])
    if origin is not None:
        origin = _aligned(origin, common)
        common = [n for n in common if n in origin and origin[n].shape == first[n].shape]
        if not common:
            raise MergeError([f"base: {base} has no tensor in common with the experts, by name and shape"])
    layers: dict[str, LayerDistance] = {}
    with drawn(None) as progress:
        for name in each(common, progress, "comparing"):
            layer = name.rpartition(".")[0] or name
            tensors = [state[name] for state in states.values()]
            distance = LayerDistance.of(layer, tensors, origin[name] if origin else None)
            if layer in layers:
                layers[layer].add(distance)
            else:
                layers[layer] = distance
    alone = sorted({n for state in states.values() for n in state} - set(common))
    return Inspection(list(experts), list(layers.values()), origin is not None, alone)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, for all floating-point tensors of a checkpoint or folder."""
    if path.is_dir() and (path / "config.json").is_file():
        if problems := folder_problems(path):
            raise MergeError([f"{path}: {problem}" for problem in problems])
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise MergeError([f"{path}: no model.safetensors and no pytorch_model.bin in it"])
        state = {name: value for file in files for name, value in read_checkpoint(file)["state_dict"].items()}
    elif (path / "adapter_config.json").is_file():
        raise MergeError(
            [f"{path}: a PEFT adapter without its model; call merge_and_unload() and save the model that it returns"]
        )
    else:
        state = read_checkpoint(path)["state_dict"]
    return {n: v for n, v in plain_state(state).items() if isinstance(v, Tensor) and v.is_floating_point()}


def _aligned(base: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The base under the experts' names: each may be a part of the other, so that a prefix is added or removed."""
    prefixes = {""} | {".".join(name.split(".")[:cut]) + "." for name in names for cut in (1, 2, 3)}
    wanted = set(names)
    longer = max(prefixes, key=lambda prefix: sum(prefix + name in wanted for name in base))
    renamed = {longer + name: value for name, value in base.items()}
    if wanted & renamed.keys():
        return renamed
    prefixes = {".".join(name.split(".")[:cut]) + "." for name in base for cut in (1, 2, 3)}
    shorter = max(prefixes, key=lambda prefix: sum(prefix + name in base for name in wanted), default="")
    return {name.removeprefix(shorter): value for name, value in base.items()}


def save(inspection: Inspection, folder: Path) -> list[str]:
    """Write ``inspection.md``, ``inspection.json`` and, if matplotlib is installed, ``inspection.png``.

    Args:
        inspection: What to write.
        folder: Where to; it is created if necessary.

    Returns:
        Names of the files.

    Raises:
        MergeError: If the folder cannot be written to.
    """
    with paths_told(f"output_dir: {folder} cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "inspection.md", inspection.to_markdown())
        write_text(folder / "inspection.json", inspection.to_json())
        if (figure := draw(inspection)) is None:
            return ["inspection.md", "inspection.json"]
        write_whole(folder / "inspection.png", lambda path: figure.savefig(path, format="png", dpi=130))
    return ["inspection.md", "inspection.json", "inspection.png"]


def draw(inspection: Inspection) -> Any:
    """Draw heat maps of the cosines between experts and of their distances by layer, and the conflicts of signs.

    Args:
        inspection: What to draw.

    Returns:
        A ``matplotlib.figure.Figure``, or ``None`` without matplotlib.
    """
    if (figure := new_figure(12, min(max(3.6, 1 + 0.16 * len(inspection.layers)), 14))) is None:
        return None
    panels = figure.subplots(1, 1 + 2 * inspection.from_base, squeeze=False)[0]
    _draw_distances(panels[-1 - inspection.from_base], inspection)
    if inspection.from_base:
        _draw_cosines(panels[0], inspection)
        axes, layers = panels[-1], inspection.furthest
        axes.barh(range(len(layers)), [100 * layer.conflict for layer in layers], color="#c1553b")
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_yticks([])
        axes.set_title("sign conflict by layer (%)", fontsize="medium")
    return figure


def _draw_distances(axes: Any, inspection: Inspection) -> None:
    names, layers = inspection.experts, inspection.furthest
    values = [layer.distances for layer in layers]
    # One layer far from all others, such as a head, must not make them all dark.
    ordered = sorted(value for row in values for value in row)
    top = ordered[min(int(_QUANTILE * len(ordered)), len(ordered) - 1)]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=top or None)
    axes.figure.colorbar(image, ax=axes, extend="max" if top < ordered[-1] else "neither")
    axes.set_title(f"distance from the {'base' if inspection.from_base else 'mean'}, by layer", fontsize="medium")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    step = max(len(layers) // 60, 1)
    axes.set_yticks(range(0, len(layers), step), [layer.name for layer in layers[::step]], fontsize=6)


def _draw_cosines(axes: Any, inspection: Inspection) -> None:
    names, cosines = inspection.experts, inspection.whole.cosines
    axes.imshow(cosines, cmap="coolwarm", vmin=-1, vmax=1)
    for y, row in enumerate(cosines):
        for x, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("cosine between task vectors", fontsize="medium")
