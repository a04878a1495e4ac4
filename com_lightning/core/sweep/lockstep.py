"""Many forward passes run together, pausing wherever one enters a layer that is to be merged.

A chain of merges needs, for every layer, the inputs of that layer in the model merged *so far*. Running the model again
up to each layer costs time that grows with the square of the depth. Here every forward is a coroutine instead: it
pauses at the next layer, the caller merges that layer once all have arrived, and all go on from where they were. Every
forward runs exactly once, and any module that can be run can be merged: nothing is traced and no architecture is known.

The coroutines are greenlets. They share one operating-system thread, so they need no locks, an exception or Ctrl-C
surfaces in the caller as in ordinary code, and the thread-bound resources of PyTorch (OpenMP teams, cuBLAS workspaces)
exist once rather than once per forward. What PyTorch keeps per thread and per process (grad mode, autocast, default
dtype, random state, ...) is put back at every switch, see :class:`_Ambient`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from com_lightning.core.sweep.offload import Pager
from com_lightning.core.tensors import private_torch

Position = tuple[int, ...]
"""Where a layer stands in the order of layers."""

WaitingLayer = tuple[Position, str]
"""Place and name of a layer that forwards wait at."""


@dataclass(eq=False)
class Forward:
    """One forward pass to run in lockstep with others.

    Args:
        module: the module whose layers are watched. Give each forward a module object of its own (with shared
            tensors, see :func:`~com_lightning.core.tensors.modules.copy_module`). Otherwise the other forwards would
            overwrite what a module remembers between two of its layers.
        call: runs the pass; its result is dropped.
        label: how errors name this forward, e.g. ``"task 'mnist', batch 3, expert"``.
        seed: random state the forward starts from, so that two forwards with one seed draw the same numbers.
        on_output: called with the name and the output of each watched layer that is a module and at which this forward
            has paused. What it returns, if not ``None``, takes the place of the output.
    """

    module: nn.Module
    call: Callable[[], object]
    label: str = "forward"
    seed: int = 0
    on_output: Callable[[str, Any], Any] | None = None


@dataclass(eq=False)
class PausedCall:
    """A forward paused where it enters ``layer``, with the arguments that the layer is about to be called with."""

    forward: Forward
    layer: str
    place: Position
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Any:
        """The first argument of the layer."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


def lockstep(
    forwards: Sequence[Forward],
    layers: Sequence[str] | Mapping[str, Position],
    served: Collection[str] = (),
    choose_next: Callable[[WaitingLayer | None], WaitingLayer | None] = lambda mine: mine,
    pager: Pager | None = None,
) -> Generator[tuple[str, list[PausedCall]], None, None]:
    """Run all ``forwards`` together; yield each layer once, with everything that is waiting to enter it.

    Whatever the consumer does to the layer's parameters before it asks for the next item is what the paused forwards
    then compute with. When forwards wait at different layers (branches that depend on data), the layer that comes first
    in ``layers`` is yielded and the others wait on. A layer is yielded at most once: a second call of it in the same
    forward, or a forward that gets there late, runs through. A layer that no forward reaches is never yielded. What is
    no module can be a layer too: a forward pauses wherever it calls :func:`pause`.

    If a forward raises, all are ended and the exception surfaces as itself, with a note that names the forward and its
    last layer; the same holds for an exception in the consumer and for Ctrl-C.

    Args:
        forwards: the passes to run. Each is run exactly once.
        layers: names of submodules (as in ``named_modules``), in execution order; or the place of each in it.
        served: layers that are not to be yielded.
        choose_next: is given the layer that comes first here, and returns the layer to yield. For several processes
            that yield the same layers, also those that none of their own forwards reaches: then nothing has arrived.
        pager: entered by the caller; keeps what paused forwards hold within its budget.

    Yields:
        The name of a layer, and the forwards that wait there.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> passes = [Forward(net, lambda: net(torch.ones(1, 2))), Forward(net, lambda: net(torch.zeros(1, 2)))]
        >>> for layer, arrivals in lockstep(passes, ["0", "2"]):
        ...     print(layer, [tuple(a.input.shape) for a in arrivals])
        0 [(1, 2), (1, 2)]
        2 [(1, 2), (1, 2)]
    """
    places = layers if isinstance(layers, Mapping) else {name: (number,) for number, name in enumerate(layers)}
    served = set(served)
    coroutines: list[_Coroutine] = []
    try:
        for forward in forwards:
            coroutines.append(_Coroutine(forward, places, served, pager))
        for coroutine in coroutines:
            coroutine.advance()
        while chosen := choose_next(min((c.waiting_layer for c in coroutines if c.waiting_layer), default=None)):
            layer = chosen[1]
            ready = [c for c in coroutines if c.paused_call and c.paused_call.layer == layer]
            served.add(layer)
            yield layer, [c.paused_call for c in ready if c.paused_call]
            for coroutine in ready:
                coroutine.advance()
    finally:
        with ExitStack() as stack:  # all are closed, whatever one of them raises
            for coroutine in coroutines:
                stack.callback(coroutine.close)


def running() -> Forward | None:
    """The forward that is running, if this is called from within one."""
    current = getcurrent()
    return current.forward if isinstance(current, _Coroutine) else None


def pause(layer: str, place: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Pause the forward that is running as where it enters a watched layer. Returns whether it has paused."""
    current = getcurrent()
    return isinstance(current, _Coroutine) and current.pause(layer, place, args, kwargs)


class _Coroutine(greenlet):
    """A forward as a greenlet that switches back to the scheduler at each watched layer."""

    def __init__(
        self, forward: Forward, places: Mapping[str, Position], served: set[str], pager: Pager | None = None
    ) -> None:
        super().__init__(self._work)
        self.forward, self._pager = forward, pager
        self.paused_call: PausedCall | None = None
        self._served = served
        self._closing = False
        self._last_layer: str | None = None
        self._inside_of: str | None = None
        self._outside = _Ambient.now()
        self._inside = self._outside.seeded(forward.seed)
        self._hooks = []
        for name, layer in forward.module.named_modules():
            if name in places:
                self._hooks.append(
                    layer.register_forward_pre_hook(self._entering(name, places[name]), with_kwargs=True)
                )
                if forward.on_output is not None:
                    self._hooks.append(layer.register_forward_hook(self._leaving(name)))

    @property
    def waiting_layer(self) -> WaitingLayer | None:
        return None if self.paused_call is None else (self.paused_call.place, self.paused_call.layer)

    def advance(self) -> None:
        """Run to the next watched layer, or to the end. Called by the scheduler."""
        self.paused_call = None
        self._outside = _Ambient.now()
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
        """End the forward wherever it is; its context managers and ``finally`` clauses run."""
        self._closing = True
        # A forward may swallow the exit with a bare `except:`; it is raised again at each layer it then enters.
        for _ in range(len(self._hooks) + 1):
            if not self:  # never started, or finished
                break
            self._outside = _Ambient.now()
            self.throw(GreenletExit)
        for hook in self._hooks:
            hook.remove()
        self.paused_call = None
        if self._pager is not None:  # last, for it may fail
            self._pager.finished(self.forward)

    def _work(self) -> None:
        self._inside.enter()
        try:
            self.forward.call()
        finally:
            self._outside.enter()

    def pause(self, layer: str, place: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Wait before a layer until the scheduler has served it; run through if it has already."""
        if getcurrent() is not self or layer in self._served:
            return False
        if private_torch.inside_transform():  # within vmap and the like nothing can be switched
            return False
        if self._closing:
            raise GreenletExit
        self.paused_call = PausedCall(self.forward, layer, place, args, kwargs)
        inside = _Ambient.now()
        # Inference mode can only be changed by a guard, which on leaving puts back all that it found.
        with torch.inference_mode(self._outside.inference):
            self._outside.enter()
            assert self.parent is not None
            self.parent.switch()
        inside.enter()
        self._last_layer = layer
        return True

    def _entering(self, name: str, place: Position) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.pause(name, place, args, kwargs):
                self._inside_of = name

        return hook

    def _leaving(self, name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if getcurrent() is not self or name != self._inside_of or self.forward.on_output is None:
                return None
            self._inside_of = None  # a second call of the layer is not reported
            return self.forward.on_output(name, output)

        return hook


@dataclass(frozen=True)
class _Ambient:
    """The state that PyTorch keeps per thread or process and that a forward may be in the middle of changing."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    default_dtype: torch.dtype
    device_index: int | None
    stream: torch.cuda.Stream | None
    random: Tensor
    device_random: Tensor | None
    attention: tuple[bool, ...]
    modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]

    @staticmethod
    def now() -> _Ambient:
        accelerator = _accelerator()
        kinds = ("cpu",) if accelerator is None else ("cpu", accelerator)
        return _Ambient(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
            autocast_cache=torch.is_autocast_cache_enabled(),
            default_dtype=torch.get_default_dtype(),
            device_index=torch.cuda.current_device() if accelerator == "cuda" else None,
            stream=torch.cuda.current_stream() if accelerator == "cuda" else None,
            random=torch.get_rng_state(),
            device_random=torch.cuda.get_rng_state() if accelerator == "cuda" else None,
            modes=private_torch.function_modes(),
            dispatch_modes=private_torch.dispatch_modes(),
            attention=tuple(enabled() for enabled, _ in _ATTENTION_KERNELS),  # type: ignore[no-untyped-call]
        )

    def seeded(self, seed: int) -> _Ambient:
        """The same state with the random state that ``torch.manual_seed(seed)`` gives."""
        random = torch.Generator().manual_seed(seed).get_state()
        device_random = self.device_random
        if device_random is not None:
            device_random = torch.Generator("cuda").manual_seed(seed).get_state()
        return replace(self, random=random, device_random=device_random)

    def enter(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_default_dtype(self.default_dtype)
        if self.device_index is not None:
            torch.cuda.set_device(self.device_index)
        if self.stream is not None and (other := torch.cuda.current_stream()) != self.stream:
            self.stream.wait_stream(other)  # what is about to be read was made there
            torch.cuda.set_stream(self.stream)
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            torch.cuda.set_rng_state(self.device_random)
        for on, (_, enable) in zip(self.attention, _ATTENTION_KERNELS):
            enable(on)
        # `with torch.device(...)` and its like; within the function that a mode is looking at, it is set aside.
        private_torch.set_function_modes(self.modes)
        private_torch.set_dispatch_modes(self.dispatch_modes)


# Which kernels scaled_dot_product_attention may use: what `torch.nn.attention.sdpa_kernel` sets, on CPUs too.
_ATTENTION_KERNELS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _accelerator() -> str | None:
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "cuda" if started else None
