"""Progress of a merge, drawn with what the trainer draws with: rich, tqdm, or nothing.

Two libraries that draw on one terminal overwrite each other. So a bar goes where the trainer's progress bar goes. While
bars are drawn, messages of anybody (prints, warnings, loggers) go above them. Nothing is drawn into a file: there a
stage that takes long says in a plain line how far it is.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm
from tqdm.std import tqdm as tqdm_of_terminals

from com_lightning.core.sweep.context import Advance, Progress, no_progress

SECONDS_BETWEEN_LINES = 60.0
"""How often a stage says how far it is where no bar can be drawn."""
IN_NOTEBOOK = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
"""Whether tqdm draws with widgets."""


@contextmanager
def drawn(trainer: Trainer | None) -> Iterator[Progress]:
    """Draw what happens within as the trainer does.

    Args:
        trainer: the trainer. If its progress bar is off, nothing is drawn. ``None``: there is none, and tqdm draws.

    Yields:
        What draws the progress of a stage.
    """
    bar = trainer.progress_bar_callback if trainer else None
    if trainer and (bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", False)):
        yield no_progress
        return
    with ExitStack() as stack:
        if isinstance(bar, RichProgressBar):
            assert trainer is not None
            yield stack.enter_context(_with_rich(bar, trainer))
        elif IN_NOTEBOOK:
            yield partial(_with_tqdm, sys.stdout)
        elif sys.stdout.isatty():
            yield stack.enter_context(_above_tqdm())
        else:
            yield _with_lines


def print_below(trainer: Trainer, text: str) -> None:
    """Print a text below the trainer's bars, as they were at last.

    Args:
        trainer: the trainer, which draws nothing any more.
        text: the text.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()
    print(text)


@contextmanager
def _with_rich(bar: RichProgressBar, trainer: Trainer) -> Iterator[Progress]:
    """Draw with rich: in the trainer's own display while that is live, since rich allows one at a time."""
    from rich.console import Console
    from rich.progress import Progress as Display

    with ExitStack() as stack:
        stack.enter_context(_loggers_follow())  # rich leads stdout and stderr above its bars
        if bar.progress is not None and bar.progress.live.is_started:
            display: Display = bar.progress
        else:
            # Not rich's common console, on which a trainer that failed may have left a display.
            display = Display(*bar.configure_columns(trainer), console=Console(), transient=True)
        if not (display.console.is_terminal or display.console.is_jupyter):
            yield _with_lines
            return
        if display is not bar.progress:
            stack.enter_context(display)

        @contextmanager
        def stage(what: str, steps: int) -> Iterator[Advance]:
            task = display.add_task(what, total=steps)
            display.refresh()  # a stage that is over before the next refresh by itself is seen, too

            def advance(step: str) -> None:
                display.advance(task)
                display.refresh()

            try:
                yield advance
            finally:
                display.update(task, visible=False)  # Lightning counts on numbers that removing a task would shift
                display.refresh()

        yield stage


@contextmanager
def _above_tqdm() -> Iterator[Progress]:
    """Draw with tqdm, and let everything else that is written go above the bars."""
    streams = sys.stdout, sys.stderr
    with _loggers_follow():
        above = [_AboveBars(stream, streams[0]) for stream in streams]
        sys.stdout, sys.stderr = above
        try:
            yield partial(_with_tqdm, streams[0])
        finally:
            sys.stdout, sys.stderr = streams
            for stream in above:
                stream.write_rest()


@contextmanager
def _with_tqdm(file: TextIO, what: str, steps: int) -> Iterator[Advance]:
    with tqdm(total=steps, desc=what, file=file, leave=False, dynamic_ncols=True) as bar:

        def advance(step: str) -> None:
            bar.set_postfix_str(step, refresh=False)
            bar.update()

        yield advance


@contextmanager
def _with_lines(what: str, steps: int) -> Iterator[Advance]:
    done, last = 0, time.monotonic()

    def advance(step: str) -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{what}: {done} of {steps}", file=sys.stderr, flush=True)

    yield advance


class _AboveBars:
    """A stream whose lines go above the bars of tqdm. Bars of others, which move the cursor, go through as they are.

    Args:
        file: the stream.
        bars: the stream that bars are drawn on.
    """

    def __init__(self, file: TextIO, bars: TextIO) -> None:
        self._file, self._bars, self._rest = file, bars, ""

    def write(self, text: str) -> int:
        lines, end, rest = (self._rest + text).rpartition("\n")
        if "\r" in text or "\x1b[A" in text:
            self._file.write(self._rest + text)
            self._rest = ""
        elif end:
            with tqdm_of_terminals.external_write_mode(self._bars):
                self._file.write(lines + end)
            self._rest = rest
        else:
            self._rest = rest
        return len(text)

    def write_rest(self) -> None:
        """Write a line that has no end."""
        self._file.write(self._rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Current:
    """Standard output or error, whatever it is at the time of writing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)


@contextmanager
def _loggers_follow() -> Iterator[None]:
    """Let loggers write to where ``sys.stdout`` and ``sys.stderr`` lead: their handlers keep the stream they had."""
    names: dict[int, str] = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        names[id(stream)] = names[id(getattr(stream, "rich_proxied_file", stream))] = name
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    changed: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in names:
            changed.append((handler, handler.setStream(_Current(names[id(handler.stream)]))))
    try:
        yield
    finally:
        for handler, stream in changed:
            handler.setStream(stream)
