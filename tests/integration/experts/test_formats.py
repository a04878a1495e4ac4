"""Experts as people have them: saved from wrapped modules, as part of a module, averaged, or in half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import callbacks as lightning_callbacks
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.models import mobilenet_v3_small

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.experts.load import ExpertSource, load_expert
from com_lightning.experts.state_dicts import places, plain_state
from tests.helpers import FEATURES, Classifier, make_data, make_experts, perturb, quiet_trainer, running
from tests.helpers.networks import Net, Wrapper


class DeepNet(Net):
    """The same with another class for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))  # type: ignore[assignment]


class CompiledWrapper(Wrapper):
    """One that compiles its network itself."""

    def __init__(self, classes: int = 3, compiled: bool = True) -> None:
        super().__init__(classes, compiled)


def nets(count: int = 2, kind: Callable[[], nn.Module] = Net) -> list[Any]:
    torch.manual_seed(0)
    base = kind()
    return [perturb(copy.deepcopy(base), seed=number + 1).eval() for number in range(count)]


def wrapped(net: nn.Module) -> Wrapper:
    module = Wrapper()
    module.net = copy.deepcopy(net)
    return module.eval()


def merge(sources: dict[str, ExpertSource], model: Any, **kwargs: Any) -> ChainOfMergesCallback:
    data = MergeDataModule({task: make_data(number) for number, task in enumerate(sources)}, num_samples=16)
    callback = ChainOfMergesCallback(sources, **{"baselines": False, "private": [], **kwargs})
    quiet_trainer(callbacks=[callback]).validate(model, datamodule=data, verbose=False)
    return callback


def save_lightning(module: LightningModule, path: Path, rename: Callable[[str], str] = str) -> Path:
    content = torch.load(running.save_lightning(module, path), weights_only=True)
    content["state_dict"] = {rename(name): tensor for name, tensor in content["state_dict"].items()}
    torch.save(content, path)
    return path


def same(actual: nn.Module, expected: nn.Module) -> None:
    """The two compute the same."""
    x = torch.randn(5, FEATURES)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(actual.eval()(x), expected.eval()(x), rtol=0, atol=0)


# Names as wrappers write them


def fsdp(name: str) -> str:
    """As FSDP with activation checkpointing names what it wraps, layer by layer."""
    owner, _, own = name.rpartition(".")
    return f"_fsdp_wrapped_module.{owner}._fsdp_wrapped_module._checkpoint_wrapped_module.{own}"


NAMES = {
    "DDP": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "DDP around compiled": "module._orig_mod.{}".format,
    "compiled around DDP": "_orig_mod.module.{}".format,
    "a strategy of Lightning": "_forward_module.{}".format,
    "FSDP": fsdp,
    "FSDP in a strategy": lambda name: f"_forward_module.{fsdp(name)}",
    "compiled inside": lambda name: name.replace("net.", "net._orig_mod."),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", ["state dict", "pt", "safetensors", "ckpt"])
def test_prefixes_of_wrappers(rename: Callable[[str], str], kind: str, tmp_path: Path) -> None:
    expert = wrapped(nets()[0])
    state = {rename(name): tensor for name, tensor in expert.state_dict().items()}
    source: ExpertSource = state
    if kind == "pt":
        torch.save(state, source := tmp_path / "a.pt")
    elif kind == "safetensors":
        save_file(state, source := tmp_path / "a.safetensors")
    elif kind == "ckpt":
        source = save_lightning(copy.deepcopy(expert), tmp_path / "a.ckpt", rename)
    same(load_expert("a", source, Wrapper()), expert)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_names_are_those_that_ddp_and_fsdp_write() -> None:
    net = Net()
    inside = copy.deepcopy(net)
    shard = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    inside.body[0] = shard(inside.body[0])
    for module in (nn.parallel.DistributedDataParallel(net), shard(inside)):
        names = [name for name, _ in module.named_parameters()]
        assert not set(names) & set(net.state_dict())
        assert set(plain_state(dict.fromkeys(names))) == {name for name, _ in net.named_parameters()}
    same(load_expert("a", nn.parallel.DistributedDataParallel(net), Wrapper()), net)


def test_names_are_those_that_wrappers_write() -> None:
    """What torch itself makes of names, not what we take it for."""
    net = Net()
    net.body[3] = checkpoint_wrapper(net.body[3])
    compiled: Any = torch.compile(net)
    for module in (compiled, nn.DataParallel(net), AveragedModel(net), nn.DataParallel(compiled)):
        assert set(plain_state(module.state_dict())) == set(Net().state_dict())


def test_a_module_of_that_name_is_no_wrapper() -> None:
    """A user's own attribute may be called `module`."""

    class Owner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = Net(), nn.Linear(3, 3)

    expert = Owner()
    loaded = load_expert("a", expert.state_dict(), Owner())
    torch.testing.assert_close(loaded.state_dict(), expert.state_dict())
    with pytest.warns(UserWarning, match=r"is taken for module; head.weight, head.bias stay as they are"):
        loaded = load_expert("a", {f"module.{n}": t for n, t in expert.module.state_dict().items()}, Owner())
    torch.testing.assert_close(loaded.get_submodule("module").state_dict(), expert.module.state_dict())


def test_quantised_weights_are_told_of() -> None:
    state = {**Classifier().state_dict(), "head.weight": torch.zeros(3, 8, dtype=torch.int8)}
    with pytest.raises(MergeError, match=r"head.weight is int8, in the model floating point; give the weights before"):
        load_expert("a", state, Classifier())


def test_the_checkpoint_of_another_class_is_still_refused(tmp_path: Path) -> None:
    path = save_lightning(Classifier(), tmp_path / "a.ckpt")
    with pytest.raises(MergeError, match="Wrapper cannot be rebuilt from its hyperparameters"):
        load_expert("a", path, Wrapper())


# Parts of a module


@pytest.mark.parametrize("kind", ["state dict", "pt", "module", "DDP", "compiled", "averaged"])
def test_a_network_of_the_module(kind: str, tmp_path: Path) -> None:
    """A state dict or a module of a library, for `model.net`."""
    net = nets()[0]
    source: Any = net
    if kind == "state dict":
        source = net.state_dict()
    elif kind == "pt":
        torch.save(net.state_dict(), source := tmp_path / "net.pt")
    elif kind in ("DDP", "compiled", "averaged"):
        wrappers: dict[str, Any] = {"DDP": nn.DataParallel, "compiled": torch.compile, "averaged": AveragedModel}
        source = wrappers[kind](net)
    before = copy.deepcopy(net.state_dict())
    model = Wrapper()
    own = copy.deepcopy(model.state_dict())
    expert = load_expert("a", source, model)
    same(expert, net)
    perturb(expert)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)


def test_a_state_dict_of_torchvision(tmp_path: Path) -> None:
    """As people download it, for `self.net` of their module."""

    class Vision(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = mobilenet_v3_small(num_classes=4), nn.CrossEntropyLoss(torch.ones(4))

    net = mobilenet_v3_small(num_classes=4)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    expert = load_expert("a", tmp_path / "net.pth", Vision())
    torch.testing.assert_close(expert.get_submodule("net").state_dict(), net.state_dict(), rtol=0, atol=0)


def test_networks_are_merged_as_modules_are() -> None:
    a, b = nets()
    expected = merge({"a": wrapped(a), "b": wrapped(b)}, Wrapper()).modules
    found = merge({"a": a, "b": b.state_dict()}, Wrapper()).modules
    for task in "ab":
        torch.testing.assert_close(found[task].state_dict(), expected[task].state_dict(), rtol=0, atol=0)


def test_a_network_with_another_class_for_its_head() -> None:
    """Its head is private, and stays as it is."""
    (plain,), (deep,) = nets(1), nets(1, DeepNet)
    deep.body.load_state_dict(perturb(copy.deepcopy(plain.body)).state_dict())
    callback = merge({"a": plain, "b": deep}, Wrapper(), private=None, method=ChainOfMerges(refit_heads=False))
    account = callback.report.parameters
    assert {name for name, what in account.items() if what.status == "private"} == {
        f"net.head.{own}" for own in ("weight", "bias", "0.weight", "0.bias", "2.weight", "2.bias")
    }
    merged = callback.modules["b"].get_submodule("net")
    assert isinstance(merged, DeepNet)
    torch.testing.assert_close(merged.head.state_dict(), deep.head.state_dict(), rtol=0, atol=0)
    assert account["net.body.0.weight"].status == "solved"


class Twins(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()


class Aliased(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.net.body


class Tied(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 8)
        self.other.weight = self.net.body[3].weight


@pytest.mark.parametrize("source", [Net(), Net().state_dict()], ids=["module", "state dict"])
def test_two_parts_that_fit(source: Any) -> None:
    with pytest.raises(MergeError, match="net, teacher of Twins equally well"):
        load_expert("a", source, Twins())


@pytest.mark.parametrize("kind", [Aliased, Tied])
def test_a_part_that_is_used_elsewhere(kind: Any) -> None:
    """It would be replaced in one place only."""
    with pytest.raises(MergeError, match=rf"{kind.__name__} uses net also as other.*Give a LightningModule"):
        load_expert("a", Net(), kind())


def test_a_module_that_fits_nowhere() -> None:
    with pytest.raises(MergeError, match="the Linear has little in common with any part of Wrapper"):
        load_expert("a", nn.Linear(2, 2), Wrapper())


def test_places_by_names_then_shapes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2), "c": nn.LayerNorm(3)})
    assert places(model, nn.Linear(3, 2).state_dict()) == ["b"]
    assert places(model, nn.Linear(9, 9).state_dict()) == []
    assert places(nn.Sequential(*[nn.Linear(2, 2)] * 2), nn.Linear(2, 2).state_dict()) == ["0", "1"]
    assert places(model, model.state_dict()) == [""]
    assert places(model, {"x": torch.zeros(1)}) == []


# Compiled modules


def compiled_inside() -> Wrapper:
    return Wrapper(compiled=True)


def compiled_outside() -> Any:
    return torch.compile(Wrapper())


def compiled_in_place() -> Wrapper:
    model = Wrapper()
    model.net.compile()
    return model


@pytest.mark.parametrize("make", [compiled_inside, compiled_outside, compiled_in_place, CompiledWrapper])
def test_compiled_models_are_merged_as_others_are(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled, the model or an expert; and every layer is reached in calibration."""
    a, b = (wrapped(net) for net in nets())
    expected = merge({"a": a, "b": b}, Wrapper())
    compiled = copy.deepcopy(a)
    compiled.net = torch.compile(compiled.net)
    sources: list[Any] = [{"a": a, "b": b.state_dict()}, {"a": compiled, "b": torch.compile(copy.deepcopy(b))}]
    for experts in sources:
        model = make()
        with torch.compiler.set_stance("force_eager"):  # compiling for validation takes long, and is not ours
            found = merge(experts, model)
        for task in "ab":
            state = plain_state(found.modules[task].state_dict())
            torch.testing.assert_close(state, expected.modules[task].state_dict(), rtol=0, atol=0)
        assert sum(what.status == "solved" for what in found.report.parameters.values()) == 8
        torch.testing.assert_close(plain_state(model.state_dict()), expected.modules["a"].state_dict())


def test_compiled_experts_come_from_checkpoints(tmp_path: Path) -> None:
    """Of a class that compiles its network, with and without its prefix; what is written is loaded by the class."""
    experts = [CompiledWrapper(), CompiledWrapper()]
    for expert, net in zip(experts, nets()):
        expert.net._orig_mod.load_state_dict(net.state_dict())
    a = save_lightning(experts[0], tmp_path / "a.ckpt")
    b = save_lightning(experts[1], tmp_path / "b.ckpt", lambda name: name.replace("_orig_mod.", ""))
    with torch.compiler.set_stance("force_eager"):
        callback = merge({"a": a, "b": b}, CompiledWrapper(), output_dir=str(tmp_path / "out"))
    again = CompiledWrapper.load_from_checkpoint(tmp_path / "out" / "merged.ckpt", weights_only=True)
    same(again, callback.modules["b"])


def test_calibration_of_a_compiled_module_is_eager() -> None:
    """Without the stance a compiled forward would run through the layers, or be compiled again and again."""
    torch.compiler.reset()  # after many compilations of one code object, PyTorch compiles it no more
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    expert = wrapped(nets()[0])
    expert.net = torch.compile(expert.net, backend=backend)
    expert.net(torch.zeros(1, FEATURES))
    assert compiled
    compiled.clear()
    seen = []

    class Counted(ChainOfMergesCallback):
        def on_validation_start(self, *args: Any) -> None:
            super().on_validation_start(*args)
            seen.append(len(compiled))

    data = MergeDataModule({"a": make_data(0)}, num_samples=16)
    callback = Counted({"a": expert}, baselines=False, private=[])
    quiet_trainer(callbacks=[callback]).validate(expert, datamodule=data, verbose=False)
    assert seen == [0]
    assert compiled  # and the validation runs as the user has it


# Averaged weights


@pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="Lightning 2.6 has it")
@pytest.mark.parametrize(("name", "settings"), [("EMAWeightAveraging", {"decay": 0.9}), ("WeightAveraging", {})])
def test_averaged_weights_are_the_expert(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Of a fit with Lightning's callback, which puts them in place of the trained ones."""
    torch.manual_seed(0)
    callback = getattr(lightning_callbacks, name)(**settings)
    model = Classifier()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0)
    saved = tmp_path / "a.ckpt"

    callback.on_train_epoch_end = lambda trainer, module: trainer.save_checkpoint(saved)  # while it averages
    trainer.fit(model, make_data().train_dataloader())
    content = torch.load(saved, weights_only=True)
    trained, averaged = (content[key]["body.0.weight"] for key in ("current_model_state", "state_dict"))
    assert not torch.equal(trained, averaged)
    expert = load_expert("a", saved, Classifier())
    torch.testing.assert_close(expert.get_parameter("body.0.weight").data, averaged, rtol=0, atol=0)


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["state dict", "pt", "safetensors", "ckpt", "module", "net"])
def test_half_precision_becomes_the_models(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    net = nets()[0].to(dtype)
    expert = wrapped(net)
    state = expert.state_dict()
    source: Any = {"module": expert, "net": net}.get(kind, state)
    if kind == "pt":
        torch.save(state, source := tmp_path / "a.pt")
    elif kind == "safetensors":
        save_file(state, source := tmp_path / "a.safetensors")
    elif kind == "ckpt":
        source = save_lightning(copy.deepcopy(expert), tmp_path / "a.ckpt")
    loaded = load_expert("a", source, Wrapper())
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {torch.float32}
    same(loaded, wrapped(net).float())
    assert {p.dtype for p in expert.parameters()} == {dtype}  # the user's is left as it is


def test_experts_of_different_precision_are_merged(tmp_path: Path) -> None:
    a, b = make_experts((3, 3))
    fit = quiet_trainer(precision="bf16-true", max_steps=1, limit_val_batches=0)
    fit.fit(a, make_data().train_dataloader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["head.bias"].dtype == torch.bfloat16
    callback = merge({"a": tmp_path / "a.ckpt", "b": b}, Classifier())
    assert {p.dtype for m in callback.modules.values() for p in m.parameters()} == {torch.float32}


# Sharded checkpoints
