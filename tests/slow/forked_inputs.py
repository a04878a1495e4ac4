"""Two thousand inputs that are broken at random or on purpose, in every place that reads something.

Each ends in a right result or in an error in words, within limits of time and memory, and nothing in it is executed.
Run by tests/slow/test_malformed.py in an interpreter of its own, because processes are forked.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from com_lightning import Average, MergeDataModule, MergeError, merge
from com_lightning.analysis.inspection import inspect
from com_lightning.cli import main
from com_lightning.experts.load import load_expert
from com_lightning.experts.parameters import sort_parameters
from com_lightning.results.export import export
from com_lightning.results.folder import load_results
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.bad_files import Payload, WithBert, bert, folder_of
from tests.helpers.broken import CHECKPOINT, CONFIG, FILES, ODD, STATE, bytes_of, lightning, places_in
from tests.helpers.limits import limited

warnings.simplefilter("ignore")
DEEP: Any = {}
for _ in range(300):
    DEEP = {"a": DEEP, "b": [0]}
CODE = "os.system"
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2.5, 10**9, -(10**18), 1e300, float("nan"), float("inf"), "", "x", "x" * 5000, "a\0b",
    "../..", "/dev/zero", "/etc/passwd", [], {}, [None], {"a": None}, [[[]]], DEEP, "[" * 3000, "{a: " * 500, CODE,
    {"_target_": CODE, "args": ["touch executed"]}, {"class_path": CODE, "init_args": {"command": "touch executed"}},
    {"class_path": "subprocess.Popen", "init_args": {"args": "touch executed", "shell": True}},
    {"_instantiator": CODE}, "!!python/object/apply:os.system ['touch executed']", "{{ cycler.__init__.__globals__ }}",
    "hf://nobody/nothing", "torch.nn.Linear", "com_lightning.Average",
]  # fmt: skip
"""Values that something may be replaced by, those that name code among them."""
NAMES = [
    "auto_map",
    "trust_remote_code",
    "_target_",
    "class_path",
    "_instantiator",
    "custom_pipelines",
    "x",
    "",
    "a.b.c",
]
Input = Callable[[], Any]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four places of a file are changed, mostly near its ends, where formats are described."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.choice(
            [draw.randint(0, min(400, len(data))), draw.randint(0, len(data)), max(len(data) - draw.randint(0, 400), 0)]
        )
        kind = draw.choice(["flip", "cut", "insert", "fill", "repeat", "end"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw.randint(0, 7)
        elif kind == "cut":
            del data[at : at + draw.randint(1, 300)]
        elif kind == "insert":
            data[at:at] = draw.randbytes(draw.randint(1, 20))
        elif kind == "fill":
            data[at : at + 8] = bytes([draw.choice([0, 127, 255])]) * 8
        elif kind == "repeat":
            data[at:at] = data[at : at + 200]
        else:
            del data[at:]
    return bytes(data)


def changed(content: Any, draw: random.Random, more: list[Any] = []) -> Any:  # noqa: B006
    """One or two places of a tree of dictionaries and lists are replaced, renamed, dropped or added."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 2)):
        places = places_in(content)
        if not places or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(VALUES))
        where, key = draw.choice(places)
        kind = draw.choice(["value", "value", "value", "drop", "rename", "add"])
        value = draw.choice([*copy.deepcopy(VALUES), *more])  # a copy of a payload would execute it
        if kind == "value" or isinstance(where, list):
            where[key] = value
        elif kind == "drop":
            del where[key]
        elif kind == "rename":
            where[draw.choice(NAMES)] = where.pop(key)
        else:
            where[draw.choice(NAMES)] = value
    return content


def used(path: Path, model: Any) -> None:
    """Load it, and look at it as a merge does."""
    expert: Any = load_expert("a", path, model)
    sort_parameters(model, {"a": expert, "b": model}, None)
    if isinstance(model, WithBert):
        expert.net(input_ids=torch.ones(1, 2, dtype=torch.long))
    else:
        expert(torch.randn(2, 6))


def checkpoint_bytes(folder: Path, draw: random.Random) -> Iterator[Input]:
    for name in sorted(FILES):
        (folder / name).write_bytes(mutated(FILES[name], draw))
        yield partial(used, folder / name, Classifier())
        yield partial(inspect, {"a": folder / name, "b": folder / name})


def checkpoint_content(folder: Path, draw: random.Random) -> Iterator[Input]:
    payload = Payload(folder / "executed")
    for content in (CHECKPOINT, STATE):
        path = folder / "x.ckpt"
        new = changed(content, draw, [*(odd for odd in ODD), payload, payload])
        state = new.get("state_dict", new) if isinstance(new, dict) else {}
        for name, value in list(state.items()) if isinstance(state, dict) else ():
            if any(value is odd for odd in ODD):
                state[name] = _odd(value, STATE.get(name, torch.ones(3)))
        try:
            path.write_bytes(bytes_of(new))
        except Exception:  # nobody can have such a file
            path.write_bytes(bytes_of(payload))
        yield partial(used, path, Classifier())
        yield partial(merge, Classifier(), {"a": path, "b": path}, method=Average())


def _odd(make: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
    try:
        return make(tensor)
    except RuntimeError:
        return tensor


def model_folder(folder: Path, draw: random.Random) -> Iterator[Input]:
    path = shutil.copytree(MADE["model"], folder / "m")
    name = draw.choice(
        ["config.json", "config.json", "config.json", "generation_config.json", "model.safetensors", "new"]
    )
    _damage(path / ("model.safetensors.index.json" if name == "new" else name), draw)
    yield partial(used, path, WithBert())
    if name != "model.safetensors":
        yield partial(inspect, {"a": path, "b": path})


def adapter_folder(folder: Path, draw: random.Random) -> Iterator[Input]:
    path = shutil.copytree(MADE["adapter"], folder / "m")
    _damage(path / draw.choice(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]), draw)
    yield partial(used, path, WithBert())


def _damage(path: Path, draw: random.Random) -> None:
    """Break a file: by its content if it is JSON, else, or sometimes, by its bytes."""
    before = path.read_bytes() if path.exists() else b'{"weight_map": {"a": "model.safetensors"}}'
    if path.suffix != ".json" or draw.random() < 0.15:
        path.write_bytes(mutated(before, draw))
    else:
        path.write_text(json.dumps(changed(json.loads(before), draw)), encoding="utf-8")


def configuration(folder: Path, draw: random.Random) -> Iterator[Input]:
    whole = copy.deepcopy(CONFIG)
    whole["experts"] = {task: str(MADE[task]) for task in "ab"}
    config = changed(whole, draw)
    if isinstance(config, dict):
        config["output_dir"] = str(folder / "out")
        config["trainer"] = CONFIG["trainer"]
    path = folder / "config.yaml"
    text = yaml.safe_dump(config, allow_unicode=True).encode()
    path.write_bytes(mutated(text, draw) if draw.random() < 0.2 else text)
    yield partial(main, ["merge", "--config", str(path), "--dry_run"])


def journal(folder: Path, draw: random.Random) -> Iterator[Input]:
    place = shutil.copytree(MADE["unfinished"], folder / "j")
    files = sorted((place / ".out.partial" / "journal").iterdir())
    kind = draw.choice(
        ["flip", "flip", "flip", "bytes", "swap", "remove", "empty", "other", "values", "folder", "link"]
    )
    one, two = draw.sample(files, 2)
    data = bytearray(one.read_bytes())
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randint(0, 7)
        one.write_bytes(data)
    elif kind == "bytes":
        one.write_bytes(mutated(bytes(data), draw))
    elif kind == "swap":
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
    elif kind in ("remove", "folder", "link"):
        one.unlink()
        if kind == "folder":
            one.mkdir()
        elif kind == "link":
            one.symlink_to(draw.choice([one, Path("nowhere"), Path("/dev/zero"), two]))
    elif kind == "empty":
        one.write_bytes(b"")
    elif kind == "other":
        other = MADE["other"] / ".out.partial" / "journal" / one.name
        one.write_bytes(other.read_bytes() if other.is_file() else b"{}")
    elif one.suffix == ".safetensors":  # the file is right, and its values are not
        save_file({name: value + 1 for name, value in load_file(one).items()}, one)
    yield partial(_resumed, place / "out")


def _resumed(out: Path) -> None:
    result = chain(out)
    for name, expected in load_file(MADE["whole"] / "out" / "merged.safetensors").items():
        assert torch.equal(result[name], expected), name


def chain(out: Path, experts: str = "ab") -> Any:
    """The result of a chain of merges in a folder."""
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    sources = {task: MADE[expert] for task, expert in zip("ab", experts)}
    merge(Classifier(), sources, data, trainer=quiet_trainer(), baselines=False, output_dir=str(out), overwrite=True)
    return load_file(out / "merged.safetensors")


def result_folder(folder: Path, draw: random.Random) -> Iterator[Input]:
    out = shutil.copytree(MADE["result"], folder / "out")
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.suffix in (".ckpt", ".json", ".safetensors"))
    path = draw.choice(files)
    if draw.random() < 0.15:
        path.unlink()
        if draw.random() < 0.5:
            path.symlink_to(draw.choice([path, Path("nowhere"), Path("/dev/zero"), out]))
    else:
        _damage(path, draw)
    yield partial(load_results, out, WithBert(), ["a", "b"])
    yield partial(export, out, folder / "exported")
    yield partial(
        merge, Classifier(), {t: MADE[t] for t in "ab"}, method=Average(), output_dir=str(out), overwrite=True
    )


PLACES: dict[Callable[[Path, random.Random], Iterator[Input]], int] = {
    checkpoint_bytes: 600,
    checkpoint_content: 500,
    model_folder: 280,
    adapter_folder: 130,
    configuration: 100,
    journal: 150,
    result_folder: 240,
}
"""Place -> number of inputs: 2,000 in all."""
MADE: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _made(tmp_path_factory: pytest.TempPathFactory) -> None:
    import peft

    folder = tmp_path_factory.mktemp("made")
    for task, expert in zip("ab", make_experts((3, 3))):
        MADE[task] = folder / f"{task}.ckpt"
        torch.save(lightning(expert), MADE[task])
    MADE["model"] = folder_of(bert(), folder / "model")
    MADE["adapter"] = folder / "adapter"
    peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"])).save_pretrained(str(MADE["adapter"]))
    for name in ("whole", "unfinished", "other"):
        MADE[name] = folder / name
        MADE[name].mkdir()
    chain(MADE["whole"] / "out")

    def full(*args: Any) -> None:
        raise OSError("no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("com_lightning.results.folder._write_report", full)  # so that the journal stays
        for name, experts in {"unfinished": "ab", "other": "ba"}.items():
            with pytest.raises(MergeError, match="no space"):
                chain(MADE[name] / "out", experts)
    MADE["result"] = folder / "result"
    merge(WithBert(), {"a": WithBert(), "b": WithBert()}, method=Average(), output_dir=str(MADE["result"]))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_whatever_is_broken_is_right_or_told(
    place: Callable[[Path, random.Random], Iterator[Input]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, count, bad = random.Random(place.__name__), Counter[str](), list[str]()
    monkeypatch.chdir(tmp_path)  # what is executed would leave a file here
    number = 0
    while sum(count.values()) < PLACES[place]:
        folder = tmp_path / str(number)
        folder.mkdir()
        for run in place(folder, draw):
            outcome = limited(run)
            count[outcome.kind] += 1
            if outcome.kind not in ("right", "told"):
                bad.append(f"{place.__name__} {number}: {outcome.kind}: {outcome.text}")
            if list(tmp_path.rglob("executed*")):
                bad.append(f"{place.__name__} {number}: executed")
        if os.environ.get("KEEP") is None:
            shutil.rmtree(folder)
        number += 1
    print(place.__name__, dict(count))
    assert count["right"]
    assert count["told"]
    assert not bad, f"{len(bad)}\n" + "\n\n".join(bad[:20])
