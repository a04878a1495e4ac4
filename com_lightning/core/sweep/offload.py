"""Pages the activations of paused forwards out when they exceed a memory budget.

A forward that waits at a layer holds its activations, and all forwards wait at once. If these activations exceed a
budget, some are paged out: they are copied to a file (from an accelerator: to host memory), and their storage is
emptied. It is filled again before anything computes with it. Tensors remain the same objects, with their views and
version counters, because only the storage behind them changes.

A dispatch mode sees every operation. If an output has a storage that no input has, the running forward has made that
storage: it belongs to no parameter, buffer or batch. The pager keeps weak references to such storages only. The mode
also sees which tensors an operation is about to read, and fetches those that are paged out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from com_lightning.core.sweep.page_folder import PageFolder
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.allocator import return_freed_memory


class Pager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the memory of paused forwards within a budget.

    Enter it around all code that runs the forwards or reads their tensors. Storages are counted on one device. Some are
    neither counted nor moved: those that existed before a forward, those that numpy or other processes use, too, and
    those of tensors that are not strided.

    Args:
        budget: in bytes. ``None``: only count.
        device: the device whose memory is counted.
        files: whether to page to files in the system's temporary folder, rather than to host memory. ``None``: to files
            from the CPU, and to host memory from other devices.

    Attributes:
        held: bytes that paused forwards hold now.
        peak: the largest value that ``held`` has had, including storages that were fetched to be read.
        written: number of bytes that were paged out so far.
        folder: the folder of the files, if there are any.
    """

    supports_higher_order_operators = True

    def __init__(self, budget: int | None, device: torch.device, files: bool | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.budget, self.device = budget, device
        self.held = self.peak = self.written = 0
        self.folder: Path | None = None
        self._bytes_moved = 0
        """Bytes moved since freed memory was last returned to the system."""
        self._files = device.type == "cpu" if files is None else files
        self._temporary: PageFolder | None = None
        self._pages: dict[int, _Page] = {}
        self._pages_of: dict[Hashable, _ForwardPages] = {}
        self._paused_pages: dict[_ForwardPages, None] = {}
        """Pages of paused forwards. The forward that paused last is at the end, and is also the last to be resumed."""
        self._running: _ForwardPages | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        try:
            for forward in self._pages_of:  # some may not have ended
                self.finished(forward)
        finally:
            if self._temporary is not None:
                self._temporary.remove()
                self._temporary = self.folder = None

    def resumed(self, forward: Hashable) -> None:
        """Fetch all pages of a forward that is about to run."""
        owner = self._pages_of.setdefault(forward, _ForwardPages(len(self._pages_of)))
        self._fetch_all(owner)
        self._running = owner

    def paused(self, forward: Hashable) -> None:
        """Count the pages of a forward that has paused, and enforce the budget."""
        owner, self._running = self._pages_of[forward], None
        for page, storage in self._live_pages(owner):
            page.size = storage.nbytes()
            if not _is_movable(storage):
                self._forget(page)
        owner.held = sum(page.size for page in owner.pages)
        owner.peak = max(owner.peak, owner.held)
        self._paused_pages[owner] = None
        self.held += owner.held
        self.enforce_budget()
        self._return_freed_memory()

    def finished(self, forward: Hashable) -> None:
        """Fetch all pages of a forward that has ended, and forget them."""
        self._running = None
        if owner := self._pages_of.get(forward):
            self._fetch_all(owner)
            for page in list(owner.pages):
                self._forget(page)
        self._return_freed_memory()

    def peak_by_forward(self) -> dict[Hashable, int]:
        """Each forward that has run -> the most bytes that it has held at any of its pauses."""
        return {forward: owner.peak for forward, owner in self._pages_of.items()}

    def fetch(self, *values: Any) -> None:
        """Fetch the tensors among these values before they are read."""
        with private_torch.no_torch_function():
            for tensor in _tensors(values):
                self._load(tensor, writes=False)

    def enforce_budget(self) -> None:
        """Page out until the budget holds. Begin with the forward that will be resumed last."""
        for owner in reversed(self._paused_pages):
            if self.budget is None or self.held <= self.budget:
                break
            if owner.held:
                self._page_out(owner)
        self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = private_torch.is_operator(func)
        writes = not operator or private_torch.is_mutable(func)
        with private_torch.no_torch_function():
            tensors = list(_tensors((args, kwargs)))
            loaded = [self._load(tensor, writes) for tensor in tensors]
        result = func(*args, **kwargs)
        # If an input has an unknown storage, or the operation is not PyTorch's, the output may be a view of something.
        if self._running is not None and operator and None not in loaded:
            with private_torch.no_torch_function():
                input_addresses = {address for addresses in loaded for address in addresses or ()}
                inputs = {id(tensor) for tensor in tensors}  # the operation may have given them other storages
                for tensor in _tensors(result):
                    if id(tensor) not in inputs:
                        self._record(tensor, input_addresses, self._running)
        return result

    def _load(self, tensor: Tensor, writes: bool) -> list[int] | None:
        """Fetch a tensor. Returns the addresses of its storages on the device, or ``None`` if they are unknown."""
        if tensor.device.type != self.device.type:
            return []
        storages = _storages(tensor)
        if storages is None:
            return None
        addresses = [private_torch.address(storage) for storage in storages]
        for address in addresses:
            page = self._pages.get(address)
            if page is not None and page.owner is not self._running:
                self._fetch([page])
                if writes or self._running is not None:
                    page.saved = None  # the saved bytes are out of date, or soon may be
        return addresses

    def _record(self, tensor: Tensor, input_addresses: set[int], owner: _ForwardPages) -> None:
        is_strided = tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
        if is_strided and tensor.device.type == self.device.type:
            for storage in _storages(tensor) or ():
                address = private_torch.address(storage)
                if address not in input_addresses and address not in self._pages and storage.nbytes():
                    self._pages[address] = page = _Page(storage, owner)
                    owner.pages[page] = None

    def _return_freed_memory(self) -> None:
        """Have the C library return freed memory. glibc keeps free memory below memory that is still in use."""
        if self._bytes_moved > 2**25 and self.device.type == "cpu":
            self._bytes_moved = 0
            return_freed_memory()

    def _live_pages(self, owner: _ForwardPages) -> list[tuple[_Page, UntypedStorage]]:
        """The pages of a forward whose storages still exist, with these storages. The others are forgotten."""
        live = []
        for page in list(owner.pages):
            storage = page.storage()
            if storage is None:
                self._forget(page)
            else:
                live.append((page, storage))
        return live

    def _forget(self, page: _Page) -> None:
        del self._pages[page.address], page.owner.pages[page]
        if not page.paged_out:
            self._add_held(page, -page.size)

    def _add_held(self, page: _Page, size: int) -> None:
        if page.owner in self._paused_pages:
            page.owner.held += size
            self.held += size

    def _fetch_all(self, owner: _ForwardPages) -> None:
        """Fetch all pages of a forward. Drop the saved bytes, because the forward may now change its tensors."""
        if owner in self._paused_pages:
            del self._paused_pages[owner]
            self.held -= owner.held
        self._fetch([page for page, _ in self._live_pages(owner)])
        for page in owner.pages:
            page.saved = None
        if self.folder is not None:
            (self.folder / owner.name).unlink(missing_ok=True)

    def _fetch(self, pages: Sequence[_Page]) -> None:
        """Fill the storages of some pages of one forward."""
        paged_out = [(page, storage) for page in pages if page.paged_out and (storage := page.storage()) is not None]
        if paged_out and self._files:
            assert self.folder is not None
            with open(self.folder / paged_out[0][0].owner.name, "rb") as file:
                for page, storage in paged_out:
                    assert isinstance(page.saved, int)
                    storage.resize_(page.size)
                    file.seek(page.saved)
                    if file.readinto(_memory(storage)) != page.size:
                        raise OSError(f"{file.name} is shorter than what was written to it")
        else:
            with private_torch.no_torch_dispatch():
                for page, storage in paged_out:
                    assert isinstance(page.saved, UntypedStorage)
                    storage.resize_(page.size)
                    storage.copy_(page.saved)
        for page, _ in paged_out:
            page.paged_out = False
            self._bytes_moved += page.size
            self._add_held(page, page.size)
        self.peak = max(self.peak, self.held)

    def _page_out(self, owner: _ForwardPages) -> None:
        present = [(page, storage) for page, storage in self._live_pages(owner) if not page.paged_out]
        unsaved = [(page, storage) for page, storage in present if page.saved is None]
        if unsaved and self._files:
            self._write(owner, unsaved)
        elif unsaved:
            self._copy(unsaved)
        self.written += sum(page.size for page, _ in unsaved)
        for page, storage in present:
            storage.resize_(0)
            page.paged_out = True
            self._add_held(page, -page.size)
            self._bytes_moved += page.size

    def _write(self, owner: _ForwardPages, pages: Sequence[tuple[_Page, UntypedStorage]]) -> None:
        if self.folder is None:
            self._temporary = PageFolder()
            self.folder = self._temporary.path
        try:
            with open(self.folder / owner.name, "ab") as file:
                offsets = []
                for _, storage in pages:
                    offsets.append(file.tell())
                    file.write(_memory(storage))
        except OSError as error:
            error.add_note(
                f"while paging activations out to {self.folder}; the environment variable TMPDIR can name another "
                "folder"
            )
            raise
        for (page, _), offset in zip(pages, offsets):
            page.saved = offset

    def _copy(self, pages: Sequence[tuple[_Page, UntypedStorage]]) -> None:
        with private_torch.no_torch_dispatch():
            if self.device.type == "cuda":  # a forward may compute on several streams
                torch.cuda.synchronize(self.device)
            for page, storage in pages:
                host = _host_memory(page.size, pinned=self.device.type == "cuda")
                host.copy_(storage)
                page.saved = host


class _ForwardPages:
    """The pages of one forward.

    Attributes:
        name: the name of the forward's file.
        held: bytes of the pages that are not paged out, while the forward is paused.
        peak: the most bytes that all pages had at a pause, paged out or not.
        pages: the pages, as an ordered set.
    """

    def __init__(self, number: int) -> None:
        self.name, self.held, self.peak = str(number), 0, 0
        self.pages: dict[_Page, None] = {}


class _Page:
    """A storage that a forward has made.

    Attributes:
        address: identifies the storage.
        reference: a weak reference to the storage.
        owner: the pages of the same forward.
        saved: a copy of the bytes: an offset in the forward's file, or a storage on the host. ``None``: there is none.
        paged_out: whether the bytes are in that copy only.
        size: size of the storage when its forward paused.
    """

    __slots__ = ("address", "owner", "paged_out", "reference", "saved", "size")

    def __init__(self, storage: UntypedStorage, owner: _ForwardPages) -> None:
        self.owner = owner
        # While there is a weak reference, no other storage gets the same address.
        self.address, self.reference = private_torch.address(storage), private_torch.WeakStorage(storage)
        self.saved: int | UntypedStorage | None = None
        self.paged_out, self.size = False, 0

    def storage(self) -> UntypedStorage | None:
        return self.reference.get()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _storages(tensor: Tensor) -> list[UntypedStorage] | None:
    """The storages that hold a tensor's values, or ``None`` if they are unknown."""
    parts = private_torch.inner_tensors(tensor)
    if parts is None and tensor.layout == torch.strided:
        try:
            return [tensor.untyped_storage()]
        except (NotImplementedError, RuntimeError):
            return None
    if parts is None and tensor.layout == torch.sparse_coo:
        parts = private_torch.sparse_parts(tensor)
    storages: list[UntypedStorage] = []
    for part in parts or ():
        of_part = _storages(part)
        if of_part is None:
            return None
        storages += of_part
    return None if parts is None else storages


def _is_movable(storage: UntypedStorage) -> bool:
    """Whether a storage may be emptied. numpy and other processes need its bytes to stay where they are."""
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _memory(storage: UntypedStorage) -> Any:
    """The bytes of a storage, to read or write them. (With a view by numpy, the storage could not be resized.)"""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _host_memory(size: int, pinned: bool) -> UntypedStorage:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
    except RuntimeError:  # the system limits how much memory can be pinned
        return torch.empty(size, dtype=torch.uint8).untyped_storage()
