"""Record what a newcomer sees: ``python docs/transcript.py SOURCE``, which writes ``docs/transcript.md``.

SOURCE is what is cloned, a folder or an address. All is done in an empty folder that is deleted afterwards, and which
takes 7 GB: the clone, ``make demo`` with a new virtual environment, then the files and commands of ``tutorial.md``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOISE = re.compile(
    r"\d+%\||\bit/s|\dit \[|━━|💡 Tip|(GPU|TPU|HPU) available: |is deprecated|[Ss]eed set to|Checkpoint directory"
    r"|stopped: `max_"
)
"""Progress bars, and what Lightning says of the machine, of itself and of other products."""
MOST = 60
"""Lines of one output that are shown; of longer ones the first few and the last."""
ABOUT = """\
# A stranger's path, as recorded

From a clone to a merged model of a project of one's own, loaded in a fresh process: every command, the seconds it took,
and what it printed, without progress bars and what Lightning says of the machine and of itself. The project is that of
[five minutes](tutorial.md).
Recorded by `python docs/transcript.py` {when}, on {where}.
"""


def shown(output: str, home: str) -> str:
    """What a terminal shows in the end, without noise, colours and where things are."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace(home, "~")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if not NOISE.search(line)]
    lines = re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()).split("\n")
    if len(lines) > MOST:
        lines = [*lines[: MOST // 3], f"[... {len(lines) - MOST} lines ...]", *lines[-(MOST - MOST // 3) :]]
    return "\n".join(lines)


def run(command: str, folder: Path, home: str) -> tuple[str, float]:
    """A command in a shell that has the clone's environment, once that is made: what is shown, and seconds."""
    programs = f"{home}/com_lightning/.venv/bin:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "VENV", "MAKEFLAGS")}
    environment.update(PATH=programs, HOME=home, PIP_NO_INPUT="1")
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    print(f"{seconds:7.1f} s  {command.splitlines()[0]}", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return shown(done.stdout, home), seconds


def record(source: str) -> str:
    """The page."""
    told, total = [], 0.0
    with tempfile.TemporaryDirectory() as home:
        steps: list[tuple[str, str, str]] = [
            ("clone", "bash", f"git clone --quiet {source} com_lightning"),
            ("demo", "bash", "cd com_lightning && make demo"),
        ]
        steps += [("own", *block) for block in BLOCK.findall(PAGE.read_text()) if block[0] != "text"]
        own = Path(home) / "my_project"
        own.mkdir()
        for part, language, block in steps:
            if name := re.match(r"# (\S+\.\w+)\n", block):
                (own / name[1]).write_text(block)
                told.append(f"`{name[1]}`, {len(block.splitlines())} lines, is written as on [that page](tutorial.md).")
                continue
            assert language == "bash"
            output, seconds = run(block, own if part == "own" else Path(home), home)
            total += seconds
            command = block.strip().replace(source, "https://.../com_lightning.git")
            told.append(f"```bash\n{command}  # {seconds:.0f} s\n```")
            if output:
                told.append(f"```text\n{output}\n```")
    where = f"{platform.machine()}, {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"
    about = ABOUT.format(when=f"on {time.strftime('%Y-%m-%d')}", where=where)
    return "\n\n".join([about.strip(), *told, f"In all {total / 60:.1f} minutes."]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    Path(__file__).with_name("transcript.md").write_text(record(sys.argv[1]))
