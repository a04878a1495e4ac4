"""Experts from every kind of source, and what is said of those that cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model

from com_lightning import ChainOfMerges, MergeDataModule
from com_lightning.compat import LOADS_SAFELY
from com_lightning.core.tensors.modules import named_tensors, tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.load import ExpertSource, load_expert
from tests.helpers import Classifier, make_data, make_experts, perturb
from tests.helpers.sources import SOURCES, TASKS, TiedClassifier, as_source, merge, state_of

KEEPS_HEADS = ChainOfMerges(refit_heads=False)

# Sources


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_merge(kind: str, pair: dict[str, Classifier], tmp_path: Path) -> None:
    expected = merge(pair).modules
    model = perturb(Classifier(), 1.0, seed=9)  # its own weights must not matter
    found = merge({task: as_source(kind, e, tmp_path, task) for task, e in pair.items()}, model=model).modules
    for task, module in expected.items():
        actual = state_of(found[task])
        assert actual.keys() == state_of(module).keys()
        for name, tensor in state_of(module).items():
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(state_of(model)[name], state_of(expected["a"])[name], rtol=0, atol=0)


def test_sources_can_be_mixed_with_heads_of_different_sizes(tmp_path: Path) -> None:
    """A Lightning checkpoint rebuilds its own head, so that the model's size does not matter to it."""
    small, large = make_experts((3, 5))
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 5)}, num_samples=16)
    callback = merge({"a": small.state_dict(), "b": as_source("ckpt", large, tmp_path)}, data, method=KEEPS_HEADS)
    for task, expert in zip(TASKS, (small, large)):
        module = callback.modules[task]
        assert isinstance(module, Classifier)
        torch.testing.assert_close(module.head.weight, expert.head.weight)
    parameters = [dict(callback.modules[task].named_parameters()) for task in TASKS]
    assert parameters[0]["body.0.weight"] is parameters[1]["body.0.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_modules_in_memory_are_left_untouched(pair: dict[str, Classifier], training: bool) -> None:
    for expert in pair.values():
        expert.train(training)
        expert.get_parameter("body.0.bias").requires_grad_(False)
        expert.accuracy.update(torch.eye(3), torch.tensor([0, 1, 0]))
    states = {task: state_of(e) for task, e in pair.items()}
    tensors = {task: [id(t) for _, t, _ in named_tensors(e)] for task, e in pair.items()}
    merge(pair)
    for task, expert in pair.items():
        assert [id(t) for _, t, _ in named_tensors(expert)] == tensors[task]
        for name, tensor in state_of(expert).items():
            torch.testing.assert_close(tensor, states[task][name], rtol=0, atol=0)
        assert [n for n, p in expert.named_parameters() if not p.requires_grad] == ["body.0.bias"]
        assert all(module.training == training for module in expert.modules())
        assert expert.accuracy.compute() == pytest.approx(2 / 3)
        assert expert._trainer is None
        assert "log" not in vars(expert)


def test_the_state_dict_in_memory_is_left_untouched(pair: dict[str, Classifier]) -> None:
    sources = {task: expert.state_dict() for task, expert in pair.items()}
    before = {task: {name: t.clone() for name, t in state.items()} for task, state in sources.items()}
    modules = merge(sources).modules
    for task, state in sources.items():
        assert state.keys() == before[task].keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, before[task][name], rtol=0, atol=0)
    assert modules["a"].get_parameter("head.weight").data_ptr() != sources["a"]["head.weight"].data_ptr()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors"])
def test_files_are_memory_mapped(kind: str, pair: dict[str, Classifier], tmp_path: Path) -> None:
    path = str(as_source(kind, pair["a"], tmp_path))
    expert = load_expert("a", path, Classifier())
    assert path in Path("/proc/self/maps").read_text()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for _, parameter in expert.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_checkpoints_are_always_loaded_safely(
    kind: str, pair: dict[str, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    load = torch.load

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    path = as_source(kind, pair["a"], tmp_path)
    monkeypatch.setattr(torch, "load", recorded)
    load_expert("a", path, Classifier())
    assert calls[0] is True
    if LOADS_SAFELY:  # older Lightning makes a module from what has been read safely, in a file in memory
        assert all(weights_only is True for weights_only in calls)


def test_an_old_checkpoint_format_is_read(pair: dict[str, Classifier], tmp_path: Path) -> None:
    torch.save(pair["a"].state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    expert = load_expert("a", tmp_path / "old.pt", Classifier())
    torch.testing.assert_close(state_of(expert), state_of(pair["a"]))


@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors", "module", "state dict"])
def test_tied_parameters_stay_tied(kind: str, tmp_path: Path) -> None:
    """Also in a safetensors file, which holds them under one name."""
    expert = perturb(TiedClassifier())
    assert isinstance(expert, TiedClassifier)
    if kind == "safetensors":
        source: ExpertSource = tmp_path / "tied.safetensors"
        save_model(expert, str(source))
    else:
        source = as_source(kind, expert, tmp_path)
    loaded = load_expert("a", source, TiedClassifier())
    assert tied_names(loaded) == tied_names(expert)
    torch.testing.assert_close(state_of(loaded), state_of(expert))


def test_a_quantised_network_in_place_of_a_part_is_named_as_such() -> None:
    network = Classifier(3).body
    network[0].weight = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)  # as in 4 bit
    with pytest.raises(MergeError, match=r"its weights are quantised: 0\.weight is torch\.uint8\. Dequantise it"):
        load_expert("a", network, Classifier(3))
