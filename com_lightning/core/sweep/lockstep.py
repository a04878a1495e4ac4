"""Runs many forward passes together. Each pauses where it enters a layer that is to be merged.

A chain of merges needs, for every layer, the inputs of that layer in the model merged *so far*. Running the model again
up to each layer would take time that grows with the square of the depth. Here every forward is a coroutine instead. It
pauses at the next layer. Once all forwards have arrived, the caller merges the layer, and they go on from where they
were. Each forward runs exactly once. Any module that can run can be merged, because nothing is traced and nothing
depends on the architecture.

The coroutines are greenlets. They share one operating-system thread. So they need no locks, an exception or Ctrl-C
reaches the caller as in ordinary code, and PyTorch's resources of a thread (OpenMP teams, cuBLAS workspaces) exist once
rather than once per forward. PyTorch's state of a thread or process (grad mode, autocast, default dtype, random state,
...) is saved and restored at every switch, see :class:`_TorchState`.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from com_lightning.core.sweep.offload import Pager
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.allocator import ScatteredMemory

Position = tuple[int, ...]
"""Position of a layer in the execution order. Positions are compared as tuples."""

WaitingLayer = tuple[Position, str]
"""Position and name of a layer that forwards wait at."""

ChooseNext = Callable[[WaitingLayer | None], WaitingLayer | None]
"""Gets the first layer that forwards of this process wait at, and returns the layer to visit next."""


@dataclass(eq=False)
class Forward:
    """One forward pass to run in lockstep with others.

    Args:
        module: the module whose layers are watched. Each forward needs its own module object (with shared tensors, see
            :func:`~com_lightning.core.tensors.modules.copy_module`). Otherwise forwards would overwrite what a module
            stores between two of its layers.
        call: runs the pass. Its result is ignored.
        label: the name of this forward in error messages, e.g. ``"task 'mnist', batch 3, expert"``.
        seed: seed of the random state. Forwards with the same seed draw the same numbers.
        on_output: called with name and output of each watched layer that is a module and at which this forward has
            paused. If it returns something other than ``None``, that replaces the output.
        calls: name of each layer -> how often this forward has called it so far.
        paused_at: the layers at which it has paused.
    """

    module: nn.Module
    call: Callable[[], object]
    label: str = "forward"
    seed: int = 0
    on_output: Callable[[str, Any], Any] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    paused_at: set[str] = field(default_factory=set)


@dataclass(eq=False)
class PausedCall:
    """A forward that is paused where it calls ``layer``, and the arguments of that call."""

    forward: Forward
    layer: str
    position: Position
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Any:
        """The first argument of the layer."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


def lockstep(
    forwards: Sequence[Forward],
    layers: Sequence[str] | Mapping[str, Position],
    visited: Collection[str] = (),
    choose_next: ChooseNext = lambda waiting: waiting,
    pager: Pager | None = None,
) -> Generator[tuple[str, list[PausedCall]], None, None]:
    """Run all ``forwards`` together. Yield each layer once, with all forwards that are paused at it.

    The consumer may change the layer's parameters before it requests the next item. The paused forwards then compute
    with the changed parameters. When forwards wait at different layers (if branches depend on data), the layer with the
    first position is yielded and the others wait. A layer is yielded at most once: a second call of it in the same
    forward, or a forward that arrives late, does not pause. A layer that no forward reaches is not yielded. A layer
    need not be a module: a forward also pauses where it calls :func:`pause`.

    If a forward raises an exception, all forwards are ended. The exception reaches the consumer with a note that names
    the forward and its last layer. All forwards are also ended by an exception in the consumer and by Ctrl-C.

    Args:
        forwards: the passes to run. Each runs exactly once.
        layers: names of submodules (as in ``named_modules``) in execution order, or a dictionary with their positions.
        visited: layers that are not yielded.
        choose_next: chooses the layer to yield. With several processes, it makes all of them yield the same layers. If
            none of this process's forwards waits at a layer, the layer is yielded without paused calls.
        pager: keeps the memory of paused forwards within its budget. The caller must have entered it.

    Yields:
        The name of a layer, and the calls of it at which forwards are paused.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> passes = [Forward(net, lambda: net(torch.ones(1, 2))), Forward(net, lambda: net(torch.zeros(1, 2)))]
        >>> for layer, calls in lockstep(passes, ["0", "2"]):
        ...     print(layer, [tuple(call.input.shape) for call in calls])
        0 [(1, 2), (1, 2)]
        2 [(1, 2), (1, 2)]
    """
    positions = layers if isinstance(layers, Mapping) else {name: (number,) for number, name in enumerate(layers)}
    visited = set(visited)
    coroutines, scattered = list[_Coroutine](), ScatteredMemory()
    try:
        for forward in forwards:
            coroutines.append(_Coroutine(forward, positions, visited, pager))
        for coroutine in coroutines:
            coroutine.advance()
            scattered.tidy()
        while chosen := choose_next(min((c.waiting_layer for c in coroutines if c.waiting_layer), default=None)):
            layer = chosen[1]
            ready = [c for c in coroutines if c.paused_call and c.paused_call.layer == layer]
            visited.add(layer)
            yield layer, [c.paused_call for c in ready if c.paused_call]
            for coroutine in ready:
                coroutine.advance()
                scattered.tidy()
    finally:
        with ExitStack() as stack:  # close all of them, even if one raises
            for coroutine in coroutines:
                stack.callback(coroutine.close)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run something outside of the lockstep as a forward runs: without gradients, with random numbers of a seed.

    Args:
        seed: the seed. A forward with it draws the same numbers.
    """
    with torch.inference_mode(False), torch.no_grad():
        before = _TorchState.current()
        before.seeded(seed).restore()
        try:
            yield
        finally:
            before.restore()


def running() -> Forward | None:
    """The forward that this is called from, or ``None``."""
    current = getcurrent()
    return current.forward if isinstance(current, _Coroutine) else None


def pause(layer: str, position: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Pause the running forward, as if it called a watched layer. Returns whether it has paused."""
    current = getcurrent()
    return isinstance(current, _Coroutine) and current.pause(layer, position, args, kwargs)


class _Coroutine(greenlet):
    """A forward as a greenlet. It switches to the scheduler at each watched layer."""

    def __init__(
        self, forward: Forward, positions: Mapping[str, Position], visited: set[str], pager: Pager | None = None
    ) -> None:
        super().__init__(self._run_forward)
        self.forward, self._pager = forward, pager
        self.paused_call: PausedCall | None = None
        self._visited = visited
        self._closing = False
        self._last_layer: str | None = None
        self._paused_at: str | None = None
        self._scheduler_state = _TorchState.current()
        self._own_state = self._scheduler_state.seeded(forward.seed)
        self._hooks = []
        for name, layer in forward.module.named_modules():
            if name in positions:
                self._hooks.append(
                    layer.register_forward_pre_hook(self._entering(name, positions[name]), with_kwargs=True)
                )
                if forward.on_output is not None:
                    self._hooks.append(layer.register_forward_hook(self._leaving(name)))

    @property
    def waiting_layer(self) -> WaitingLayer | None:
        return None if self.paused_call is None else (self.paused_call.position, self.paused_call.layer)

    def advance(self) -> None:
        """Run to the next watched layer, or to the end. The scheduler calls this."""
        self.paused_call = None
        self._scheduler_state = _TorchState.current()
        try:
            if self._pager is not None:
                self._pager.resumed(self.forward)
            self.switch()
            if self._pager is not None and self:
                self._pager.paused(self.forward)
        except BaseException as error:
            where = f"after layer '{self._last_layer}'" if self._last_layer else "before the first layer"
            error.add_note(f"raised in the calibration forward of {self.forward.label}, {where}")
            raise
        if self._pager is not None and not self:
            self._pager.finished(self.forward)

    def close(self) -> None:
        """End the forward where it is paused. Its context managers and ``finally`` clauses run."""
        self._closing = True
        # A forward may catch the exit with a bare `except:`. It is raised again at each layer that it then enters.
        for _ in range(len(self._hooks) + 1):
            if not self:  # never started, or finished
                break
            self._scheduler_state = _TorchState.current()
            self.throw(GreenletExit)
        for hook in self._hooks:
            hook.remove()
        self.paused_call = None
        if self._pager is not None:  # last, because it may raise
            self._pager.finished(self.forward)

    def _run_forward(self) -> None:
        self._own_state.restore()
        try:
            self.forward.call()
        finally:
            self._scheduler_state.restore()

    def pause(self, layer: str, position: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Pause before a layer until the scheduler has visited it. Returns whether the forward has paused."""
        if getcurrent() is not self or layer in self._visited:
            return False
        if private_torch.inside_transform():  # no switch is possible within vmap and the like
            return False
        if self._closing:
            raise GreenletExit
        self.paused_call = PausedCall(self.forward, layer, position, args, kwargs)
        forward_state = _TorchState.current()
        # Only a context manager can change inference mode, and it restores the previous state when it is left.
        with torch.inference_mode(self._scheduler_state.inference):
            self._scheduler_state.restore()
            assert self.parent is not None
            self.parent.switch()
        forward_state.restore()
        self._last_layer = layer
        self.forward.paused_at.add(layer)
        return True

    def _entering(self, name: str, position: Position) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getcurrent() is self:
                self.forward.calls[name] += 1
            if self.pause(name, position, args, kwargs):
                self._paused_at = name

        return hook

    def _leaving(self, name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if getcurrent() is not self or name != self._paused_at or self.forward.on_output is None:
                return None
            self._paused_at = None  # a second call of the layer is not reported
            return self.forward.on_output(name, output)

        return hook


@dataclass(frozen=True)
class _TorchState:
    """PyTorch's state of the thread or process. Each forward may change it for itself, as context managers do."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    default_dtype: torch.dtype
    device_index: int | None
    stream: torch.cuda.Stream | None
    random: Tensor
    device_random: Tensor | None
    python_random: Any
    numpy_random: Any
    attention: tuple[bool, ...]
    modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]

    @staticmethod
    def current() -> _TorchState:
        accelerator = _accelerator()
        devices = ("cpu",) if accelerator is None else ("cpu", accelerator)
        return _TorchState(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in devices),
            autocast_cache=torch.is_autocast_cache_enabled(),
            default_dtype=torch.get_default_dtype(),
            device_index=torch.cuda.current_device() if accelerator == "cuda" else None,
            stream=torch.cuda.current_stream() if accelerator == "cuda" else None,
            random=torch.get_rng_state(),
            device_random=torch.cuda.get_rng_state() if accelerator == "cuda" else None,
            python_random=random.getstate(),
            numpy_random=None if (numpy := _numpy()) is None else numpy.random.get_state(),
            modes=private_torch.function_modes(),
            dispatch_modes=private_torch.dispatch_modes(),
            attention=tuple(enabled() for enabled, _ in _ATTENTION_KERNELS),  # type: ignore[no-untyped-call]
        )

    def seeded(self, seed: int) -> _TorchState:
        """The same state, with random states that this seed gives, in PyTorch, numpy and Python."""
        device_random = self.device_random
        if device_random is not None:
            device_random = torch.Generator("cuda").manual_seed(seed).get_state()
        return replace(
            self,
            random=torch.Generator().manual_seed(seed).get_state(),
            device_random=device_random,
            python_random=random.Random(seed).getstate(),
            numpy_random=None if (numpy := _numpy()) is None else numpy.random.RandomState(seed).get_state(),
        )

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_default_dtype(self.default_dtype)
        if self.device_index is not None:
            torch.cuda.set_device(self.device_index)
        if self.stream is not None and (other := torch.cuda.current_stream()) != self.stream:
            self.stream.wait_stream(other)  # it computes tensors that are about to be read
            torch.cuda.set_stream(self.stream)
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            torch.cuda.set_rng_state(self.device_random)
        random.setstate(self.python_random)
        if self.numpy_random is not None:
            numpy = _numpy()
            assert numpy is not None
            numpy.random.set_state(self.numpy_random)
        for is_on, (_, enable) in zip(self.attention, _ATTENTION_KERNELS):
            enable(is_on)
        # Modes such as `with torch.device(...)`. PyTorch takes a mode off this stack while it handles a function.
        private_torch.set_function_modes(self.modes)
        private_torch.set_dispatch_modes(self.dispatch_modes)


# The kernels that scaled_dot_product_attention may use. `torch.nn.attention.sdpa_kernel` sets them, on CPUs too.
_ATTENTION_KERNELS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _numpy() -> Any:
    """numpy, if anything has imported it."""
    return sys.modules.get("numpy")


def _accelerator() -> str | None:
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "cuda" if started else None
