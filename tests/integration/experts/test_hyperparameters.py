"""Hyperparameters in a checkpoint are data: no file makes anything run, and those of LightningCLI are still read."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from com_lightning import TIES, Average, ChainOfMergesCallback, MergeError
from com_lightning.cli import main
from com_lightning.experts.hyperparameters import INSTANTIATOR
from com_lightning.experts.load import load_expert
from com_lightning.results.folder import load_results


class Encoder(nn.Module):
    def __init__(self, width: int = 4, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(3, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


class Model(L.LightningModule):
    def __init__(
        self,
        net: nn.Module,
        name: str = "a",
        more: list[nn.Module] | None = None,
        loss: Callable[[Tensor], Tensor] | None = None,
        anything: Any = None,
    ) -> None:
        super().__init__()
        self.net, self.more = net, nn.ModuleList(more or [])


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a file behind where it is imported, and functions that do where they are called."""
    marker = tmp_path / "ran"
    (tmp_path / "evil_package.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(marker)!r}).touch()\n"
        "class Boom(nn.Module):\n    pass\ndef run(*args, **kwargs):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield marker
    sys.modules.pop("evil_package", None)


HERE = Encoder.__module__
NET = {"class_path": f"{HERE}.Encoder", "init_args": {"width": 4}}
BOOM = {"class_path": "evil_package.Boom"}
PAYLOADS: dict[str, dict[str, Any]] = {
    "a class": {"net": {"class_path": "evil_package.Boom"}},
    "a function as class": {"net": {"class_path": "evil_package.run", "init_args": {"a": 1}}},
    "a function of the standard library": {"net": {"class_path": "os.system", "init_args": {"command": "true"}}},
    "an imported class that is no module": {"net": {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}},
    "within init_args": {
        "net": {"class_path": "torch.nn.Sequential", "init_args": {"a": {"class_path": "evil_package.Boom"}}}
    },
    "within dict_kwargs": {
        "net": {"class_path": "torch.nn.Linear", "dict_kwargs": {"a": {"class_path": "evil_package.run"}}}
    },
    "in a list": {"net": NET, "more": [{"class_path": "evil_package.Boom"}]},
    "as a text": {"net": "evil_package.Boom"},
    "as YAML in a text where anything may stand": {"net": NET, "anything": "{class_path: evil_package.Boom}"},
    "as YAML with an escaped key": {"net": NET, "anything": '{"class\\x5fpath": evil_package.run}'},
    "as YAML in a list": {"net": NET, "more": ["{class_path: evil_package.Boom}"]},
    "as YAML in a text": {"net": "{class_path: evil_package.Boom}"},
    "a function": {"net": NET, "loss": "evil_package.run"},
    "a function in quotes": {"net": NET, "loss": "'evil_package.run'"},
    "a function of a nested class": {"net": {**NET, "init_args": {"activation": "evil_package.run"}}},
    "a function of a nested class, built in": {"net": {**NET, "init_args": {"activation": "os.system"}}},
    "where anything may stand": {"net": NET, "anything": {"class_path": "evil_package.run"}},
    "another model": {"net": NET, "_class_path": "evil_package.Boom"},
    "another instantiator": {"net": NET, "_instantiator": "evil_package.run"},
}


def save(folder: Path, values: dict[str, Any], key: str = "hyper_parameters") -> Path:
    model = Model(Encoder())
    content = {
        "state_dict": model.state_dict(),
        "pytorch-lightning_version": L.__version__,
        key: {"_instantiator": INSTANTIATOR, **values},
    }
    torch.save(content, folder / "expert.ckpt")
    return folder / "expert.ckpt"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_hyperparameters_is_imported_or_called(payload: str, evil: Path, tmp_path: Path) -> None:
    path = save(tmp_path, PAYLOADS[payload])
    with pytest.raises(MergeError, match="hyper_parameters name ") as raised:
        load_expert("a", path, Model(Encoder()))
    assert str(path) in str(raised.value)
    assert not evil.exists()
    assert "evil_package" not in sys.modules


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_older_keys_are_looked_at_too(key: str, evil: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=f"{key} name 'evil_package.Boom' at net.class_path"):
        load_expert("a", save(tmp_path, PAYLOADS["a class"], key), Model(Encoder()))
    assert not evil.exists()


def test_a_base_a_plan_and_a_result_are_files_too(evil: Path, tmp_path: Path) -> None:
    path, model = save(tmp_path, PAYLOADS["a class"]), Model(Encoder())
    good = {"a": copy.deepcopy(model), "b": copy.deepcopy(model)}
    for merger in (
        ChainOfMergesCallback({"a": model, "b": path}, Average()),
        ChainOfMergesCallback(good, TIES(), base=path),
    ):
        with pytest.raises(MergeError, match="evil_package"):
            merger.merge(model)
    (tmp_path / "merged").mkdir()
    path.rename(tmp_path / "merged" / "a.ckpt")
    with pytest.raises(MergeError, match="evil_package"):
        load_results(tmp_path / "merged", model, ["a"])
    assert not evil.exists()


GOOD: dict[str, dict[str, Any]] = {
    "a class inside the model": {"net": NET},
    "a class of torch.nn": {
        "net": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 4}}
    },
    "a class of the model's package": {"net": {"class_path": f"{HERE}.Encoder"}},
    "a function of torch.nn": {"net": {**NET, "init_args": {"activation": "torch.nn.functional.gelu"}}},
    "a text that looks like a name": {"net": NET, "name": "os.path"},
}


@pytest.mark.parametrize("case", GOOD)
def test_the_users_own_names_are_read_as_before(case: str, tmp_path: Path) -> None:
    model = Model(Encoder())
    if case == "a class of torch.nn":
        model = Model(nn.Linear(3, 4))
    content = {
        "state_dict": model.state_dict(),
        "pytorch-lightning_version": L.__version__,
        "hyper_parameters": {"_instantiator": INSTANTIATOR, **GOOD[case]},
    }
    torch.save(content, tmp_path / "expert.ckpt")
    expert = load_expert("a", tmp_path / "expert.ckpt", model)
    assert type(expert.net) is type(model.net)
    assert dict(expert.hparams) == content["hyper_parameters"]  # plain values, as they were


PROJECT = """
    import torch, lightning as L
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    class Encoder(nn.Module):
        def __init__(self, width: int = 16):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        def forward(self, x):
            return self.layers(x)
    class Model(L.LightningModule):
        def __init__(self, net: nn.Module, rate: float = 1e-2):
            super().__init__()
            self.save_hyperparameters()
            self.net, self.rate = net, rate
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        def validation_step(self, batch, index):
            self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.rate)
    class Data(L.LightningDataModule):
        def __init__(self, seed: int = 0):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(64, 8, generator=generator)
            self.data = TensorDataset(x, (x @ torch.randn(8, 4, generator=generator)).argmax(1))
        def train_dataloader(self):
            return DataLoader(self.data, 16)
        val_dataloader = train_dataloader
"""
MODEL = "model: {class_path: nested_project.Model, init_args: {net: {class_path: nested_project.Encoder}}}\n"
TRAINER = """trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false,
  max_epochs: 1}\n"""


def test_a_project_with_a_nested_network_is_merged_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nested_project.py").write_text(textwrap.dedent(PROJECT))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(MODEL + TRAINER + "data: {class_path: nested_project.Data}\n")
    Path("tasks.yaml").write_text(
        MODEL + TRAINER + "data: {class_path: com_lightning.MergeDataModule, init_args: {tasks: {a: {class_path: "
        "nested_project.Data}, b: {class_path: nested_project.Data, init_args: {seed: 1}}}}}\n"
    )
    for name, seed in (("a", 0), ("b", 1)):
        saving = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=."]
        saving.append(f"--trainer.callbacks.filename={name}")
        main(["fit", "--config", "fit.yaml", f"--data.init_args.seed={seed}", *saving])
    experts = ["--experts.a", "a.ckpt", "--experts.b", "b.ckpt", "--private", "[]"]
    main(["merge", "--config", "tasks.yaml", *experts, "--output_dir", "merged"])
    assert [path.name for path in Path("merged").glob("*.ckpt")] == ["merged.ckpt"]  # tasks differ in nothing
    main(["validate", "--config", "tasks.yaml", "--merged", "merged"])
    content = torch.load("merged/merged.ckpt", weights_only=True)
    assert content["hyper_parameters"]["net"]["class_path"] == "nested_project.Encoder"
    again = sys.modules["nested_project"].Model.load_from_checkpoint("merged/merged.ckpt", weights_only=True)
    assert torch.equal(again.net.layers[0].weight, content["state_dict"]["net.layers.0.weight"])
