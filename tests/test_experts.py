"""Experts from every kind of source, and what is said of those that cannot be merged."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeError, TaskLoaders
from com_lightning.core.sharing import named_tensors, tied_names
from com_lightning.experts import ExpertSource, load_expert, read_checkpoint, sort_parameters
from com_lightning.versions import LOADS_SAFELY
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer

TASKS = ("a", "b")
SOURCES = ["ckpt", "pt", "safetensors", "module", "state dict"]


class Unread(Dataset[Any]):
    """Data that must not be read."""

    def __init__(self, count: int = 20) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("data were read before all problems were known")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


class NeedsWidth(Classifier):
    """Its checkpoints lack an argument that it needs."""

    def __init__(self, width: int) -> None:
        super().__init__(3, width)


class TiedClassifier(Classifier):
    """The head is the last layer of the body."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__(8)
        self.save_hyperparameters()
        if tied:
            self.head.weight = self.body.get_submodule("3").weight  # type: ignore[assignment]


def unread_data(count: int = 20) -> TaskLoaders:
    return TaskLoaders(val=DataLoader(Unread(count), batch_size=4))


def save_lightning(module: LightningModule, path: Path) -> Path:
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def as_source(kind: str, expert: Classifier, folder: Path, name: str = "expert") -> ExpertSource:
    """An expert in one of the forms that experts come in."""
    if kind == "ckpt":
        return save_lightning(expert, folder / f"{name}.ckpt")
    if kind == "pt":
        torch.save(expert.state_dict(), folder / f"{name}.pt")
        return folder / f"{name}.pt"
    if kind == "safetensors":
        save_file(expert.state_dict(), folder / f"{name}.safetensors")
        return str(folder / f"{name}.safetensors")
    return expert if kind == "module" else expert.state_dict()


def merge(
    sources: Mapping[str, ExpertSource], data: MergeDataModule | None = None, model: Any = None, **kwargs: Any
) -> ChainOfMergesCallback:
    """Merge through ``trainer.validate``."""
    data = data or MergeDataModule({task: make_data(number) for number, task in enumerate(sources)}, samples=16)
    callback = ChainOfMergesCallback(dict(sources), baselines=False, **kwargs)
    quiet_trainer(callbacks=[callback]).validate(model or Classifier(), datamodule=data, verbose=False)
    return callback


def problems(
    sources: Mapping[str, Any], data: Mapping[str, Any] | None = None, model: Any = None, **kwargs: Any
) -> list[str]:
    """What a merge that must fail says, without reading data."""
    tasks = MergeDataModule(dict(data or {task: unread_data() for task in TASKS}), samples=4)
    with pytest.raises(MergeError) as caught:
        merge(sources, tasks, model, **kwargs)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor, _ in named_tensors(module)}


@pytest.fixture
def pair() -> dict[str, Classifier]:
    """Two experts of one architecture."""
    return dict(zip(TASKS, make_experts((3, 3))))


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
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 5)}, samples=16)
    callback = merge({"a": small.state_dict(), "b": as_source("ckpt", large, tmp_path)}, data)
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


# Safe loading


def malicious(expert: Classifier, path: Path, folder: Path, write: Callable[[Any, Path], None]) -> Path:
    """A Lightning checkpoint with a payload among its hyperparameters."""
    content = torch.load(save_lightning(expert, path), weights_only=True)
    content["hyper_parameters"]["optimizer"] = {"betas": [0.9, Payload(folder)]}
    write(content, path)
    return path


def write_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


tells_keys = pytest.mark.skipif(
    not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="PyTorch 2.5 tells what it refuses"
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("write", "told"),
    [
        pytest.param(
            torch.save,
            ["hyper_parameters.optimizer.betas[1]", "mkdir", "plain values", "pass it in place of the path"],
            marks=tells_keys,
        ),
        (write_old, ["mkdir", "plain values"]),
        (write_pickle, ["safe loading refuses"]),
    ],
)
def test_a_payload_is_never_run(
    write: Callable[[Any, Path], None], told: list[str], pair: dict[str, Classifier], tmp_path: Path
) -> None:
    folder = tmp_path / "payload"
    path = malicious(pair["a"], tmp_path / "expert.ckpt", folder, write)
    problem = only(problems({"a": path, "b": pair["b"]}))
    assert not folder.exists()
    assert problem.startswith(f"expert 'a' ({path}): ")
    assert all(part in problem for part in told), problem
    if write is torch.save:  # the payload is a live one
        torch.load(path, weights_only=False)
        assert folder.exists()


@tells_keys
def test_all_refused_objects_of_a_file_are_named(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "expert.ckpt"), weights_only=True)
    content["hyper_parameters"].update(data=Path("x"), activation=nn.ReLU())
    content["extra"] = [Payload(tmp_path / "payload")]
    torch.save(content, tmp_path / "expert.ckpt")
    problem = only(problems({"a": tmp_path / "expert.ckpt", "b": pair["b"]}))
    for key in ("hyper_parameters.data (pathlib", "hyper_parameters.activation (torch.nn", "extra[0] ("):
        assert key in problem
    assert "classes" not in problem
    assert not (tmp_path / "payload").exists()


def test_a_class_that_the_user_allows_is_read(pair: dict[str, Classifier], tmp_path: Path) -> None:
    """What the message advises works."""
    pytest.importorskip("torch", minversion="2.5")  # for safe_globals
    content = torch.load(save_lightning(pair["a"], tmp_path / "expert.ckpt"), weights_only=True)
    content["hyper_parameters"]["unused"] = type(Path())("x")
    torch.save(content, tmp_path / "expert.ckpt")
    with torch.serialization.safe_globals([type(Path())]):
        expert = load_expert("a", tmp_path / "expert.ckpt", Classifier())
    torch.testing.assert_close(state_of(expert), state_of(pair["a"]))


# Bad files


def random_bytes(expert: Classifier, folder: Path) -> Path:
    path = folder / "random.ckpt"
    path.write_bytes(bytes(torch.randint(256, (500,), generator=torch.Generator().manual_seed(0)).tolist()))
    return path


def pointer(expert: Classifier, folder: Path) -> Path:
    path = folder / "pointer.ckpt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return path


def empty(expert: Classifier, folder: Path) -> Path:
    (folder / "empty.ckpt").touch()
    return folder / "empty.ckpt"


def truncated(expert: Classifier, folder: Path, kind: str = "ckpt") -> Path:
    path = Path(str(as_source(kind, expert, folder)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_safetensors(expert: Classifier, folder: Path) -> Path:
    return truncated(expert, folder, "safetensors")


def missing(expert: Classifier, folder: Path) -> Path:
    return folder / "missing.ckpt"


def a_folder(expert: Classifier, folder: Path) -> Path:
    return folder


def a_list(expert: Classifier, folder: Path) -> Path:
    torch.save([1, 2], folder / "list.pt")
    return folder / "list.pt"


def no_state(expert: Classifier, folder: Path) -> Path:
    torch.save({"state_dict": "none"}, folder / "none.pt")
    return folder / "none.pt"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (missing, "no such file"),
        (a_folder, "a folder that holds no expert"),
        (random_bytes, "not a readable checkpoint"),
        (pointer, "not a readable checkpoint"),
        (empty, "not a readable checkpoint"),
        (truncated, "not a readable checkpoint"),
        (truncated_safetensors, "not a readable safetensors file"),
        (a_list, "holds a list, not a checkpoint or state dict"),
        (no_state, "holds a str, not a checkpoint or state dict"),
    ],
)
def test_a_file_that_cannot_be_read(
    make: Callable[[Classifier, Path], Path], told: str, pair: dict[str, Classifier], tmp_path: Path
) -> None:
    path = make(pair["a"], tmp_path)
    problem = only(problems({"a": path, "b": pair["b"]}))
    assert problem.startswith(f"expert 'a' ({path}): {told}"), problem
    assert "weights_only" not in problem  # PyTorch advises to load the file unsafely
    assert "\n" not in problem


def test_reading_a_checkpoint_directly_raises_too(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state dict"])
def test_keys_that_do_not_match(kind: str, pair: dict[str, Classifier], tmp_path: Path) -> None:
    """Missing and extra keys and shapes, all three at once, with the name of the expert."""
    expert = copy.deepcopy(pair["a"])
    expert.register_buffer("extra", torch.zeros(2))
    expert.head = nn.Linear(8, 7, bias=False)
    source = as_source(kind, expert, tmp_path)
    found = problems({"a": source, "b": pair["b"]})
    assert all(p.startswith("expert 'a'") for p in found), found
    assert all(str(source) in p for p in found if kind != "state dict")
    gone, extra, shape = found
    assert "missing keys: head.bias" in gone
    assert "does not have: extra" in extra
    assert "Classifier" in extra
    assert "head.weight is (7, 8), in the model (3, 8); give a Lightning checkpoint" in shape


def test_many_keys_are_summarised(pair: dict[str, Classifier]) -> None:
    gone, extra = problems({"a": {f"x.{n}": torch.zeros(1) for n in range(9)}, "b": pair["b"]})
    assert "and 3 more" in gone
    assert "x.4 and 4 more" in extra


def test_a_value_that_is_no_tensor(pair: dict[str, Classifier]) -> None:
    problem = only(problems({"a": {**pair["a"].state_dict(), "head.bias": 3}, "b": pair["b"]}))
    assert "head.bias is int, in the model (3,)" in problem


@pytest.mark.parametrize("source", [None, 3])
def test_a_source_that_is_none(source: Any, pair: dict[str, Classifier]) -> None:
    assert "neither a file, a folder, a module nor a state dict" in only(problems({"a": source, "b": pair["b"]}))


def test_hyperparameters_that_cannot_rebuild_the_class(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "a.ckpt"), weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "a.ckpt")
    problem = only(problems({"a": tmp_path / "a.ckpt", "b": NeedsWidth(8)}, model=NeedsWidth(8)))
    assert f"expert 'a' ({tmp_path / 'a.ckpt'}): NeedsWidth cannot be rebuilt from its hyperparameters" in problem
    assert "width" in problem


def test_hyperparameters_of_other_shapes_than_the_weights(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "a.ckpt"), weights_only=True)
    content["hyper_parameters"]["classes"] = 5
    torch.save(content, tmp_path / "a.ckpt")
    problem = only(problems({"a": tmp_path / "a.ckpt", "b": pair["b"]}))
    assert "cannot be rebuilt" in problem
    assert "head.weight" in problem
    assert "\n" not in problem


# Settings that do not fit


@pytest.mark.parametrize(
    ("experts", "tasks", "told"),
    [
        (("a", "b", "c"), ("a", "b"), "experts: no data for c; data.tasks has a, b"),
        (("a", "b"), ("a", "b", "c"), "data.tasks: no expert for c; experts has a, b"),
        (("a", "../x"), ("a", "../x"), "experts: '../x' cannot name a file"),
        (("a", "x/y"), ("a", "x/y"), "experts: 'x/y' cannot name a file"),
        (("a", ".."), ("a", ".."), "experts: '..' cannot name a file"),
        (("a", ""), ("a", ""), "experts: '' cannot name a file"),
        (("a", "x\\y"), ("a", "x\\y"), "experts: 'x\\y' cannot name a file"),
    ],
)
def test_task_names(experts: tuple[str, ...], tasks: tuple[str, ...], told: str) -> None:
    sources = dict(zip(experts, make_experts([3] * len(experts))))
    assert only(problems(sources, {task: unread_data() for task in tasks})).startswith(told)


def test_no_experts() -> None:
    assert any("; experts has none" in p for p in problems({}))


@pytest.mark.parametrize(
    ("importance", "told"),
    [
        ({"a": 1.0}, "importance: no weight for b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "importance: c is no task"),
        ({"a": -1.0, "b": 2.0}, "importance: weights must be finite, not negative"),
        ({"a": float("nan"), "b": 1.0}, "importance: weights must be finite"),
        ({"a": 0.0, "b": 0.0}, "importance: weights must be finite, not negative, and not all 0"),
    ],
)
def test_bad_importance(importance: dict[str, float], told: str, pair: dict[str, Classifier]) -> None:
    assert only(problems(pair, method=ChainOfMerges(importance=importance))).startswith(told)


def test_an_empty_loader(pair: dict[str, Classifier]) -> None:
    assert only(problems(pair, {"a": unread_data(), "b": unread_data(0)})) == "task 'b': its val loader is empty"


def test_a_pattern_that_matches_nothing(pair: dict[str, Classifier]) -> None:
    problem = only(problems(pair, private=["head", "haed"]))
    assert "'haed' matches no parameter" in problem
    assert "body.0.weight" in problem


def test_a_shared_shape_that_differs() -> None:
    """With explicit patterns nothing else may differ; both shapes are shown."""
    found = problems(dict(zip(TASKS, make_experts((3, 5)))), private=["head.bias"])
    assert "head.weight: model (3, 8); a (3, 8); b (5, 8)" in only(found)


def test_a_shared_parameter_that_one_lacks(pair: dict[str, Classifier]) -> None:
    pair["b"].head = nn.Linear(8, 3, bias=False)
    assert "head.bias: model (3,); a (3,); b lacks it" in only(problems(pair, private=["body.1"]))


def test_nothing_in_common() -> None:
    experts = {"a": Classifier(3, 8), "b": Classifier(4, 9)}
    assert "no layer can be merged" in only(problems(experts))


def test_tied_in_one_only() -> None:
    tied, untied = TiedClassifier(), TiedClassifier(tied=False)
    untied.body.load_state_dict(tied.body.state_dict())
    problem = only(problems({"a": tied, "b": untied}, model=TiedClassifier()))
    assert "head.weight is tied to another parameter in 'a' or 'b', not in both" in problem


def test_an_existing_output_folder(pair: dict[str, Classifier], tmp_path: Path) -> None:
    problem = only(problems(pair, output_dir=str(tmp_path)))
    assert problem.startswith(f"output_dir: {tmp_path} exists already")
    assert "overwrite" in problem


def test_a_model_that_does_not_fit_the_first_task() -> None:
    """Only the first: the model becomes that task's merged model."""
    sources = dict(zip(TASKS, make_experts((3, 5))))
    problem = only(problems(sources, model=Classifier(5)))
    assert "task 'a'" in problem
    assert "head.weight is (5, 8), in its expert (3, 8)" in problem
    merge(sources, MergeDataModule({"a": make_data(0), "b": make_data(1, 5)}, samples=8), Classifier(3))


def test_all_problems_are_told_at_once(pair: dict[str, Classifier], tmp_path: Path) -> None:
    found = problems(
        {"a": tmp_path / "none.ckpt", "b": {"x": torch.zeros(1)}, "c": pair["a"], "x/y": pair["b"]},
        {"a": unread_data(), "b": unread_data(0), "c": unread_data(), "x/y": unread_data(), "d": unread_data()},
        method=ChainOfMerges(importance={"a": 1.0}, ridge=-1.0),
        private=["nothing"],
        output_dir=str(tmp_path),
    )
    expected = [
        "output_dir:",
        "data.tasks: no expert for d",
        "experts: 'x/y' cannot name",
        "importance: no weight for b",
        "ridge:",
        "task 'b': its val loader is empty",
        "none.ckpt): no such file",
        "expert 'b': missing keys",
        "expert 'b': keys that",
        "private: 'nothing' matches no parameter",
    ]
    assert len(found) == len(expected), found
    for told in expected:
        assert any(told in problem for problem in found), told
    assert str(MergeError(found)).startswith("10 problems:\n  1. ")


# Shared and private


def test_heads_of_different_sizes_are_private() -> None:
    small, large = make_experts((3, 4))
    parameters = sort_parameters(Classifier(3), {"a": small, "b": large}, None)
    heads = ["head.weight", "head.bias"]
    assert parameters.private == {"a": heads, "b": heads}
    assert parameters.shared == [name for name, _, _ in named_tensors(small) if name not in heads]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], {"head.weight", "head.bias"}),
        (["body.[13].*", "head.*"], {f"{m}.{p}" for m in ("head", "body.1", "body.3") for p in ("weight", "bias")}),
        ([], set()),
    ],
)
def test_explicit_patterns(patterns: list[str], expected: set[str], pair: dict[str, Classifier]) -> None:
    callback = merge(pair, private=patterns)
    account = callback.report.parameters
    assert {name for name, what in account.items() if what == "private"} == expected
    for task, expert in pair.items():
        for name, tensor in state_of(callback.modules[task]).items():
            assert torch.equal(tensor, state_of(expert)[name]) == (name in expected), name


def test_unrelated_experts_are_warned_of() -> None:
    torch.manual_seed(0)
    experts = {"a": Classifier(), "b": Classifier()}
    with pytest.warns(UserWarning, match="the two experts 'a', 'b' seem not to share a base"):
        callback = merge(experts, private=[])
    [warning] = callback.report.warnings
    assert "cosine" in warning  # says how it is judged
    assert "Warning" in str(callback.report)


def test_heads_of_equal_shape_are_asked_about() -> None:
    experts = dict(zip(TASKS, make_experts((3, 3))))
    assert "heads included" in " ".join(sort_parameters(Classifier(), experts, None).warnings)
    for private in ([], ["head"]):
        assert not sort_parameters(Classifier(), experts, private).warnings


def test_the_odd_one_out_is_warned_of() -> None:
    torch.manual_seed(7)
    siblings = make_experts((3, 3, 3))
    experts = {**dict(zip("abc", siblings)), "odd": perturb(Classifier(), 1.0, seed=5)}
    warned = sort_parameters(Classifier(), experts, []).warnings  # type: ignore[arg-type]
    assert len(warned) == 1
    assert "'odd'" in warned[0]


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.3])
def test_siblings_are_not_warned_of(scale: float) -> None:
    experts = dict(zip("abc", make_experts((3, 3, 4), scale)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sort_parameters(Classifier(), experts, None).warnings == []


def test_a_file_in_half_precision_is_loaded_in_the_modules(tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in Classifier().state_dict().items()}, path)
    assert load_expert("a", path, Classifier()).head.weight.dtype == torch.float32  # type: ignore[union-attr]


class Edited(Classifier):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["head.bias"] += 100


def test_what_a_hook_makes_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    module, trainer = Edited(), quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert float(load_expert("a", tmp_path / "a.ckpt", Edited()).get_parameter("head.bias").min()) > 50


def test_half_of_a_tied_pair_cannot_be_private() -> None:
    tied = {task: TiedClassifier() for task in TASKS}
    assert "one tensor" in only(problems(dict(tied), model=TiedClassifier(), private=["head.weight"])[:1])
