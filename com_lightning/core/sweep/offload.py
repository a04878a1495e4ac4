"""What paused forwards hold, and where it goes when it is too much.

A forward that waits at a layer holds its activations, and all forwards wait at once. Past a budget, what they hold is
paged out: copied to a file (or, from an accelerator, to host memory) and its storage emptied, which is filled again
before anyone computes with it. Tensors stay the objects that they are, with their views and version counters: what is
emptied is the storage behind them.

A dispatch mode sees every operation. A storage that comes out of one, and belongs to nothing that went in, has been
made by the forward that is running: it is never a parameter's, a buffer's or a batch's. Only weak references to it are
kept. The mode also sees what is about to be read, and fetches what is not there, whoever asks for it.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.allocator import return_freed_memory


class Pager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what paused forwards hold between them under a budget. To be entered around all that runs and reads them.

    What is held is counted storage by storage, on one device. Neither counted nor moved is what was there before a
    forward, what numpy or other processes look at too, and what tensors hold that are not strided.

    Args:
        budget: bytes; ``None``: only count.
        device: whose memory it is about.
        files: page to files, in a folder below the system's temporary one; else to host memory. By default to files
            from the CPU, and to host memory from anywhere else.

    Attributes:
        held: bytes that paused forwards hold now.
        peak: the most that they have held, with what was fetched to be read.
        written: bytes paged out in all.
        folder: where the files are, if there are any.
    """

    supports_higher_order_operators = True

    def __init__(self, budget: int | None, device: torch.device, files: bool | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.budget, self.device = budget, device
        self.held = self.peak = self.written = 0
        self.folder: Path | None = None
        self._moved = 0
        """Bytes moved since memory was last given back."""
        self._files = device.type == "cpu" if files is None else files
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._pages: dict[int, _Page] = {}
        self._books: dict[Hashable, _Book] = {}
        self._paused: dict[_Book, None] = {}
        """Those of paused forwards, the last to pause at the end: it is also the last to be resumed."""
        self._running: _Book | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        try:
            for forward in self._books:  # those that have not been ended
                self.finished(forward)
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()
                self._temporary = self.folder = None

    def resumed(self, forward: Hashable) -> None:
        """A forward is about to run: fetch all that it holds."""
        book = self._books.setdefault(forward, _Book(len(self._books)))
        self._bring_back(book)
        self._running = book

    def paused(self, forward: Hashable) -> None:
        """A forward has paused; page out what exceeds the budget."""
        book, self._running = self._books[forward], None
        for page, storage in self._living(book):
            page.size = storage.nbytes()
            if not _movable(storage):
                self._forget(page)
        book.held = sum(page.size for page in book.pages)
        book.most = max(book.most, book.held)
        self._paused[book] = None
        self.held += book.held
        self.enforce_budget()
        self._trim()

    def finished(self, forward: Hashable) -> None:
        """A forward has ended: what is left of it belongs to whoever keeps it."""
        self._running = None
        if book := self._books.get(forward):
            self._bring_back(book)
            for page in list(book.pages):
                self._forget(page)
        self._trim()

    def peak_by_forward(self) -> dict[Hashable, int]:
        """Each forward that has run -> the most that it has held at any of its pauses."""
        return {forward: book.most for forward, book in self._books.items()}

    def fetch(self, *values: Any) -> None:
        """Fetch the tensors among arguments, which somebody is going to read."""
        with private_torch.no_torch_function():
            for tensor in _tensors(values):
                self._see(tensor, writes=False)

    def enforce_budget(self) -> None:
        """Page out what exceeds the budget, from the forward that is needed last."""
        for book in reversed(self._paused):
            if self.budget is None or self.held <= self.budget:
                break
            if book.held:
                self._page_out(book)
        self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = private_torch.is_operator(func)
        writes = not operator or private_torch.is_mutable(func)
        with private_torch.no_torch_function():
            tensors = list(_tensors((args, kwargs)))
            seen = [self._see(tensor, writes) for tensor in tensors]
        result = func(*args, **kwargs)
        # What comes out of an input whose storage is unknown, or out of other code, may be a view of something.
        if self._running is not None and operator and None not in seen:
            with private_torch.no_torch_function():
                known = {address for addresses in seen for address in addresses or ()}
                given = {id(tensor) for tensor in tensors}  # which may have been given another storage by now
                for tensor in _tensors(result):
                    if id(tensor) not in given:
                        self._take_down(tensor, known, self._running)
        return result

    def _see(self, tensor: Tensor, writes: bool) -> list[int] | None:
        """Fetch what a tensor holds; the addresses of its storages on the device, ``None`` if they are unknown."""
        if tensor.device.type != self.device.type:
            return []
        storages = _storages(tensor)
        if storages is None:
            return None
        addresses = [private_torch.address(storage) for storage in storages]
        for address in addresses:
            page = self._pages.get(address)
            if page is not None and page.book is not self._running:
                self._fetch([page])
                if writes or self._running is not None:
                    page.home = None  # what has been written is out of date, or soon may be
        return addresses

    def _take_down(self, tensor: Tensor, known: set[int], book: _Book) -> None:
        plain = tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
        if plain and tensor.device.type == self.device.type:
            for storage in _storages(tensor) or ():
                address = private_torch.address(storage)
                if address not in known and address not in self._pages and storage.nbytes():
                    self._pages[address] = page = _Page(storage, book)
                    book.pages[page] = None

    def _trim(self) -> None:
        """Have the C library give freed memory back, which glibc keeps where anything that lies behind it is in use."""
        if self._moved > 2**25 and self.device.type == "cpu":
            self._moved = 0
            return_freed_memory()

    def _living(self, book: _Book) -> list[tuple[_Page, UntypedStorage]]:
        """The pages of a forward that somebody still refers to, with their storages."""
        found = []
        for page in list(book.pages):
            storage = page.storage()
            if storage is None:
                self._forget(page)
            else:
                found.append((page, storage))
        return found

    def _forget(self, page: _Page) -> None:
        del self._pages[page.address], page.book.pages[page]
        if not page.out:
            self._count(page, -page.size)

    def _count(self, page: _Page, size: int) -> None:
        if page.book in self._paused:
            page.book.held += size
            self.held += size

    def _bring_back(self, book: _Book) -> None:
        """Fetch all that a forward holds, and forget where it was: it may now be changed in ways that nobody sees."""
        if book in self._paused:
            del self._paused[book]
            self.held -= book.held
        self._fetch([page for page, _ in self._living(book)])
        for page in book.pages:
            page.home = None
        if self.folder is not None:
            (self.folder / book.name).unlink(missing_ok=True)

    def _fetch(self, pages: Sequence[_Page]) -> None:
        """Fill storages of one forward."""
        out = [(page, storage) for page in pages if page.out and (storage := page.storage()) is not None]
        if out and self._files:
            assert self.folder is not None
            with open(self.folder / out[0][0].book.name, "rb") as file:
                for page, storage in out:
                    assert isinstance(page.home, int)
                    storage.resize_(page.size)
                    file.seek(page.home)
                    if file.readinto(_memory(storage)) != page.size:
                        raise OSError(f"{file.name} is shorter than what was written to it")
        else:
            with private_torch.no_torch_dispatch():
                for page, storage in out:
                    assert isinstance(page.home, UntypedStorage)
                    storage.resize_(page.size)
                    storage.copy_(page.home)
        for page, _ in out:
            page.out = False
            self._moved += page.size
            self._count(page, page.size)
        self.peak = max(self.peak, self.held)

    def _page_out(self, book: _Book) -> None:
        here = [(page, storage) for page, storage in self._living(book) if not page.out]
        fresh = [(page, storage) for page, storage in here if page.home is None]
        if fresh and self._files:
            self._write(book, fresh)
        elif fresh:
            self._copy(fresh)
        self.written += sum(page.size for page, _ in fresh)
        for page, storage in here:
            storage.resize_(0)
            page.out = True
            self._count(page, -page.size)
            self._moved += page.size

    def _write(self, book: _Book, pages: Sequence[tuple[_Page, UntypedStorage]]) -> None:
        if self.folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="com_lightning-")
            self.folder = Path(self._temporary.name)
        try:
            with open(self.folder / book.name, "ab") as file:
                places = []
                for _, storage in pages:
                    places.append(file.tell())
                    file.write(_memory(storage))
        except OSError as error:
            error.add_note(
                f"while paging activations out to {self.folder}; another folder can be given by the environment "
                "variable TMPDIR"
            )
            raise
        for (page, _), place in zip(pages, places):
            page.home = place

    def _copy(self, pages: Sequence[tuple[_Page, UntypedStorage]]) -> None:
        with private_torch.no_torch_dispatch():
            if self.device.type == "cuda":  # a forward may compute on several streams
                torch.cuda.synchronize(self.device)
            for page, storage in pages:
                host = _host_memory(page.size, pinned=self.device.type == "cuda")
                host.copy_(storage)
                page.home = host


class _Book:
    """What one forward holds.

    Attributes:
        held: bytes of it that are not paged out, while the forward is paused.
        most: the most that it has held at a pause, paged out or not.
    """

    def __init__(self, number: int) -> None:
        self.name, self.held, self.most = str(number), 0, 0
        self.pages: dict[_Page, None] = {}


class _Page:
    """A storage that a forward has made.

    Attributes:
        home: where its bytes have been written to, in the forward's file or on the host; ``None``: nowhere.
        out: whether they are only there.
        size: of the storage when its forward paused.
    """

    __slots__ = ("address", "book", "home", "out", "reference", "size")

    def __init__(self, storage: UntypedStorage, book: _Book) -> None:
        # As long as there is a weak reference, no other storage gets the address.
        self.address, self.reference, self.book = (
            private_torch.address(storage),
            private_torch.WeakStorage(storage),
            book,
        )
        self.home: int | UntypedStorage | None = None
        self.out, self.size = False, 0

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
    """The storages that hold a tensor's values. ``None`` if they are not known."""
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


def _movable(storage: UntypedStorage) -> bool:
    """Whether nobody relies on where a storage is: numpy makes it fixed."""
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _memory(storage: UntypedStorage) -> Any:
    """The bytes of a storage, to be read and written; numpy would make it fixed."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _host_memory(size: int, pinned: bool) -> UntypedStorage:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
    except RuntimeError:  # there is a limit to what can be pinned
        return torch.empty(size, dtype=torch.uint8).untyped_storage()
