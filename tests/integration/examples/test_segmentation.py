"""The example of a dense prediction: its configurations as they are, on few and small scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from com_lightning.cli import main
from examples.segmentation.data import ScenesData
from examples.segmentation.model import Segmenter

EXAMPLE = Path(__file__).parents[3] / "examples" / "segmentation"
OUTPUTS = Path("outputs/segmentation")
TASKS = {"shapes": 4, "shapes-negative": 4, "digits": 3}


def few_digits() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(20, 784)), np.arange(20) % 10 // 5


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.segmentation.data.mnist_data", few_digits)
    monkeypatch.setattr("examples.segmentation.data.SIZE", 32)


def fit(name: str, *options: str) -> None:
    sizes = ["--data.train_size=8", "--data.val_size=2", "--data.test_size=1", "--data.batch_size=4"]
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    main(["fit", f"--config={EXAMPLE / name}", *sizes, *steps, "--trainer.accelerator=cpu", *options])


def merge(name: str, tasks: list[str]) -> dict[str, Any]:
    sizes = [f"--data.tasks.{task}.{size}" for task in tasks for size in ("train_size=1", "val_size=8", "test_size=1")]
    configs = [f"--config={EXAMPLE / each}" for each in ("tasks.yaml", name)]
    main(["merge", *configs, "--data.num_samples=4", *sizes, "--trainer.accelerator=cpu", "--output_dir=merged"])
    report: dict[str, Any] = json.loads(Path("merged/report.json").read_text())
    assert list(report["metrics"]["merged"]) == tasks
    assert report["metric"] == "val_iou"
    return report


def test_two_merges(small: None) -> None:
    fit("base.yaml")
    for task, classes in TASKS.items():
        where = f"--trainer.callbacks.init_args.filename={task}"
        fit("expert.yaml", f"--data.task={task}", f"--model.num_classes={classes}", where)
    assert {path.stem for path in OUTPUTS.glob("*.ckpt")} == {"base", *TASKS}

    report = merge("merge.yaml", list(TASKS))
    private = {name for name, fate in report["parameters"].items() if fate == "private"}
    heads = ("low_classifier", "high_classifier")
    assert private == {f"net.classifier.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    fates = {fate.partition(" in part")[0] for fate in report["parameters"].values()}  # some ReLUs are dead at first
    assert fates == {"solved", "private", "re-estimated", "buffer"}
    assert {"convolution", "batch normalisation"} <= {layer["layer_type"] for layer in report["layers"]}
    assert any(layer["corrected_for"] for layer in report["layers"])
    for task, classes in TASKS.items():
        model = Segmenter.load_from_checkpoint(f"merged/{task}.ckpt").eval()
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, classes, 32, 32)
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)}
    assert names
    assert names <= {layer["name"] for layer in report["layers"]}

    Path("merged").rename("merged_before")
    report = merge("shared.yaml", ["shapes", "shapes-negative"])
    assert not any(fate == "private" for fate in report["parameters"].values())
    assert Path("merged/merged.ckpt").is_file()


def test_the_base_is_loaded_but_for_its_head(tmp_path: Path) -> None:
    base = Segmenter(2)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    own, loaded = base.state_dict(), Segmenter(4, base=str(tmp_path / "base.ckpt")).state_dict()
    other = {name for name in own if not torch.equal(own[name], loaded[name])}
    assert {name.split(".")[-2] for name in other} == {"low_classifier", "high_classifier"}


def test_tasks(small: None) -> None:
    """A negative is the same kind of scene in inverted colours; things are told from the ground alone."""
    for task, classes in {**TASKS, "things": 2}.items():
        data = ScenesData(task, 8, 2, 2)
        data.setup()
        images, masks = data.splits["train"].tensors
        assert images.shape == (8, 3, 32, 32)
        assert set(masks.flatten().tolist()) == set(range(classes))
        things = images.movedim(1, -1)[masks > 0]
        if task != "things":
            assert bool((things < -0.2).all() if "negative" in task else (things > 0.2).all())
    with pytest.raises(ValueError, match="unknown task 'shape'"):
        ScenesData("shape")
