"""Speech for recipes without a download: the embedded synthetic corpus, spoken by eSpeak NG, as a `datasets` folder.

    python scripts/prepare_synthetic.py data/synthetic

Writes the splits `labelled`, `unlabelled` (the text is in `hidden_reference`), `evaluation`, and `evaluation_noisy`,
which is `evaluation` with more white noise; a recipe's YAML names them as `data/synthetic:labelled` and so on. Needs
the extra `demo`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from datasets import Dataset

from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.data.synthetic import SPLITS, SyntheticCorpusConfig, build_corpus


def fail(message: str) -> typer.Exit:
    """Print why, and the exception that ends the program."""
    typer.secho(message, fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def with_noise(split: Dataset, level: float, seed: int) -> Dataset:
    """The split with white noise added to every utterance.

    Args:
        split: `audio` in int16, with a speech peak of 0.5 of full scale.
        level: standard deviation of the noise, in shares of full scale.
        seed: of the noise; each row has a generator of its own.
    """

    def add(row: dict[str, Any], number: int) -> dict[str, Any]:
        samples = np.asarray(row["audio"]["array"], dtype=np.float64) / 32767
        rng = np.random.default_rng([seed, len(SPLITS), number])
        noisy = (samples + level * rng.standard_normal(len(samples))).clip(-1, 1)
        return {"audio": {**row["audio"], "array": (noisy * 32767).round().astype(np.int16)}}

    with quiet_unless_terminal():
        return split.map(add, with_indices=True, features=split.features, keep_in_memory=True)


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the data set; keep it out of git.")],
    labelled_minutes: Annotated[float, typer.Option(help="Length of the labelled split.")] = 7.0,
    unlabelled_minutes: Annotated[float, typer.Option(help="Length of the unlabelled split.")] = 45.0,
    evaluation_minutes: Annotated[float, typer.Option(help="Length of each evaluation split.")] = 2.5,
    noise: Annotated[
        float, typer.Option(help="White noise of the labelled split: highest deviation, at a speech peak of 0.5.")
    ] = 0.02,
    wild_noise: Annotated[float, typer.Option(help="The same of the unlabelled and evaluation splits.")] = 0.12,
    more_noise: Annotated[
        float, typer.Option(min=0.0, help="Deviation of the noise that evaluation_noisy has on top.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of sentences, voices and noise.")] = 0,
) -> None:
    """Speak the synthetic corpus into a saved data set."""
    if output.exists() and any(output.iterdir()):
        raise fail(f"{output} is not empty: choose another folder, or remove it")
    try:
        config = SyntheticCorpusConfig(
            seed=seed,
            labelled_minutes=labelled_minutes,
            unlabelled_minutes=unlabelled_minutes,
            evaluation_minutes=evaluation_minutes,
            noise=noise,
            wild_noise=wild_noise,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that what is complete can be moved there.
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            corpus = build_corpus(config, Path(folder) / "spoken")
            corpus["evaluation_noisy"] = with_noise(corpus["evaluation"], more_noise, seed)
            with quiet_unless_terminal():
                corpus.save_to_disk(Path(folder) / "saved")
            stated = {**asdict(config), "more_noise": more_noise}
            (Path(folder) / "saved" / "config.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
            if output.exists():
                output.rmdir()
            shutil.move(Path(folder) / "saved", output)
            for name, split in corpus.items():
                typer.echo(f"{name:17} {len(split):4} utterances {sum(split['duration']) / 60:6.2f} minutes")
    except (ValueError, ImportError) as error:
        raise fail(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
