"""The wheel, and that what `pyproject.toml` declares is all that it takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

MERGE = """
import sys, tempfile, torch, lightning as L
from pathlib import Path
from torch.utils.data import DataLoader
from com_lightning import ChainOfMergesCallback, MergeDataModule

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_net()
    def validation_step(self, batch, batch_idx):
        out = self.net(batch)
        self.log("val_loss", getattr(out, "logits", out).square().mean())

class Data(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(make_data(), batch_size=4)

folder = Path(tempfile.mkdtemp(dir=".")) / "merged"
base = Model()
experts = {}
for task in ("a", "b"):
    experts[task] = Model()
    experts[task].load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in experts[task].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
merger = ChainOfMergesCallback(experts=experts, output_dir=str(folder))
trainer = L.Trainer(callbacks=[merger], accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.validate(base, datamodule=MergeDataModule({"a": Data(), "b": Data()}))
assert (folder / "merged.safetensors").exists()
"""

USES = {
    "": """
def make_net():
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
def make_data():
    return torch.randn(8, 3)
{merge}
from com_lightning.cli import main
for arguments in (["merge", "--help"], ["compare", "--help"], ["inspect", "--help"],
                  ["configs"], ["merge", "--config", "ties", "--print_config"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, end.code
assert not (folder / "report.png").exists()
""",
    "plots": """
def make_net():
    return torch.nn.Linear(3, 5)
def make_data():
    return torch.randn(8, 3)
{merge}
assert (folder / "report.png").exists()
""",
    "vision": """
import torchvision
def make_net():
    return torchvision.models.squeezenet1_1()
def make_data():
    return torch.randn(8, 3, 32, 32)
{merge}
""",
    "text": """
import transformers
def make_net():
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, **size))
def make_data():
    return torch.randint(9, (8, 5))
{merge}
assert (folder / "transformers").exists()
""",
    "lora": """
import peft
def make_net():
    net = torch.nn.Sequential(torch.nn.Linear(3, 5))
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
def make_data():
    return torch.randn(8, 3)
{merge}
""",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("com_lightning", "configs", "examples", "tests/helpers"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]  # from the sdist
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "com_lightning").rglob("*.py")}
    inside = {name for name in names if ".dist-info/" not in name}
    configs = {f"com_lightning/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert inside == sources | configs | {"com_lightning/py.typed"}
    assert any(name.endswith("LICENSE") for name in names)


def test_an_editable_install_is_a_path_that_type_checkers_see(source: Path, tmp_path: Path) -> None:
    """They do not run import hooks."""
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (inside,) = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert inside.endswith(".pth")
        assert archive.read(inside).decode().split() == [str(source)]


def needed(requirements: list[str], extras: set[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names of the installed distributions that requirements lead to."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in {"", *requirement.extras}} - seen
        if not new:
            continue
        seen |= new
        try:
            own = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is required, and is not installed")
        assert requirement.specifier.contains(own.version, prereleases=True), (str(requirement), own.version)
        yield name
        yield from needed(own.requires or [], set(requirement.extras), seen)


@pytest.mark.parametrize("extra", USES)
def test_nothing_but_what_is_declared(extra: str, wheel: Path, tmp_path: Path) -> None:
    """A merge in an environment that holds what the wheel asks for, and nothing else."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (metadata,) = site.glob("*.dist-info/METADATA")
    declared = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    names = set(needed(declared, {extra}, set()))
    assert ("transformers" in names) is (extra in {"text", "lora"})
    assert ("matplotlib" in names) is (extra == "plots")
    for name in names:
        own = distribution(name)
        for file in own.files or []:
            top = file.parts[0]
            if top not in {"..", "/"} and not (site / top).exists():
                (site / top).symlink_to(Path(str(own.locate_file(top))))
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(site)!r})\nimport torch\n" + USES[extra].format(merge=MERGE)
    )
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-S", "-I", str(script)]  # neither the environment's packages nor the user's
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
