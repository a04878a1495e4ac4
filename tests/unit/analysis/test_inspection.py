"""How far apart experts are: what is told, and of what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from com_lightning.analysis.inspection import Inspection, LayerDistance, draw, inspect, save
from com_lightning.cli import main
from com_lightning.errors import MergeError


def state(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"body.0.weight": scale * torch.randn(4, 3), "body.0.bias": torch.ones(4), "body.1.weight": torch.ones(5)}


def saved(path: Path, tensors: dict[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def moved(step: float, seed: int = 1) -> dict[str, Tensor]:
    """The base, and a step in a direction of its own in one matrix."""
    own = state()
    torch.manual_seed(seed)
    own["body.0.weight"] = own["body.0.weight"] + step * torch.randn(4, 3)
    return own


def test_opposite_steps_cancel_out_and_equal_ones_agree(tmp_path: Path) -> None:
    base = saved(tmp_path / "base.safetensors", state())
    ahead, back = saved(tmp_path / "a.safetensors", moved(0.1)), saved(tmp_path / "b.safetensors", moved(-0.1))
    opposite = inspect({"a": ahead, "b": back}, base).whole
    assert opposite.cosines[0][1] == pytest.approx(-1)
    assert opposite.conflict == pytest.approx(0.5)
    alike = inspect({"a": ahead, "b": ahead}, base).whole
    assert alike.cosines[0][1] == pytest.approx(1)
    assert alike.conflict == 0
    torch.manual_seed(1)
    step = 0.1 * torch.randn(4, 3)
    norm = sum(float(tensor.square().sum()) for tensor in state().values()) ** 0.5
    assert alike.distances == pytest.approx([float(step.norm()) / norm] * 2, rel=1e-4)


def test_layers_add_up_to_the_whole_and_what_was_not_trained_is_at_no_distance(tmp_path: Path) -> None:
    base = saved(tmp_path / "base.safetensors", state())
    experts = {name: saved(tmp_path / f"{name}.safetensors", moved(0.1, seed)) for seed, name in enumerate("abc", 1)}
    found = inspect(experts, base)
    assert [layer.name for layer in found.layers] == ["body.0", "body.1"]
    assert sum(layer.values for layer in found.layers) == found.whole.values == 21
    assert found.layers[1].distances == [0.0] * 3
    assert found.layers[1].conflict == 0.0
    whole = LayerDistance.of("", *_flat(experts, base))
    assert found.whole.conflict == pytest.approx(whole.conflict)
    assert torch.allclose(torch.tensor(found.whole.cosines), torch.tensor(whole.cosines), atol=1e-5)


def _flat(experts: dict[str, Path], base: Path) -> tuple[list[Tensor], Tensor]:
    from safetensors.torch import load_file

    flat = [torch.cat([t.flatten() for _, t in sorted(load_file(p).items())]) for p in (*experts.values(), base)]
    return flat[:-1], flat[-1]


@pytest.mark.parametrize(("ours", "theirs"), [("net.", ""), ("", "net."), ("model.net.", "")])
def test_the_base_may_be_a_part_of_the_experts_modules_or_hold_them(tmp_path: Path, ours: str, theirs: str) -> None:
    experts = {n: saved(tmp_path / f"{n}.safetensors", moved(0.1, s), ours) for s, n in enumerate("ab")}
    base = saved(tmp_path / "base.safetensors", state(), theirs)
    assert inspect(experts, base).whole.values == 21


def test_heads_of_other_shapes_are_named_and_left_out(tmp_path: Path) -> None:
    experts = {}
    for name, classes in (("a", 2), ("b", 3)):
        own = {**moved(0.1), "head.weight": torch.ones(classes, 4)}
        torch.save({"state_dict": own}, tmp_path / f"{name}.ckpt")
        experts[name] = tmp_path / f"{name}.ckpt"
    found = inspect(experts)
    assert found.alone == ["head.weight"]
    assert not found.from_base
    assert "head.weight" in found.to_markdown()
    assert "cosine" not in found.to_markdown()
    assert inspect(experts, private=["body.1"]).whole.values == 16


def test_all_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    good = saved(tmp_path / "a.safetensors", state())
    with pytest.raises(MergeError) as caught:
        inspect({"a": good, "b": tmp_path / "none.ckpt"}, tmp_path / "no.ckpt")
    assert len(caught.value.problems) == 2
    other = saved(tmp_path / "b.safetensors", {"else": torch.ones(2)})
    with pytest.raises(MergeError, match="no tensor in common"):
        inspect({"a": good, "b": other})
    with pytest.raises(MergeError, match=r"base: .* no tensor in common"):
        inspect({"a": good, "b": good}, other)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(MergeError, match="merge_and_unload"):
        inspect({"a": good, "b": tmp_path / "adapter"})


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path / "base.safetensors", state())
    ahead, back = saved(tmp_path / "a.safetensors", moved(0.1)), saved(tmp_path / "b.safetensors", moved(-0.1))
    main(["inspect", str(ahead), f"back={back}", "--base", str(base), "--output_dir", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "cosine to back" in told
    assert "Sign conflict: 50.0 %" in told
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert found["whole"]["cosines"]["a"]["back"] == pytest.approx(-1)
    assert set(found["layers"]) == {"body.0", "body.1"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "inspection.md",
        "inspection.json",
        "inspection.png",
    }
    with pytest.raises(SystemExit, match="no such file"):
        main(["inspect", str(ahead), str(tmp_path / "none.ckpt")])


@pytest.mark.parametrize(
    "odd", [torch.Tensor.to_sparse, lambda t: torch.nested.nested_tensor([t, t]), lambda t: t.to("meta")]
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_compared_are_told(odd: Any, tmp_path: Path) -> None:
    for name, value in {"a": torch.ones(2, 2), "b": odd(torch.ones(2, 2))}.items():
        torch.save({"weight": value}, tmp_path / f"{name}.pt")
    with pytest.raises(MergeError, match=r"weight is (sparse_coo|nested|meta); give plain tensors"):
        inspect({name: tmp_path / f"{name}.pt" for name in "ab"})


def test_the_furthest_layers_come_first_and_one_of_them_does_not_darken_the_others() -> None:
    pytest.importorskip("matplotlib")
    distances = [0.1 + 0.001 * number for number in range(40)]
    distances[7] = 50.0
    layers = [LayerDistance(f"layer{n}", [[d**2, 0.0], [0.0, d**2]], 1.0) for n, d in enumerate(distances)]
    found = Inspection(["a", "b"], layers, False, [])
    assert [layer.name for layer in found.furthest[:2]] == ["layer7", "layer39"]
    assert re.findall(r"layer\d+", found.to_markdown(2)) == ["layer7", "layer39"]
    image = draw(found).axes[0].images[0]
    assert image.get_array()[0][0] == 50.0
    assert image.norm.vmax < 0.2


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"weight": torch.ones(2, 2)}, tmp_path / f"{name}.pt")
    with pytest.raises(MergeError, match=r"output_dir: .* cannot be written to: File exists"):
        save(inspect({name: tmp_path / f"{name}.pt" for name in "ab"}), tmp_path / "a.pt")
