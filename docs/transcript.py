"""Record what a newcomer sees: ``python docs/transcript.py SOURCE`` writes ``docs/transcript.md``.

SOURCE is the folder or address to clone. The script works in an empty folder, which takes 7 GB and is deleted at the
end. It clones, runs ``make demo`` with a new virtual environment, then the files and commands of ``tutorial.md``, those
of the example of an existing project with a stock LightningCLI, and the notebook.
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
EXISTING = Path(__file__).parents[1] / "examples" / "existing_project" / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOISE = re.compile(
    r"\d+%\||\bit/s|\dit \[|━━|^└─|💡 Tip|(GPU|TPU|HPU) available: |is deprecated|[Ss]eed set to|Checkpoint directory"
    r"|stopped: `max_"
)
"""Progress bars, and messages of Lightning about the machine, about itself and about other products."""
MAX_LINES = 60
"""Lines of one output to show. Longer outputs are shortened in the middle."""
ABOUT = """\
# A recorded run

This page records the way from a clone to a merged model of your own project, loaded in a fresh process. It shows every
command, the seconds it took, and what it printed, without progress bars and messages of Lightning about itself and the
machine. The first project is that of [five minutes](tutorial.md), the second one is [an existing
project](../examples/existing_project/README.md) with a stock LightningCLI.
Recorded by `python docs/transcript.py` {when}, on {where}.
"""


def shown(output: str, home: str) -> str:
    """What a terminal shows in the end, without noise, colours and the path of the folder."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace(home, "~")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if not NOISE.search(line)]
    lines = re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()).split("\n")
    if len(lines) > MAX_LINES:
        start = MAX_LINES // 3
        lines = [*lines[:start], f"[... {len(lines) - MAX_LINES} lines ...]", *lines[start - MAX_LINES :]]
    return "\n".join(lines)


def run(command: str, folder: Path, home: str) -> tuple[str, float]:
    """Run a command in a shell with the clone's environment, if it exists: what is shown, and the seconds."""
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
    """The text of the page."""
    page, total = [], 0.0
    with tempfile.TemporaryDirectory() as home:
        clone, project = Path(home) / "com_lightning", Path(home) / "my_project"
        project.mkdir()
        steps: list[tuple[Path, str, str]] = [
            (Path(home), "bash", f"git clone --quiet {source} com_lightning"),
            (clone, "bash", "make demo"),
            *((project, *block) for block in BLOCK.findall(PAGE.read_text())),
            *((clone, *block) for block in BLOCK.findall(EXISTING.read_text())),
            (clone, "bash", "python -m examples.notebook.build"),
        ]
        before = Path(home)
        for folder, language, block in steps:
            if language in ("text", "diff"):
                continue
            if name := re.match(r"# (\S+\.\w+)\n", block):
                (folder / name[1]).write_text(block)
                page.append(f"`{name[1]}`, {len(block.splitlines())} lines: see [that page](tutorial.md).")
                continue
            assert language == "bash", block
            output, seconds = run(block, folder, home)
            total += seconds
            command = block.strip().replace(source, "https://.../com_lightning.git")
            if folder != before:
                command = f"cd ~/{folder.name}\n{command}"
            before = folder
            lines = f", {len(output.splitlines())} lines" if output else ""
            page.append(f"```bash\n{command}  # {seconds:.0f} s{lines}\n```")
            if output:
                page.append(f"```text\n{output}\n```")
    where = f"{platform.machine()}, {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"
    about = ABOUT.format(when=f"on {time.strftime('%Y-%m-%d')}", where=where)
    return "\n\n".join([about.strip(), *page, f"In all {total / 60:.1f} minutes."]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    Path(__file__).with_name("transcript.md").write_text(record(sys.argv[1]))
