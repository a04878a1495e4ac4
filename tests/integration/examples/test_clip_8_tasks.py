"""The example of CLIP and eight tasks, with a tiny random CLIP and tiny images in place of what the Hub has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
)

from com_lightning.cli import main
from examples.clip_8_tasks.data import TaskData, clip_transform
from examples.clip_8_tasks.model import ClipClassifier
from examples.clip_8_tasks.prompts import CLASSES, TASKS, class_numbers
from tests.helpers import NAMES_OF_5, perturb
from tests.helpers.clip import (
    FOLDER,
    QUIET,
    SIZE,
    config,
    data_options,
    make_hub,
    make_images,
    tiny_clip,
)

pytestmark = pytest.mark.skipif(not NAMES_OF_5, reason="CLIP's parts are models of their own from transformers 5 on")
COUNTS = {"sun397": 397, "stanford-cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "base")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_hub(base, tmp_path, monkeypatch)


def test_all_classes_are_there() -> None:
    assert {task: len(prompts.names) for task, prompts in CLASSES.items()} == {**COUNTS, "dtd": 47}
    for prompts in CLASSES.values():
        assert len(set(prompts.names)) == len(prompts.names)
        assert all(template.count("{}") == 1 for template in prompts.templates)
        assert all(isinstance(name, str) for name in prompts.names)


def test_classes_count_by_name_and_not_by_place() -> None:
    names = CLASSES["sun397"].names
    turned = [*names[200:], *names[:200]]
    numbers = class_numbers([f"/{name[0]}/{name.replace(' ', '_')}" for name in turned], names)
    assert [names[number] for number in numbers] == turned
    with pytest.raises(ValueError, match="45, not 44"):
        class_numbers(CLASSES["resisc45"].names[1:], CLASSES["resisc45"].names)
    with pytest.raises(ValueError, match="'forest' elsewhere"):  # CLIP's own order of EuroSAT's classes
        class_numbers(["forest", "permanent crop land", *"abcdefgh"], CLASSES["eurosat"].names)


def test_images_are_seen_as_clip_sees_them() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    theirs = CLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_transform()(image), theirs, atol=0.02, rtol=0)  # a level of 256 is 0.015


def test_logits_are_those_of_clip(base: Path, images: Path) -> None:
    """Of one prompt for each class, where CLIP itself does the same."""
    data = TaskData("mnist", folder=str(images), image_size=SIZE, num_workers=0)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == list(range(10))
    clip: Any = CLIPModel.from_pretrained(base)
    texts = [CLASSES["mnist"].templates[0].format(name) for name in CLASSES["mnist"].names]
    tokens = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
    model = ClipClassifier(str(base)).eval()
    with torch.no_grad():
        expected = clip.eval()(pixel_values=batch["pixel_values"], **tokens).logits_per_image
        torch.testing.assert_close(model(batch), expected, atol=1e-4, rtol=1e-4)
    for task, prompts in CLASSES.items():
        weight: Any = model.heads[task].weight
        lengths = weight.norm(dim=1)
        assert len(weight) == len(prompts.names)
        torch.testing.assert_close(lengths, clip.logit_scale.exp().expand_as(lengths))


def test_labels_are_those_of_the_head_and_splits_do_not_overlap(images: Path) -> None:
    data = TaskData("stanford-cars", folder=str(images), validate_on="val", image_size=SIZE, num_workers=0)
    data.setup("fit")
    test: Any = data.splits["test"]
    assert [test.images.classes.index(name) for name in sorted(test.images.classes)] == list(range(196))
    for index in (0, 1, 100):
        name = CLASSES["stanford-cars"].names[test[index]["labels"]]
        assert Path(test.images.samples[index][0]).parent.name == re.sub(r"[^\w.-]+", "_", name)
    assert [number for number in test.numbers if test.numbers.index(number) != number]  # they do differ
    train, val = (set(getattr(data.splits[split], "indices")) for split in ("train", "val"))  # noqa: B009
    assert not train & val
    assert len(train | val) == 196


def test_the_command_of_the_readme(
    hub: Path, base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    options = [config("tasks.yaml"), *data_options(images), *QUIET]
    main(["merge", *options[:1], config("vit-b-32.yaml"), *options[1:], "--data.num_samples=16", f"--output_dir={out}"])
    report = json.loads((out / "report.json").read_text())
    assert list(report["tasks"]) == list(TASKS)
    assert "| mean" in capsys.readouterr().out
    merged = ClipClassifier.load_from_checkpoint(out / "merged.ckpt", weights_only=True)  # one file, and no base needed
    made = ClipClassifier(str(base))
    for name, value in made.state_dict().items():
        if name.startswith(("projection", "heads")):
            assert torch.equal(value, merged.state_dict()[name]), name
    tower: Any = CLIPVisionModel.from_pretrained(out / "transformers")
    assert all(torch.equal(value, merged.vision.state_dict()[name]) for name, value in tower.state_dict().items())
    main(["test", *options, f"--merged={out}"])
    shown = capsys.readouterr().out
    for task in TASKS:
        assert f"{report['metrics']['merged'][task]['val_acc']:.4f}" in shown


def test_experts_that_are_the_same_give_their_own_accuracy(base: Path, images: Path, tmp_path: Path) -> None:
    tower = perturb(ClipClassifier(str(base)).vision, 0.2, seed=0)
    tower.save_pretrained(tmp_path / "tower")  # type: ignore[operator]
    model = [
        "--model=examples.clip_8_tasks.model.ClipClassifier",
        f"--model.base={base}",
        "--private=[projection,heads]",
    ]
    data = ["--data=com_lightning.MergeDataModule", "--data.split=train", "--data.num_samples=47"]
    for task in ("resisc45", "dtd"):
        own = {"task": task, "folder": images, "image_size": SIZE, "num_workers": 0}
        data += [f"--data.tasks.{task}=examples.clip_8_tasks.data.TaskData"]
        data += [f"--data.tasks.{task}.{name}={value}" for name, value in own.items()]
        data += [f"--experts.{task}={tmp_path / 'tower'}"]
    main(["merge", *model, *data, *QUIET, "--trainer.logger=false", f"--output_dir={tmp_path / 'merged'}"])
    metrics = json.loads((tmp_path / "merged" / "report.json").read_text())["metrics"]
    assert metrics["merged"] == metrics["expert"]
    merged: Any = CLIPVisionModel.from_pretrained(tmp_path / "merged" / "transformers")
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_each_size_has_its_experts_and_settings_may_be_chosen_on_train_images(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vit-b-32", "vit-b-16", "vit-l-14"):
        read = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        size = read["model"]["init_args"]["base"].removeprefix("openai/")
        assert read["experts"] == {task: f"hf://tanganke/{size}_{task}" for task in TASKS}
        assert read["output_dir"].endswith(name)
    experts = [f"--experts.{task}={tmp_path / 'tower'}" for task in TASKS]
    CLIPModel.from_pretrained(base).vision_model.save_pretrained(tmp_path / "tower")
    given = [config("tasks.yaml"), config("vit-b-32.yaml"), config("on_val.yaml"), *data_options(images), *QUIET]
    options = [*given, f"--model.base={base}", *experts, f"--output_dir={tmp_path / 'rules'}"]
    main(["compare", *options, config("rules.yaml"), "--dry_run"])
    shown = capsys.readouterr().out
    assert "To be compared:" in shown
    assert "256 samples of each task's train data" in shown
