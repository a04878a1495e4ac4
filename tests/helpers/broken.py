"""Checkpoints and configurations that are broken at random; whatever comes of it has to be told as one of ours."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from com_lightning import MergeError
from com_lightning.cli import main
from com_lightning.experts.load import load_expert
from com_lightning.experts.parameters import sort_parameters
from tests.helpers import Classifier, make_experts, quiet_trainer

FEW: dict[str, Any] = {"derandomize": True, "deadline": None, "database": None}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def bytes_of(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def lightning(module: Classifier) -> dict[str, Any]:
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    return dict(trainer._checkpoint_connector.dump_checkpoint(weights_only=True))


EXPERT = make_experts((3,))[0]
STATE = {name: value.clone() for name, value in EXPERT.state_dict().items()}
CHECKPOINT = lightning(EXPERT)
FILES = {
    "x.ckpt": bytes_of(CHECKPOINT),
    "x.pt": bytes_of(STATE),
    "x.pth": bytes_of(STATE, _use_new_zipfile_serialization=False),
    "x.safetensors": save(STATE),
}


def load(name: str, content: bytes) -> None:
    """Load it, and look at what was loaded as a merge does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        told = "loaded"
        try:
            expert = load_expert("a", path, Classifier())
            sort_parameters(Classifier(), {"a": expert, "b": Classifier()}, None)
            expert(torch.randn(2, 6))
        except MergeError as error:
            told = str(error)
        assert told.strip()


def mutated_bytes(examples: int) -> Callable[[], None]:
    @settings(max_examples=examples, **FEW)
    @given(st.sampled_from(sorted(FILES)), st.data())
    def run(name: str, data: st.DataObject) -> None:
        content = bytearray(FILES[name])
        for _ in range(data.draw(st.integers(1, 4))):
            kind = data.draw(st.sampled_from(["flip", "cut", "insert", "fill", "repeat"]))
            # The beginning and the end are where formats are described.
            ends = st.one_of(
                st.integers(0, min(400, len(content))), st.integers(max(len(content) - 400, 0), len(content))
            )
            at = data.draw(st.one_of(ends, st.integers(0, len(content))))
            if kind == "flip" and at < len(content):
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at : at + data.draw(st.integers(1, 300))]
            elif kind == "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            elif kind == "fill":
                content[at : at + 8] = bytes([data.draw(st.sampled_from([0, 127, 255]))]) * 8
            else:
                content[at:at] = content[at : at + 200]
        load(name, bytes(content))

    run.__name__ = run.__qualname__ = "run"
    return run


ODD: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t[:0],
    lambda t: t.sum(),
    lambda t: t.expand(3, *t.shape),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nn.Parameter(t),
    lambda t: t * float("nan"),
    lambda t: t.tolist(),
    lambda t: {"x": t},
    lambda t: torch.nested.nested_tensor([t, t]),
]


def mutated_content(examples: int) -> Callable[[], None]:
    @settings(max_examples=examples, **FEW)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        content: Any = copy.deepcopy(data.draw(st.sampled_from([CHECKPOINT, STATE])))
        for _ in range(data.draw(st.integers(1, 3))):
            inner = content if data.draw(st.booleans()) or not isinstance(content, dict) else content.get("state_dict")
            if data.draw(st.integers(0, 3)) == 0 and isinstance(content, dict):
                inner = content.get("hyper_parameters")
            if not isinstance(inner, dict):
                continue
            key = data.draw(st.sampled_from(list(inner))) if inner else "x"
            kind = data.draw(st.sampled_from(["drop", "junk", "rename", "add", "odd", "odd"]))
            if kind == "drop":
                inner.pop(key, None)
            elif kind == "junk":
                inner[key] = data.draw(JUNK)
            elif kind == "rename" and key in inner:
                names = st.sampled_from([7, None, ("a", 1), "", ".", "module." + str(key), "x." + str(key), b"x", 1.5])
                inner[data.draw(names)] = inner.pop(key)
            elif kind == "add":
                inner[data.draw(st.one_of(st.text(max_size=5), st.integers()))] = data.draw(JUNK)
            elif isinstance(inner.get(key), torch.Tensor):
                odd = data.draw(st.sampled_from(ODD))
                with contextlib.suppress(RuntimeError):  # an odd tensor that cannot be made odder, such as a sparse one
                    inner[key] = odd(inner[key])
        try:
            written = bytes_of(content)
        except Exception:  # nobody can have such a file
            return
        load("x.ckpt", written)

    return run


CONFIG = {
    "model": {"class_path": "tests.helpers.Classifier", "init_args": {"classes": 3, "width": 8}},
    "data": {
        "class_path": "com_lightning.MergeDataModule",
        "init_args": {
            "num_samples": 8,
            "seed": 0,
            "split": "val",
            "holdout": False,
            "batch_size": 4,
            "tasks": {
                "a": {"class_path": "tests.helpers.PointsData", "init_args": {"seed": 0, "classes": 3}},
                "b": {"class_path": "tests.helpers.PointsData", "init_args": {"seed": 1, "classes": 3}},
            },
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "limit_val_batches": 1,
        "precision": "32-true",
    },
    "method": {
        "class_path": "com_lightning.ChainOfMerges",
        "init_args": {"target": "expert", "normalize": True, "importance": {"a": 1, "b": 2}, "ridge": 0.01},
    },
    "private": ["head"],
    "metric": "val_acc",
    "baselines": False,
    "on_bad_batch": "raise",
    "resize_embeddings": False,
}


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (mapping or list, key) in a configuration."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, part in items for place in places_in(part)]


def mutated_configs(examples: int) -> Callable[[], None]:
    values = st.one_of(
        JUNK,
        st.sampled_from(
            ["com_lightning.Average", "torch.nn.Linear", "nowhere.Nothing", "os.system", "", "val", 0, -1, 1]
        ),
        st.sampled_from([1e999, -1, {}, [], [None], {"a": None}, "${x}", "!!python/object:os.system", "2020-01-01"]),
    )

    @settings(max_examples=examples, **FEW)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        config: Any = copy.deepcopy(CONFIG)
        with tempfile.TemporaryDirectory() as folder:
            config["experts"] = {}
            for task, expert in zip("ab", make_experts((3, 3))):
                torch.save(lightning(expert), f"{folder}/{task}.ckpt")
                config["experts"][task] = f"{folder}/{task}.ckpt"
            config["output_dir"] = f"{folder}/out"
            for _ in range(data.draw(st.integers(1, 2))):
                spots = [(where, key) for where, key in places_in(config) if key not in ("output_dir", "trainer")]
                where, key = data.draw(st.sampled_from(spots))
                kind = data.draw(st.sampled_from(["value", "value", "drop", "rename"]))
                if kind == "value":
                    where[key] = data.draw(values)
                elif isinstance(where, list):
                    where.append(data.draw(values))
                else:
                    value = where.pop(key)
                    if kind == "rename":
                        where[data.draw(st.one_of(st.text(max_size=6), st.integers()))] = value
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
            command = data.draw(st.sampled_from(["merge", "merge", "dry run"]))
            code: Any = "merged"
            try:
                main(["merge", f"--config={path}", *(["--dry_run"] if command == "dry run" else [])])
            except SystemExit as stop:  # with a message, or after the command line's own
                code = stop.code
            assert code

    return run
