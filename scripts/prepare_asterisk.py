"""Real speech to try things on: Debian's Asterisk prompts (one English voice, about 24 minutes, CC-BY-SA-3.0).

    python scripts/prepare_asterisk.py data/asterisk

Writes 16 kHz wav files and three manifests, `labelled.jsonl`, `unlabelled.jsonl` (the text is in `hidden_reference`)
and `evaluation.jsonl`. Needs the extra `asterisk` (PyAV, num2words) and either apt or the two packages as files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import soundfile
import typer

PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722")
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
SAMPLING_RATE = 16_000

# Tones that their transcripts describe in plain words.
TONES = frozenset(
    {"beep", "beeperr", "confbridge-join", "confbridge-leave", "ascending-2tone", "descending-2tone", "tt-monkeys"}
)
SYMBOLS = {"*": " star ", "#": " pound ", "\u2019": "'", "`": "'"}
SHORTEST_SECONDS = 0.15
QUIETEST_PEAK = 1e-3


def fail(message: str) -> typer.Exit:
    """Print why, and the exception that ends the program."""
    typer.secho(message, fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def download(folder: Path) -> list[Path]:
    """Fetch the packages with apt, without installing them."""
    if shutil.which("apt-get") is None:
        raise fail(f"apt-get is not here: fetch {' and '.join(PACKAGES)} elsewhere and pass the files by --deb")
    done = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
    debs = sorted(folder.glob("*.deb"))
    if done.returncode != 0 or len(debs) != len(PACKAGES):
        raise fail(
            f"{done.stderr.strip()}\napt-get cannot fetch {' and '.join(PACKAGES)}: run `apt-get update` as root and "
            "try again, or pass the files by --deb"
        )
    return debs


def unpack(deb: Path, root: Path) -> None:
    """Extract the files of a Debian package into `root`; nothing is installed and no script of it runs."""
    name, content = data_archive(deb)
    if name.endswith(".zst"):  # tarfile reads it from Python 3.14 on
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(root, filter="data")


def data_archive(deb: Path) -> tuple[str, bytes]:
    """Name and content of the `data.tar.*` in the `ar` archive that a Debian package is.

    Raises:
        ValueError: when the file is no Debian package.
    """
    content = deb.read_bytes()
    position = 8
    if content[:position] != b"!<arch>\n":
        raise ValueError(f"{deb} is not a Debian package")
    while position + 60 <= len(content):
        name = content[position : position + 16].decode("ascii").strip().rstrip("/")
        size = int(content[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            return name, content[position : position + size]
        position += size + size % 2
    raise ValueError(f"{deb} holds no data.tar")


def read_transcripts(file: Path) -> dict[str, str]:
    """Key to text, from lines `key: text`; keys with two different texts are ambiguous and left out."""
    texts: dict[str, set[str]] = {}
    with gzip.open(file, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            key, separator, text = line.partition(":")
            if separator and not line.startswith(";"):
                texts.setdefault(key.strip(), set()).add(text.strip())
    return {key: next(iter(found)) for key, found in texts.items() if len(found) == 1}


def normalise(text: str) -> str | None:
    """Lower-case letters, apostrophes and single spaces; digits are spelled out. None when nothing is spoken."""
    from num2words import num2words  # type: ignore[import-untyped]

    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text)  # descriptions: [ascending tones], (beep)
    for symbol, word in SYMBOLS.items():
        text = text.replace(symbol, word)
    text = re.sub(r"\d+", lambda match: f" {num2words(int(match[0]))} ", text).lower()
    text = "".join(character if character.isalpha() or character == "'" else " " for character in text)
    text = re.sub(r"(?<![^\W\d_])'|'(?![^\W\d_])", " ", text)  # quotation marks, not apostrophes
    return " ".join(text.split()) or None


def decode_g722(file: Path) -> npt.NDArray[np.int16]:
    """Samples of a headerless G.722 file, 16 kHz mono."""
    import av

    with av.open(str(file), format="g722") as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    return np.concatenate([np.zeros(0, np.int16), *frames]).astype(np.int16)


def convert(root: Path, output: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Write a wav file for every prompt that has speech and a text; the rows, and what was left out and why."""
    texts = read_transcripts(root / TRANSCRIPTS)
    sounds = root / SOUNDS
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for file in sorted(sounds.rglob("*.g722")):
        key = file.relative_to(sounds).with_suffix("").as_posix()
        text = normalise(texts[key]) if key in texts else None
        if key.startswith("silence/") or key in TONES:
            skipped["silence or tone"] += 1
        elif text is None:
            skipped["no text" if key not in texts else "nothing spoken"] += 1
        else:
            samples = decode_g722(file)
            seconds = len(samples) / SAMPLING_RATE
            if seconds < SHORTEST_SECONDS or np.abs(samples.astype(np.int32)).max() < QUIETEST_PEAK * 32768:
                skipped["no sound"] += 1
                continue
            audio = Path("wav") / f"{key}.wav"
            (output / audio).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(output / audio, samples, SAMPLING_RATE, subtype="PCM_16")
            rows.append({"id": key, "audio": audio.as_posix(), "text": text, "duration": round(seconds, 3)})
    return rows, skipped


def split_by_text(
    rows: Iterable[dict[str, Any]], labelled_share: float, evaluation_share: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Deal texts, not files, to the splits, by shares of the total duration.

    All recordings of one text land in one split. The order is that of a hash of seed and text, so it does not depend
    on the order of the rows.
    """
    by_text: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        by_text.setdefault(row["text"], []).append(row)
    total = sum(row["duration"] for same in by_text.values() for row in same)
    splits: dict[str, list[dict[str, Any]]] = {"labelled": [], "unlabelled": [], "evaluation": []}
    dealt = 0.0
    for text in sorted(by_text, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest()):
        share = dealt / total
        if share < evaluation_share:
            name = "evaluation"
        elif share < evaluation_share + labelled_share:
            name = "labelled"
        else:
            name = "unlabelled"
        splits[name] += by_text[text]
        dealt += sum(row["duration"] for row in by_text[text])
    return splits


def write_manifest(file: Path, rows: Sequence[dict[str, Any]], *, hide_text: bool) -> None:
    """One JSON object per line; with `hide_text` the text is called `hidden_reference`."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            shown = {("hidden_reference" if hide_text and key == "text" else key): value for key, value in row.items()}
            lines.write(json.dumps(shown, ensure_ascii=False) + "\n")


def main(
    output: Annotated[Path, typer.Argument(help="Folder for wav files and manifests; keep it out of git.")],
    deb: Annotated[
        list[Path] | None,
        typer.Option(help="A package already downloaded; give both. Default: apt-get download.", exists=True),
    ] = None,
    labelled_share: Annotated[float, typer.Option(help="Share of the labelled split.", min=0.0, max=1.0)] = 0.25,
    evaluation_share: Annotated[float, typer.Option(help="Share of the evaluation split.", min=0.0, max=1.0)] = 0.2,
    seed: Annotated[int, typer.Option(help="Which texts land in which split.")] = 0,
) -> None:
    """Turn Debian's English Asterisk prompts into labelled, unlabelled and evaluation speech."""
    if labelled_share + evaluation_share > 1:
        raise fail(f"shares of {labelled_share} and {evaluation_share} are more than the whole")
    try:
        import av  # noqa: F401
        import num2words  # noqa: F401
    except ImportError as error:
        raise fail(f'{error}: pip install "hf-ema-scaling[asterisk]"') from error
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        for package in deb or download(Path(folder)):
            unpack(package, root)
        missing = [path for path in (TRANSCRIPTS, SOUNDS) if not (root / path).exists()]
        if missing:
            raise fail(f"the packages lack {', '.join(missing)}: give both {' and '.join(PACKAGES)}")
        rows, skipped = convert(root, output)
    for name, members in split_by_text(rows, labelled_share, evaluation_share, seed).items():
        write_manifest(output / f"{name}.jsonl", members, hide_text=name == "unlabelled")
        minutes = sum(row["duration"] for row in members) / 60
        typer.echo(f"{name:10} {len(members):4} utterances {minutes:6.2f} minutes")
    typer.echo(f"left out: {', '.join(f'{count} {why}' for why, count in sorted(skipped.items()))}")


if __name__ == "__main__":
    typer.run(main)
