"""Experts by their name on the Hugging Face Hub, of which there is a cache, or a stand-in, and no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from com_lightning import Average, ChainOfMergesCallback, MergeError, TaskArithmetic
from com_lightning.analysis.inspection import inspect
from com_lightning.experts.hub import local_folders
from com_lightning.experts.state_dicts import plain_state
from tests.helpers import NAMES_OF_5, perturb
from tests.helpers.hub import COMMIT, put
from tests.helpers.texts import TextModule, make_bert


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def bert(folder: Path, seed: int) -> Path:
    perturb(make_bert(), 0.1, seed).save_pretrained(folder)  # type: ignore[operator]
    return folder


class Hub:
    """Stands in for the network: folders by name, and what is asked of it."""

    def __init__(self, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.models, self.asked, self.files = models, list[str](), list[str]()
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.model_info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def model_info(self, name: str, revision: str | None = None) -> Any:
        self.asked.append(f"look up {name}")
        if name not in self.models:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        paths = [path.relative_to(self.models[name]) for path in self.models[name].rglob("*.*")]
        files = [SimpleNamespace(rfilename=path.as_posix()) for path in paths]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def snapshot_download(self, name: str, revision: str | None = None, allow_patterns: Any = ()) -> str:
        assert revision == COMMIT  # that which was looked up, whatever has been uploaded since
        self.asked.append(f"download {name}")
        self.files = sorted(allow_patterns)
        return str(self.models[name])


def test_what_is_in_the_cache_merges_as_the_folders_do(cache: Path, tmp_path: Path) -> None:
    folders = {task: bert(tmp_path / task, seed) for seed, task in enumerate(("base", "a", "b"))}
    for task, folder in folders.items():
        put(cache, f"someone/bert-{task}", folder)
    merged = []
    for where in (
        {task: str(folder) for task, folder in folders.items()},
        {t: f"hf://someone/bert-{t}" for t in folders},
    ):
        experts = {task: where[task] for task in ("a", "b")}
        merger = ChainOfMergesCallback(experts, TaskArithmetic(), base=where["base"])
        merger.merge(TextModule())
        merged.append(merger.modules["a"].state_dict())
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())
    one, two = inspect(folders), inspect({task: f"hf://someone/bert-{task}" for task in folders})
    assert one.to_json() == two.to_json()


def test_all_is_looked_up_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"me/a": bert(tmp_path / "a", 1), "me/b": bert(tmp_path / "b", 2)}, monkeypatch)
    found, problems = local_folders({"one": "hf://me/a", "two": "hf://me/b@v1.0", "three": tmp_path})
    assert not problems
    assert found == {"one": tmp_path / "a", "two": tmp_path / "b", "three": tmp_path}
    assert hub.asked == ["look up me/a", "look up me/b", "download me/a", "download me/b"]


def test_nothing_is_downloaded_where_a_name_is_amiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"me/a": bert(tmp_path / "a", 1), "me/empty": tmp_path / "empty"}, monkeypatch)
    (tmp_path / "empty").mkdir()
    experts = {"a": "hf://me/a", "b": "hf://me/none", "c": "hf://none", "d": "hf://me/empty", "e": str(tmp_path / "e")}
    with pytest.raises(MergeError) as caught:
        ChainOfMergesCallback(experts, Average()).merge(TextModule())
    told = caught.value.problems
    assert not [entry for entry in hub.asked if "download" in entry]
    assert len(told) == 4
    for part in ("'b' (hf://me/none): there is no such model", "'c' (hf://none): a name on", "'d'", "'e'"):
        assert any(part in problem for problem in told), told


def test_neither_code_nor_pickles_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bert(tmp_path / "a", 1)
    wanted = ["additional_chat_templates/tools.jinja", "source.spm", "tokenizer.json"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "onnx").mkdir()
    for name in ("modeling_a.py", "pytorch_model.bin", "training_args.bin", "onnx/config.json", *wanted):
        (folder / name).write_text("")
    hub = Hub({"me/a": folder, "me/pickled": tmp_path / "pickled"}, monkeypatch)
    local_folders({"a": "hf://me/a"})
    assert hub.files == sorted(["config.json", "model.safetensors", *wanted])
    shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    found, problems = local_folders({"a": "hf://me/pickled"})
    assert not found
    assert "no weights in safetensors" in problems[0]


def test_without_a_network_what_was_never_downloaded_is_told(cache: Path) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    found, problems = local_folders({"expert 'a'": "hf://me/a"})
    assert not found
    assert problems[0].startswith("expert 'a' (hf://me/a): cannot be downloaded from the Hub, and is not in the cache")


@pytest.mark.skipif(not NAMES_OF_5, reason="these are the names of transformers 4")
def test_names_of_an_older_transformers_are_read(cache: Path, tmp_path: Path) -> None:
    """CLIP's vision towers on the Hub have a prefix that transformers 5 has dropped."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from com_lightning.experts.transformers_models import load_pretrained

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=16))
    tower.save_pretrained(tmp_path / "tower")
    state = {f"vision_model.{name}": value.clone() for name, value in tower.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
    put(cache, "someone/tower", tmp_path / "tower")
    folder = local_folders({"a": "hf://someone/tower"})[0]["a"]
    loaded = plain_state(load_pretrained(folder, "a").state_dict())
    assert all(torch.equal(value, loaded[name]) for name, value in tower.state_dict().items())
