"""An Accelerate loop with `register_average` that is killed at any moment, also while it saves."""

from __future__ import annotations

import random
import time
from pathlib import Path
from signal import SIGKILL

import pytest
from crash_lives import Lives, assert_same_draws, drawn, ended, files, log

KILLS = 8
STEPS, EVERY = 12, 2


def newest(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


@pytest.mark.slow
def test_killed_at_any_moment_the_script_goes_on_as_if_nothing_had_happened(lives: Lives, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    begun = time.monotonic()
    assert lives.live(reference, kind="loop") == 0, log(reference)
    seconds = time.monotonic() - begun
    points, tensors = ended(reference)
    whole = files(reference)
    assert f"step-{STEPS}/ema/model.safetensors" in whole and "average/model.safetensors" in whole
    score = log(reference).split("accuracy of the student")[1].splitlines()[0]
    chance = random.Random(5)
    kinds = ["torn", "point", "point", "time"]
    kills, survived = [], []
    for number in range(KILLS):
        folder, how = tmp_path / str(number), kinds[number % len(kinds)]
        if how == "time":
            status = lives.live(folder, kind="loop", kill_after=chance.uniform(0.1, 0.6) * seconds)
        else:
            at = chance.choice(tensors if how == "torn" else range(1, points))
            status = lives.live(folder, kind="loop", kill_at=at, share=chance.random())
        assert status in (0, -SIGKILL) and (how == "time" or status), log(folder)
        reached = max((step for step, _ in drawn(folder)), default=0)
        assert newest(folder) >= (reached - 1) // EVERY * EVERY
        if status:
            kills.append(how)
            survived.append(newest(folder))
            assert lives.live(folder, kind="loop") == 0, log(folder)
        # Every checkpoint, the average that is exported, and nothing left over.
        ours = files(folder)
        assert ours.keys() == whole.keys()
        assert [name for name in whole if ours[name] != whole[name]] == []
        assert_same_draws(folder, reference)  # and the losses
        assert log(folder).split("accuracy of the student")[1].splitlines()[0] == score
    print(f"{len(kills)} kills {kills}, resumed from {survived}")
    assert len(kills) >= 6 and len(set(survived)) >= 3, (kills, survived)


@pytest.mark.slow
def test_a_save_into_an_older_checkpoint_killed_at_any_point_leaves_one_or_none_but_no_mixture(
    lives: Lives, tmp_path: Path
) -> None:
    def holds(folder: Path) -> str:
        assert lives.live(folder, kind="loading") == 0, log(folder)
        return next(line for line in reversed(log(folder).splitlines()) if line.startswith(("LOADED", "REFUSED")))

    folder = tmp_path / "whole"
    assert lives.live(folder, kind="overwriting") == 0, log(folder)
    points, tensors = ended(folder)
    new = holds(folder)
    assert lives.live(tmp_path / "first", kind="overwriting", kill_at=1) == -SIGKILL
    old = holds(tmp_path / "first")
    assert old.startswith("LOADED 6 ") and new.startswith("LOADED 9 ")
    outcomes = []
    for point in range(2, points + 1):
        folder = tmp_path / str(point)
        # What is torn is shorter by a byte at least.
        assert lives.live(folder, kind="overwriting", kill_at=point, share=0.9) == -SIGKILL, log(folder)
        outcomes.append(holds(folder))
    print(f"{len(outcomes)} kills, {sum(text.startswith('REFUSED') for text in outcomes)} refused")
    assert len(tensors) == 4 and len(outcomes) >= 10
    kept = [text for text in outcomes if text.startswith("LOADED")]
    # The old one until its first file is deleted, the new one after its last is written, nothing in between.
    assert set(kept) <= {old, new} and kept == sorted(kept), kept
    refused = [number for number, text in enumerate(outcomes) if text.startswith("REFUSED")]
    assert len(refused) >= 10 and refused == list(range(refused[0], refused[-1] + 1))
    assert all("cannot be loaded: " in outcomes[number] for number in refused), outcomes
