"""Packages as data: the right one or none."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from hf_ema_scaling.data.packages import PackageError, fetch_package

SHA256 = "0" * 64


def wheel(folder: Path) -> Path:
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/rows.txt", "a\n")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    return path


def test_only_the_file_with_the_hash_is_used(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fetch_package("some-data==1.0", right, path, option="--wheel") == path.read_bytes()
    with pytest.raises(PackageError, match=rf"some_data-1.0.*whl is not the package with sha256 {SHA256}: nothing of"):
        fetch_package("some-data==1.0", SHA256, path, option="--wheel")


def test_pip_fetches_what_has_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fetch_package("some-data==1.0", right, option="--wheel") == path.read_bytes()
    with pytest.raises(PackageError, match=r"cannot fetch some-data==1\.0: fetch its wheel and give --wheel"):
        fetch_package("some-data==1.0", SHA256, option="--wheel")
    with pytest.raises(PackageError, match=r"cannot fetch some-data==1\.0: fetch its source package and give --sdist"):
        fetch_package("some-data==1.0", right, option="--sdist", source=True)
