"""The cards in `model_cards/`, made from the folders of this project's own runs; nothing is sent.

    python recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/vader
    python recipes/byol.py --config recipes/configs/byol_digits.yaml --output_dir runs/byol
    python scripts/model_cards.py vader-words byol-digits

`model_cards/README.md` has the command of each card.

A card is the README.md of what `hf-ema-scaling push RUN` would push, with those charts of `hf-ema-scaling report` that
are named here. Run from the root of the repository with the commands above, so that a card says nothing of a machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hf_ema_scaling.hub import CardDetails, stage
from hf_ema_scaling.report import read_runs
from hf_ema_scaling.report.charts import Chart, HeatMap, Section, sections
from hf_ema_scaling.report.figures import plot_section

CARDS = Path(__file__).parents[1] / "model_cards"
_MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|mnt|data|opt|var)\b[^\s`\"')]*|[A-Z]:\\\S+")


@dataclass(frozen=True)
class Card:
    """A card to be made.

    Args:
        run: folder of the run.
        details: what the run does not know.
        figures: the charts on each figure, by its name: keys of the run's log.
    """

    run: str
    details: CardDetails
    figures: Mapping[str, tuple[str, ...]]


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
        {"accuracy": ("eval_clean_accuracy", "eval_corrupted_accuracy"), "average": ("ema/momentum", "ema/distance")},
    ),
    "vader-words-kappa8": Card(
        "runs/vader_kappa8",
        CardDetails(
            title="vader-words-kappa8",
            language=("en",),
            license="apache-2.0",
            tags=("sentiment",),
            limits="vader-words at eight times its batch from reference step 200 on: a small model from scratch that "
            "shows scaling, not the state of its task. The sentences are those of the VADER corpus (MIT; C.J. Hutto "
            "and E.E. Gilbert, ICWSM 2014), without the neutral ones.",
        ),
        {"accuracy": ("eval_clean_accuracy", "eval_corrupted_accuracy"), "average": ("ema/momentum", "ema/distance")},
    ),
    "demo-ctc": Card(
        "runs/demo/pseudo",
        CardDetails(
            title="demo-ctc",
            language=("en",),
            license="apache-2.0",
            tags=("speech",),
            limits="The arm pseudo of the demo: a model of synthetic speech in English of few words, "
            "which shows pseudo-labelling and recognises nobody's voice. The command also trains the "
            "labelled phase from which it branches. Figures move with the machine and the versions by more than "
            "between seeds. eSpeak NG, which spoke the corpus, is GPL-3.0-or-later.",
        ),
        {
            "metrics": ("eval_wer", "eval_cer"),
            "labels": ("pseudo/kept", "pseudo/confidence"),
            "average": ("ema/momentum", "ema/distance"),
        },
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
        {"accuracy": ("eval_probe_accuracy", "eval_loss"), "average": ("ema/momentum", "ema/distance")},
    ),
    "minilm-vader": Card(
        "runs/mv",
        CardDetails(
            title="minilm-vader",
            language=("en",),
            license="apache-2.0",
            tags=("sentiment",),
            limits="Learnt from 100 labels of film sentences and the labels of its own average. This is seed 0; over "
            "five seeds its average is better than that of the same recipe on labels alone for product reviews, and "
            "no better for films (`recipes/README.md`). "
            "It starts from all-MiniLM-L6-v2 (Apache-2.0); the sentences are those of the VADER corpus (MIT; C.J. "
            "Hutto and E.E. Gilbert, ICWSM 2014), without the neutral ones.",
        ),
        {"labels": ("pseudo/kept", "pseudo/confidence"), "average": ("ema/momentum", "ema/distance")},
    ),
}


def make(name: str, root: Path = Path(), cards: Path = CARDS) -> Path:
    """Writes `cards/name` anew: README.md and figures.

    Args:
        name: one of `MODELS`.
        root: folder in which its run lies.
        cards: where to.

    Raises:
        ValueError: for a folder that is no complete run, a chart that it does not have, or a card that names a path of
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
        (copy / "figures").mkdir()
        # The first chart of a key is on the reference clock.
        charts: dict[str, Chart | HeatMap] = {}
        for chart in (chart for section in sections(read_runs([run])) for chart in section.charts):
            charts.setdefault(chart.key, chart)
        for figure, keys in card.figures.items():
            if missing := [key for key in keys if key not in charts]:
                raise ValueError(f"{run}: there is no chart of {', '.join(missing)}, but of {', '.join(charts)}")
            plot_section(Section(figure, figure, [charts[key] for key in keys]), copy / "figures" / f"{figure}.png")
        text = stage(copy, staged, details=card.details).read_text(encoding="utf-8")
        if found := _MACHINE.search(text):
            raise ValueError(f"{name}: the card would name {found[0]}: run the recipe with relative paths")
        shutil.rmtree(cards / name, ignore_errors=True)
        (cards / name).mkdir(parents=True)
        (cards / name / "README.md").write_text(text, encoding="utf-8")
        shutil.copytree(copy / "figures", cards / name / "figures")
    return cards / name


def main(names: Annotated[list[str], typer.Argument(help=f"Cards to make, of {', '.join(MODELS)}.")]) -> None:
    """Makes cards of this project's own runs."""
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"there is no card {', '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in names:
        try:
            typer.echo(make(name))
        except (ValueError, OSError) as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
