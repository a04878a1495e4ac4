"""What of PyTorch is private, and called: still there, and still meaning the same."""

from __future__ import annotations

import ast
import gc
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import com_lightning
from com_lightning.core.tensors import private_torch as private


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    count = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.count += 1
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_what_an_operator_writes_to() -> None:
    one, other, out = torch.zeros(2), torch.ones(2), torch.zeros(2)
    aten = torch.ops.aten
    assert private.written(aten.add.Tensor, (one, other), {}) == []
    assert private.written(aten.copy_.default, (one, other), {})[0] is one
    assert private.written(aten.add.out, (one, other), {"out": out})[0] is out
    assert [id(t) for t in private.written(aten._foreach_copy_.default, ([one, other], [out, out]), {})] == [
        id(one),
        id(other),
    ]


def test_operators_that_make_tensors_can_be_told_where() -> None:
    with Dispatched() as seen:
        torch.nn.Linear(2, 3)
        torch.zeros(2).new_zeros(3).add_(1).view(3, 1)
    made = [str(operator.overloadpacket) for operator in seen.operators if private.takes_device(operator)]
    assert made == ["aten.empty", "aten.empty", "aten.zeros", "aten.new_zeros"]
    assert len(seen.operators) > len(made)


def test_version_counts_writes_and_can_be_kept() -> None:
    tensor = torch.zeros(2)
    before = private.version(tensor)
    tensor.add_(1)
    assert private.version(tensor) == before + 1
    with private.unversioned_write(tensor):
        tensor.add_(1)
    assert private.version(tensor) == before + 1
    assert tensor.tolist() == [2, 2]


def test_a_subclass_shares_the_storage() -> None:
    tensor = torch.zeros(2)
    sub = private.make_subclass(Sub, tensor)
    assert type(sub) is Sub
    tensor.fill_(3)
    assert sub.tolist() == [3, 3]


def test_torch_function_can_be_set_aside() -> None:
    sub = private.make_subclass(Sub, torch.zeros(2))
    Sub.count = 0
    with Seen() as mode:
        with private.no_torch_function():
            torch.add(sub, 1)
        assert (mode.count, Sub.count) == (0, 0)
        with private.no_subclass_torch_function():
            torch.add(sub, 1)
        assert mode.count > 0
        assert Sub.count == 0
        torch.add(sub, 1)
        assert Sub.count > 0


def test_modes_can_be_read_and_replaced() -> None:
    with Seen() as seen:
        modes = private.function_modes()
        assert modes == (seen,)
        private.set_function_modes(())
        torch.add(torch.zeros(1), 1)
        assert seen.count == 0
        private.set_function_modes(modes)
        torch.add(torch.zeros(1), 1)
        assert seen.count > 0
    with Dispatched() as dispatched:
        modes = private.dispatch_modes()
        assert modes == (dispatched,)
        private.set_dispatch_modes(())
        torch.zeros(1)
        private.set_dispatch_modes(modes)
        assert not dispatched.operators
        with private.no_torch_dispatch():
            torch.zeros(1)
        assert not dispatched.operators
        torch.zeros(1).add_(1)
    assert all(map(private.is_operator, dispatched.operators))
    assert [private.is_mutable(operator) for operator in dispatched.operators][-1] is True
    assert not private.is_mutable(torch.ops.aten.add.Tensor)
    assert not private.is_operator(torch.add)


def test_transforms_are_noticed() -> None:
    inside: list[bool] = []

    def note(x: Tensor) -> Tensor:
        inside.append(private.inside_transform())
        return x

    torch.func.vmap(note)(torch.zeros(2))
    assert inside == [True]
    assert not private.inside_transform()


def test_a_weak_storage_lets_go() -> None:
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()
    weak, address = private.WeakStorage(storage), private.address(storage)
    again = weak.get()
    assert again is not None
    assert private.address(again) == address
    assert again.data_ptr() == tensor.data_ptr()
    del tensor, storage, again
    gc.collect()
    assert weak.get() is None


def test_what_tensors_consist_of() -> None:
    assert private.inner_tensors(torch.zeros(1)) is None
    sparse = torch.eye(2).to_sparse()
    indices, values = private.sparse_parts(sparse)
    assert (indices.shape, values.tolist()) == ((2, 2), [1, 1])


def test_onednn_gives_what_pytorch_gives() -> None:
    if not private.has_onednn_linear():
        pytest.skip("PyTorch was built without MKL or oneDNN")
    rows, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    for b in (bias, None):
        torch.testing.assert_close(private.onednn_linear(rows, weight, b), torch.nn.functional.linear(rows, weight, b))


def test_the_store_of_the_default_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = private.default_store()
        store.set("key", "value")
        assert store.check(["key"])
        assert store.get("key") == b"value"
    finally:
        dist.destroy_process_group()


def test_the_copy_of_a_loader_reads_by_itself() -> None:
    data = torch.arange(6)
    loader: DataLoader[Any] = DataLoader(data, 2, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    live = iter(loader)
    copied = private.loader_copy(loader, batch_sampler=[[5, 0]])
    assert [batch.tolist() for batch in copied] == [[5, 0]]
    assert [batch.tolist() for batch in live] == [[0, 1], [2, 3], [4, 5]]
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]


def test_the_classes_of_the_index_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    save({"a": torch.ones(2), "b": [1]}, checkpoint_id=tmp_path / "x", no_dist=True)
    named: set[tuple[str, str]] = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with open(tmp_path / "x" / ".metadata", "rb") as file:
        Recorder(file).load()
    plain = {entry for entry in named if entry[0].partition(".")[0] in ("pathlib", "collections")}
    assert all(private.index_class(*entry) is not None for entry in named - plain)
    assert private.index_class("torch", "load") is None
    assert private.index_class("builtins", "eval") is None


def test_nothing_private_is_called_elsewhere() -> None:
    """Attributes that begin with one underscore, of modules of PyTorch, are read in one file alone."""
    allowed = {"private_torch.py"}
    found = []
    for path in Path(com_lightning.__path__[0]).rglob("*.py"):
        if path.name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.match(r"torch\.(?:[\w.]+\.)?_[a-zA-Z]", ast.unparse(node)):
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                found += [
                    f"{path.name}:{node.lineno} {node.module}.{alias.name}"
                    for alias in node.names
                    if alias.name.startswith("_") or "._" in (node.module or "")
                ]
    public_enough = ("torch.utils._python_dispatch.TorchDispatchMode", "torch._dynamo.OptimizedModule")
    found = [entry for entry in found if not entry.endswith(public_enough) and "torch.nn.modules" not in entry]
    assert not found, "move these to core/tensors/private_torch.py: " + ", ".join(found)
