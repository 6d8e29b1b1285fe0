"""Two processes: SIGTERM to one stops both after the same step, and both may be killed at any moment."""

from __future__ import annotations

import random
import time
from pathlib import Path
from signal import SIGKILL

import launch
import pytest
import tiny
from crash_lives import Lives, assert_same_draws, ended, files, log, trainer_state

from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint, what_is_missing

STEPS, LOGGED = 11, 7


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(tmp_path: Path) -> None:
    outputs = launch.on_two_processes(str(Path(__file__).with_name("two_processes.py")), str(tmp_path))
    first, second = launch.results(tmp_path)
    for results in (first, second):
        assert (results["code"], results["stopped"]) == (143, 3)
        assert "trainer_state.json is missing" in results["refused"]
        whole, resumed = results["whole"], results["resumed"]
        assert tiny.same_bits(resumed["weights"], whole["weights"])
        assert tiny.same_bits(resumed["average"], whole["average"])
        assert resumed["drawn"] == whole["drawn"][3:] and resumed["losses"] == whole["losses"]
    assert tiny.same_bits(first["resumed"]["average"], second["resumed"]["average"])
    # One checkpoint is kept; what was half-written is gone, though its number was higher when 4 was saved.
    assert [path.name for path in (tmp_path / "told").iterdir() if path.is_dir()] == ["checkpoint-6"]
    assert what_is_missing(tmp_path / "told" / "checkpoint-6") == []
    assert {path.name for path in (tmp_path / "told" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    for output in outputs:
        assert output.count("SIGTERM: training saves a checkpoint and stops.") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_killed_at_any_moment_go_on_as_if_nothing_had_happened(lives: Lives, tmp_path: Path) -> None:
    """The pseudo-label run with a label cache; where one process is killed, so is the other."""
    reference = tmp_path / "reference"
    begun = time.monotonic()
    assert lives.live(reference, processes=2) == 0, log(reference, "0") + log(reference, "1")
    seconds = time.monotonic() - begun
    ends = [ended(reference, rank) for rank in "01"]
    whole = files(reference / f"checkpoint-{STEPS}")
    assert {"label_cache.safetensors", "rng_state_0.pth", "rng_state_1.pth", "ema/model.safetensors"} < whole.keys()
    chance = random.Random(6)
    kills, survived = [], []
    for number, (how, rank) in enumerate([("torn", 0), ("point", 1), ("time", 0), ("point", 0)]):
        folder = tmp_path / str(number)
        points, tensors = ends[rank]
        if how == "time":
            status = lives.live(folder, processes=2, kill_after=chance.uniform(0.2, 0.6) * seconds)
        else:
            at = chance.choice(tensors[len(tensors) // 4 :] if how == "torn" else range(points // 4, points))
            status = lives.live(folder, processes=2, rank=rank, kill_at=at, share=chance.random())
        assert status in (0, -SIGKILL) and (how == "time" or status), log(folder, "0") + log(folder, "1")
        if status:
            kills.append((how, rank))
            try:
                survived.append(newest_complete_checkpoint(folder).name)
            except ValueError:
                survived.append("none")
            assert lives.live(folder, processes=2) == 0, log(folder, "0") + log(folder, "1")
        ours = files(folder / f"checkpoint-{STEPS}")
        assert ours.keys() == whole.keys()
        for name, content in whole.items():
            if name == "trainer_state.json":
                assert trainer_state(ours[name], LOGGED) == trainer_state(content, LOGGED)
            elif name != "training_args.bin":  # holds the folder
                assert ours[name] == content, name
        for each in "01":
            assert_same_draws(folder, reference, each)
    print(f"{len(kills)} kills {kills}, resumed from {survived}")
    assert len(kills) >= 3 and len(set(survived)) >= 2, (kills, survived)
