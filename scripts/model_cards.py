"""The cards in `model_cards/`, made from the folders of this project's own runs; nothing is sent.

    python recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/vader
    python recipes/byol.py --config recipes/configs/byol_digits.yaml --output_dir runs/byol
    python scripts/model_cards.py vader-words byol-digits

A card is the README.md of what `hf-ema-scaling push RUN` would push, with the figures of `hf-ema-scaling report` that
are named here. Run from the root of the repository with the commands above, so that a card says nothing of a machine.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image  # comes with matplotlib

from hf_ema_scaling.hub import CardDetails, stage
from hf_ema_scaling.report import read_runs, write_report

CARDS = Path(__file__).parents[1] / "model_cards"
LARGEST = 200_000
"""Bytes of a figure in the repository."""
_MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|mnt|data|opt|var)\b[^\s`\"')]*|[A-Z]:\\\S+")


@dataclass(frozen=True)
class Card:
    """A card to be made.

    Args:
        run: folder of the run.
        details: what the run does not know.
        figures: sections of the report to show, by the names of its PNG files.
    """

    run: str
    details: CardDetails
    figures: tuple[str, ...]


MODELS = {
    "vader-words": Card(
        "runs/vader",
        CardDetails(
            title="vader-words",
            language=("en",),
            license="apache-2.0",
            tags=("sentiment",),
            limits="A small model from scratch that shows averaging, not the state of its task. The sentences are "
            "those of the VADER corpus (MIT; C.J. Hutto and E.E. Gilbert, ICWSM 2014), without the neutral ones.",
        ),
        ("metrics", "average"),
    ),
    "byol-digits": Card(
        "runs/byol",
        CardDetails(
            title="byol-digits",
            license="apache-2.0",
            tags=("byol", "self-supervised"),
            limits="An encoder of 8x8 images, for a linear probe. The images are the digits that come with "
            "scikit-learn (BSD-3-Clause; from the UCI repository, CC-BY-4.0).",
        ),
        ("metrics", "average"),
    ),
    "minilm-vader": Card(
        "runs/mv",
        CardDetails(
            title="minilm-vader",
            language=("en",),
            license="apache-2.0",
            tags=("sentiment",),
            limits="Learnt from 100 labels of film sentences and the labels of its own average. It starts from "
            "all-MiniLM-L6-v2 (Apache-2.0); the sentences are those of the VADER corpus (MIT; C.J. Hutto and E.E. "
            "Gilbert, ICWSM 2014), without the neutral ones.",
        ),
        ("average", "pseudo_labels"),
    ),
}


def make(name: str, root: Path = Path(), cards: Path = CARDS) -> Path:
    """Writes `cards/name` anew: README.md and figures.

    Args:
        name: one of `MODELS`.
        root: folder in which its run lies.
        cards: where to.

    Raises:
        ValueError: for a folder that is no complete run, a figure that is too large, or a card that names a path of
            this machine.
    """
    card = MODELS[name]
    run = root / card.run
    with tempfile.TemporaryDirectory() as folder:
        copy, staged = Path(folder) / "run", Path(folder) / "staged"
        # Beside links to the run's own files, so that nothing is written into it.
        shutil.copytree(run, copy, copy_function=lambda at, to: Path(to).symlink_to(Path(at).resolve()))
        shutil.rmtree(copy / "figures", ignore_errors=True)
        for file in copy.glob("*.png"):
            file.unlink()
        drawn = {path.stem: path for path in write_report(read_runs([run]), Path(folder) / "report.html")[1:]}
        missing = [figure for figure in card.figures if figure not in drawn]
        if missing:
            raise ValueError(f"{run}: its report has no figure {', '.join(missing)}; it has {', '.join(drawn)}")
        (copy / "figures").mkdir()
        for figure in card.figures:
            small = copy / "figures" / f"{figure}.png"
            # A third of the bytes, and lines and letters look the same.
            Image.open(drawn[figure]).convert("RGB").quantize(64).save(small, optimize=True)
            if small.stat().st_size > LARGEST:
                raise ValueError(f"{run}: the figure {figure} has more than {LARGEST} bytes")
        text = stage(copy, staged, details=card.details).read_text(encoding="utf-8")
        if found := _MACHINE.search(text):
            raise ValueError(f"{name}: the card would name {found[0]}: run the recipe with relative paths")
        shutil.rmtree(cards / name, ignore_errors=True)
        (cards / name).mkdir(parents=True)
        (cards / name / "README.md").write_text(text, encoding="utf-8")
        shutil.copytree(copy / "figures", cards / name / "figures")
    return cards / name


def main() -> None:
    """Makes the cards that are named."""
    names = sys.argv[1:]
    if not names or not set(names) <= MODELS.keys():
        sys.exit(f"{__doc__}\nnames are {', '.join(MODELS)}, got {' '.join(names) or 'none'}")
    for name in names:
        try:
            print(make(name))
        except (ValueError, OSError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
