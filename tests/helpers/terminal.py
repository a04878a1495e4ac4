"""A terminal: what is written to it, and what it shows in the end."""

from __future__ import annotations

import os
import re
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


@dataclass
class Terminal:
    """What was written to a terminal so far."""

    written: str = ""

    def lines(self) -> list[str]:
        """All lines that were ever scrolled past or are on the screen, as they look in the end."""
        lines, row, column = [""], 0, 0
        for parameters, code, carriage_return, line_feed, text in _CODE.findall(self.written):
            number = int(parameters) if parameters.isdigit() else 1
            if carriage_return:
                column = 0
            elif line_feed:  # the terminal driver writes a carriage return before it
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif code == "A":
                row = max(row - number, 0)
            elif code == "K":
                lines[row] = "" if parameters == "2" else lines[row][:column]
            elif text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in "\n".join(lines).rstrip().split("\n")]


def open_terminal(width: int = 100) -> tuple[int, int]:
    """The two ends of a terminal of this width: what shows it, and what programs write to."""
    ends = os.openpty()
    termios.tcsetwinsize(ends[1], (40, width))
    return ends


@contextmanager
def terminal(patch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Within it, standard output and error are a terminal. What was written is known after it."""
    shown, (master, slave) = Terminal(), open_terminal()
    patch.setenv("TERM", "xterm-256color")
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # the other end was closed
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as file, patch.context() as streams:
        streams.setattr(sys, "stdout", file)
        streams.setattr(sys, "stderr", file)
        yield shown
    reader.join(10)
    os.close(master)
    shown.written = b"".join(chunks).decode()
