"""Files that mean harm: nothing in them is run, nothing is written elsewhere, and none takes the machine down."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, MergeTrainer
from com_lightning.experts.load import load_expert
from com_lightning.experts.tokenizers import TokenSource
from com_lightning.results.folder import load_results
from tests.helpers import Classifier, make_data, make_experts
from tests.helpers.bad_files import Payload, WithBert, bert, folder_of, refused
from tests.helpers.broken import lightning

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "executed")


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path: Path) -> Any:
    yield
    assert not (tmp_path / "executed").exists()


def test_the_payload_is_live(payload: Payload, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "executed").exists()
    (tmp_path / "executed").rmdir()


PLACES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "alone": lambda content, bad: bad,
    "beside": lambda content, bad: {**content, "callbacks": {"x": bad}},
    "as a key": lambda content, bad: {**content, "loops": [(bad,)]},
    "hyperparameters": lambda content, bad: {**content, "hyper_parameters": {"classes": bad}},
    "all hyperparameters": lambda content, bad: {**content, "hyper_parameters": bad},
    "their class": lambda content, bad: {**content, "hparams_type": bad},
    "instantiator": lambda content, bad: {**content, "hyper_parameters": {"classes": 3, "_instantiator": bad}},
    "weights": lambda content, bad: {**content, "state_dict": bad},
    "a weight": lambda content, bad: {**content, "state_dict": {**content["state_dict"], "head.bias": bad}},
}
FORMATS: dict[str, Callable[[Any, Path], object]] = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "pickle of today": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_executed(place: str, how: str, suffix: str, payload: Payload, tmp_path: Path) -> None:
    path = tmp_path / f"expert{suffix}"
    FORMATS[how](PLACES[place](lightning(Classifier()), payload), path)
    refused(path)
    path.rename(tmp_path / "a.ckpt")
    with pytest.raises(MergeError):  # as the result of a merge
        load_results(tmp_path, Classifier(), ["a"])


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("zip", ["mkdir", "plain values", "pass it in place of the path"]),
        ("legacy", ["mkdir", "plain values"]),
        ("pickle", ["safe loading refuses"]),
    ],
)
def test_what_is_refused_is_named(how: str, parts: list[str], payload: Payload, tmp_path: Path) -> None:
    path = tmp_path / "expert.ckpt"
    FORMATS[how]({**lightning(Classifier()), "x": {"betas": [0.9, payload]}}, path)
    message = refused(path)
    assert message.startswith(f"expert 'a' ({path}): ")
    assert all(part in message for part in parts), message


def test_all_refused_objects_of_a_file_are_named(payload: Payload, tmp_path: Path) -> None:
    content = {**lightning(Classifier()), "extra": [payload]}
    content["hyper_parameters"].update(data=Path("x"), activation=nn.ReLU())
    torch.save(content, tmp_path / "expert.ckpt")
    message = refused(tmp_path / "expert.ckpt")
    for name in ("pathlib.", "torch.nn.modules.activation.ReLU", "posix.mkdir"):
        assert name in message
    assert "classes" not in message


def test_validate_merged_executes_nothing(payload: Payload, tmp_path: Path) -> None:
    torch.save({**lightning(Classifier()), "x": payload}, tmp_path / "a.ckpt")
    (tmp_path / "transformers" / "a").mkdir(parents=True)
    (tmp_path / "transformers" / "a" / "config.json").write_text('{"architectures": ["BertModel"]}')
    torch.save({"x": payload}, tmp_path / "transformers" / "a" / "pytorch_model.bin")
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(MergeError):
        trainer.validate(Classifier(), datamodule=MergeDataModule({"a": make_data(0)}), merged=str(tmp_path))


def test_names_of_functions_are_not_called(tmp_path: Path) -> None:
    """What Lightning once looked up by name."""
    marker = tmp_path / "executed"
    for key, value in {
        "_instantiator": "os.system",
        "hparams_name": "kwargs",
        "hparams_type": "os.system",
        "_class_path": "os.system",
    }.items():
        content = lightning(Classifier())
        content["hyper_parameters"] = {"classes": f"touch '{marker}'", key: value}
        torch.save({**content, key: value}, tmp_path / "x.ckpt")
        refused(tmp_path / "x.ckpt")


def test_tar_and_torchscript_are_not_executed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        entry = tarfile.TarInfo("pickle")
        data = pickle.dumps(Payload(tmp_path / "executed"))
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    refused(tmp_path / "x.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "y.pt"))
    refused(tmp_path / "y.pt")


# Folders


def test_a_pickle_in_a_folder_of_transformers_is_not_executed(payload: Payload, tmp_path: Path) -> None:
    folder = folder_of(bert(), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    for content in ({"x": payload}, {**bert().state_dict(), "x": payload}, payload):
        torch.save(content, folder / "pytorch_model.bin")
        assert "BertModel cannot be loaded" in refused(folder, WithBert())
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        refused(folder, WithBert())


def test_code_and_pickles_beside_weights_are_not_executed(payload: Payload, tmp_path: Path) -> None:
    code = f"import os\nos.system('touch {payload.target}')\n"
    remote = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"]}
    folder = folder_of(bert(), tmp_path / "x", auto_map=remote, custom_pipelines={"a": {"impl": "evil.P"}})
    (folder / "evil.py").write_text(code)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": remote, "tokenizer_class": "T"}))
    for name in ("training_args.bin", "optimizer.pt", "tokenizer.model"):
        torch.save(payload, folder / name)
    load_expert("a", folder, WithBert())  # the weights are fine
    with pytest.raises(MergeError):
        assert TokenSource(folder).vocabulary
    (folder / "config.json").write_text(json.dumps({"architectures": ["Evil"], "auto_map": remote, "model_type": "e"}))
    assert "code of the folder is not run" in refused(folder, WithBert())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
def test_links_that_lead_out_of_a_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    """Private files would be copied into the result."""
    for kind, folder in (("x", folder_of(bert(), tmp_path / "x")), ("y", adapter(tmp_path / "y"))):
        path = folder / name
        path.rename(tmp_path / f"secret {kind}") if path.exists() else (tmp_path / f"secret {kind}").write_text("{}")
        path.symlink_to(tmp_path / f"secret {kind}")
        assert f"{name} is a link that leads out of the folder" in refused(folder, WithBert())


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernels_of_others_are_not_downloaded(key: str, tmp_path: Path) -> None:
    for config in ({key: "someone/kernels"}, {"text_config": {"x": {key: "someone/kernels"}}}):
        folder = folder_of(bert(), tmp_path / "x", **config)
        assert "names code of others, someone/kernels" in refused(folder, WithBert())


def adapter(folder: Path, **config: Any) -> Path:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"])).save_pretrained(folder)
    known = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))
    return folder


def test_an_adapter_executes_nothing(payload: Payload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"import os\nos.system('touch {payload.target}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Evil", "parent_library": "evil_module"}
    load_expert("a", adapter(tmp_path / "one", auto_mapping=mapping), WithBert())
    told = refused(adapter(tmp_path / "two", megatron_config={"a": 1}, megatron_core="evil_module"), WithBert())
    assert "sets megatron_config, which cannot be merged or is not known to be harmless" in told
    folder = adapter(tmp_path / "three")
    (folder / "adapter_model.safetensors").unlink()
    for content in ({"x": payload}, payload):
        torch.save(content, folder / "adapter_model.bin")
        refused(folder, WithBert())


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "/dev/zero", "..", "sub/model.safetensors"])
def test_shards_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(bert(), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(bert().state_dict(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names files outside of the folder" in refused(folder, WithBert())


# Names


def test_names_in_a_state_dict_lead_nowhere(tmp_path: Path) -> None:
    names = ("../../x", "/tmp/x", "..\\x", "", ".", "a/b", "\0", "x" * 10000, "__class__", "body.0.__dict__")
    for name in names:
        for state in ({name: torch.zeros(2)}, {**Classifier().state_dict(), name: torch.zeros(2)}):
            torch.save(state, tmp_path / "x.pt")
            refused(tmp_path / "x.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


@pytest.mark.parametrize("task", ["../x", "/tmp/x", "..", ".", "a/b", "a\\b", "a\0b", "", "x" * 300, "con:", "*"])
def test_names_of_tasks_stay_in_the_folder(task: str, tmp_path: Path) -> None:
    experts = make_experts((3, 3))
    merger = ChainOfMergesCallback({task: experts[0], "b": experts[1]}, output_dir=str(tmp_path / "out"))
    with pytest.raises(MergeError, match="cannot name a file"):
        merger.plan(Classifier(), MergeDataModule({task: make_data(0), "b": make_data(1)}))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".", "a/b", ""])
def test_names_of_further_files_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))), output_dir=str(tmp_path / "out"))
    merger.options.files = {name: "text"}
    with pytest.raises(MergeError, match=r"files: .*would be written outside"):
        merger.plan(Classifier(), MergeDataModule({"a": make_data(0), "b": make_data(1)}))


# Sizes; with a limit of memory, and an archive that explodes: tests/slow/test_hostile.py


def test_what_claims_more_than_there_is_is_not_read(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**10)
    torch.save({**Classifier().state_dict(), "head.bias": huge}, tmp_path / "x.pt")
    assert "head.bias claims 10,000,000,000 values" in refused(tmp_path / "x.pt")
    folder = folder_of(bert(), tmp_path / "x")
    with (folder / "config.json").open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room on the disk
    assert "config.json has 10,737,418,240 bytes" in refused(folder, WithBert())


@pytest.mark.parametrize("key", ["width", "classes"])
def test_hyperparameters_that_ask_for_too_much_are_refused(key: str, tmp_path: Path) -> None:
    content = lightning(Classifier())
    content["hyper_parameters"] = {"classes": 3, "width": 8, key: 10**9}
    torch.save(content, tmp_path / "merged.ckpt")
    assert re.search(r"much too large: more than [\d,]* values would be made", refused(tmp_path / "merged.ckpt"))
    with pytest.raises(MergeError, match="much too large"):  # as the result of a merge
        load_results(tmp_path, Classifier(), ["a"])


@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size", "vocab_size", "num_labels"])
def test_configurations_that_ask_for_too_much_are_refused(key: str, tmp_path: Path) -> None:
    folder = folder_of(bert(), tmp_path / "x", **{key: 10**9})
    told = refused(folder, WithBert())
    assert key in told or "values would be made" in told


def test_lists_in_lists_take_no_time(tmp_path: Path, payload: Payload) -> None:
    """Each holds the one before twice: few bytes, and 2^60 entries for who counts them one by one."""
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    itself: list[Any] = []
    itself.append(itself)
    for more in ({}, {"z": payload}):
        torch.save(
            {"state_dict": {}, "hyper_parameters": {"classes": nested}, "x": itself, **more}, tmp_path / "x.ckpt"
        )
        start = time.process_time()
        refused(tmp_path / "x.ckpt")
        assert time.process_time() - start < 10
