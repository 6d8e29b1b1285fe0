"""`EMACallback` in a stock `Trainer` that is killed at any moment: the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from signal import SIGKILL

import pytest
import stock_runs
from crash_lives import Lives, assert_same_draws, drawn, ended, files, log, trainer_state

KILLS = 8
STEPS, EVERY = 20, 3


def survivor(folder: Path, *, fast: bool = False) -> int:
    """The step that the next life resumes from; 0 for none."""
    others = [stock_runs.callback(name="fast")] if fast else []
    checkpoint = stock_runs.callback().newest_checkpoint(folder, *others)
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def assert_same_end(folder: Path, reference: Path, whole: dict[str, bytes]) -> None:
    ours = files(folder / f"checkpoint-{STEPS}")
    assert ours.keys() == whole.keys()
    for name, content in whole.items():
        if name == "trainer_state.json":
            assert trainer_state(ours[name], STEPS) == trainer_state(content, STEPS)
        elif name != "training_args.bin":  # holds the folder
            assert ours[name] == content, name
    assert json.loads(ours["ema/ema_state.json"])["num_updates"] == STEPS
    assert_same_draws(folder, reference)


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param("config.json", marks=pytest.mark.slow),
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        "optimizer.pt",
        "ema/config.json",
        "ema/model.safetensors",
    ],
)
def test_a_full_disk_loses_no_earlier_checkpoint(lives: Lives, tmp_path: Path, fails: str) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    assert lives.live(reference, kind="callback") == 0, log(reference)
    whole = files(reference / f"checkpoint-{STEPS}")
    of_average = fails.startswith("ema/")
    when = "limit_average_of" if of_average else "limit_files_in"
    assert lives.live(folder, kind="callback", **{when: 6, "limit": len(whole[fails]) - 1}) == 1, log(folder)
    errors = log(folder)
    assert "File too large" in errors or fails == "optimizer.pt"  # of which torch says "iostream error"
    assert ("checkpoint-6 has the student, but nothing of the average" in errors) == of_average
    assert ("checkpoint-3 is complete: train(resume_from_checkpoint=" in errors) == of_average
    # Whatever Trainer has left of the new one, the older one is whole, and found.
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert not any(path.name.startswith((".", "ema")) for path in (folder / "checkpoint-6").iterdir())
    assert survivor(folder) == 3
    assert lives.live(folder, kind="callback") == 0, log(folder)
    assert_same_end(folder, reference, whole)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True], ids=["one average", "two averages"])
def test_killed_at_any_moment_a_run_with_the_callback_goes_on_as_if_nothing_had_happened(
    lives: Lives, tmp_path: Path, fast: bool
) -> None:
    reference = tmp_path / "reference"
    begun = time.monotonic()
    assert lives.live(reference, kind="callback", fast=fast) == 0, log(reference)
    seconds = time.monotonic() - begun
    points, tensors = ended(reference)
    whole = files(reference / f"checkpoint-{STEPS}")
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "ema/model.safetensors"} < whole.keys()
    assert ("ema-fast/model.safetensors" in whole) == fast
    chance = random.Random(4)
    kinds = ["torn", "point", "point", "time"]
    kills, survived = [], []
    for number in range(KILLS):
        folder, how = tmp_path / str(number), kinds[number % len(kinds)]
        if how == "time":
            status = lives.live(folder, kind="callback", fast=fast, kill_after=chance.uniform(0.1, 0.6) * seconds)
        else:
            # In the first save there is nothing to resume from yet: not every kill should come there.
            among = tensors[3:] if how == "torn" else range(points // 8, points)
            more = {"kill_at": chance.choice(among), "share": chance.random()}
            status = lives.live(folder, kind="callback", fast=fast, **more)
        assert status in (0, -SIGKILL) and (how == "time" or status), log(folder)
        reached = max((step for step, _ in drawn(folder)), default=0)
        # A step begins after the saves before it have ended.
        assert survivor(folder, fast=fast) >= (reached - 1) // EVERY * EVERY
        if status:
            kills.append(how)
            survived.append(survivor(folder, fast=fast))
            assert lives.live(folder, kind="callback", fast=fast) == 0, log(folder)
        assert_same_end(folder, reference, whole)
    print(f"{len(kills)} kills {kills}, resumed from {survived}")
    assert len(kills) >= 6 and len(set(survived)) >= 3, (kills, survived)
