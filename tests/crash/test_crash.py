"""A run that is killed at any moment and started again ends as the run that never was, bit for bit."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crash_lives import Lives, assert_same_draws, drawn, ended, files, log, trainer_state

from hf_ema_scaling.ema.durable import check_seal
from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint, what_is_missing

SAVED = (2, 4, 5, 6, 8, 9, 10, 11)
STEPS = 11
LOGGED = 7  # four logs and three evaluations
KILLS = 24
slow = pytest.mark.slow


def run_state(content: bytes) -> dict[str, Any]:
    """What the run knows of itself, without the list of its checkpoints: a SIGTERM adds one."""
    state = json.loads(content)
    check_seal(state)
    del state["own_crc32"]
    assert state["state"]["counters"]["collapse"].pop("checkpoints")
    return dict(state)


class Reference:
    """The run that nothing interrupts."""

    def __init__(self, folder: Path, lives: Lives) -> None:
        self.folder = folder
        assert lives.live(folder) == 0, log(folder)
        begun = time.monotonic()
        assert lives.live(folder.with_name("again")) == 0
        self.seconds = time.monotonic() - begun
        self.points, self.tensors = ended(folder)
        assert [step for step, _ in drawn(folder)] == list(range(1, STEPS + 1))

    def assert_same(self, folder: Path, *, names: bool = True, told: bool = False) -> None:
        """Every file of the last checkpoint, the data that every step drew in every life, and nothing left over.

        `told`: a SIGTERM added a checkpoint, of which the run state knows.
        """
        if names:
            assert {path.name for path in folder.iterdir()} == {path.name for path in self.folder.iterdir()}
        ours, theirs = (files(base / f"checkpoint-{STEPS}") for base in (folder, self.folder))
        assert ours.keys() == theirs.keys()
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "ema/model.safetensors"} < ours.keys()
        assert "label_cache.safetensors" in ours
        for name, content in theirs.items():
            if name == "trainer_state.json":
                assert trainer_state(ours[name], LOGGED) == trainer_state(content, LOGGED)
            elif told and name == "ema/ema_state.json":
                assert run_state(ours[name]) == run_state(content)
            elif name != "training_args.bin":  # holds the folder
                assert ours[name] == content, name
        assert_same_draws(folder, self.folder)


@pytest.fixture(scope="module")
def reference(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    made = Reference(tmp_path_factory.mktemp("reference") / "run", lives)
    # The uninterrupted run itself is a function of its seeds.
    made.assert_same(made.folder.with_name("again"))
    return made


def survivor(folder: Path) -> int:
    """The step that the next life resumes from; 0 for none."""
    with contextlib.suppress(ValueError):
        return int(newest_complete_checkpoint(folder).name.removeprefix("checkpoint-"))
    return 0


def assert_no_checkpoint_was_lost(folder: Path) -> None:
    """A step begins after the saves before it have ended."""
    reached = max((step for step, _ in drawn(folder)), default=0)
    assert survivor(folder) >= max((step for step in SAVED if step < reached), default=0)


def kill(lives: Lives, reference: Reference, folder: Path, how: str, chance: random.Random, **more: Any) -> bool:
    """One life that is killed at a random moment of what is left of its run; False if it ended before."""
    left = 1 - survivor(folder) / STEPS
    if how in ("time", "term"):
        after = chance.uniform(0.1, 0.9) * left * reference.seconds
        by = signal.SIGTERM if how == "term" else signal.SIGKILL
        status = lives.live(folder, kill_after=after, by=by, **more)
    else:
        points = range(1, max(2, int(left * reference.points)))
        if how == "torn":
            points = [point for point in reference.tensors if point in points] or points
        status = lives.live(folder, kill_at=chance.choice(points), share=chance.random(), **more)
    # SIGTERM before and after training is not the trainer's.
    expected = (128 + signal.SIGTERM, -signal.SIGTERM) if how == "term" else (-signal.SIGKILL,)
    assert status in (0, *expected), log(folder)
    assert_no_checkpoint_was_lost(folder)
    return status != 0


def test_a_life_that_is_killed_while_saving_goes_on_as_if_nothing_had_happened(
    lives: Lives, reference: Reference, tmp_path: Path
) -> None:
    for number, (how, share) in enumerate([("torn", 0.5), ("point", 0.0), ("point", 0.0)]):
        folder = tmp_path / str(number)
        # The optimizer's state of the fifth checkpoint; between two points anywhere in its saving.
        point = {0: reference.tensors[4 * 6 + 3], 1: reference.tensors[4 * 6 + 2] + 1}.get(number)
        point = point or random.Random(0).randint(reference.tensors[30], reference.points)
        assert lives.live(folder, kill_at=point, share=share) == -signal.SIGKILL, log(folder)
        assert_no_checkpoint_was_lost(folder)
        assert how != "torn" or survivor(folder) == 6
        # Killed between the last save and the deletion of what is older than it, a run saves and deletes no more.
        saved = survivor(folder) == STEPS
        assert lives.live(folder) == 0, log(folder)
        reference.assert_same(folder, names=not saved)


@slow
def test_killed_at_any_moment_a_run_goes_on_as_if_nothing_had_happened(
    lives: Lives, reference: Reference, tmp_path: Path
) -> None:
    chance = random.Random(2026)
    kinds = ["point", "torn", "point", "time", "torn", "point", "time", "term"]
    kills: list[str] = []
    survived: list[int] = []
    for number in range(KILLS):
        if len(kills) >= KILLS:
            break
        folder = tmp_path / str(number)
        # A single checkpoint is kept in every other run: none other could take its place.
        more = {"arguments": {"save_total_limit": 1 + number % 2}}
        alive = False
        for how in kinds[2 * number % 8 :][:2]:
            if not alive and kill(lives, reference, folder, how, chance, **more):
                kills.append(how)
                survived.append(survivor(folder))
            else:
                alive = True
        # Where the last checkpoint was committed, nothing is saved again, and older ones not deleted any more.
        names = number % 2 == 1 and (alive or survivor(folder) < STEPS)
        assert alive or lives.live(folder, **more) == 0, log(folder)
        reference.assert_same(folder, names=names, told=True)
    print(f"{len(kills)} kills {kills}, resumed from {survived}")
    assert sum(how != "term" for how in kills) >= 20 and len(set(survived)) >= 5 and {*kinds} == {*kills}, (
        kills,
        survived,
    )


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param("model.safetensors", marks=slow),
        pytest.param("optimizer.pt", marks=slow),
        "trainer_state.json",
    ],
)
def test_a_full_disk_loses_no_earlier_checkpoint(
    lives: Lives, reference: Reference, tmp_path: Path, fails: str
) -> None:
    folder = tmp_path / "run"
    more: dict[str, Any] = {"arguments": {"save_total_limit": 1}}
    sizes = {name: len(content) for name, content in files(reference.folder / f"checkpoint-{STEPS}").items()}
    assert sizes["config.json"] < sizes["model.safetensors"] < sizes["optimizer.pt"]
    limit = {"limit_files_in": 4, "limit": sizes.get(fails, 0) - 1}
    if fails == "trainer_state.json":
        limit = {"limit_before_commit_of": 4}
    assert lives.live(folder, **limit, **more) == 1, log(folder)
    assert f"{folder}/checkpoint-4 was not saved and its parts were deleted" in log(folder)
    assert "checkpoint-2 is complete: train(resume_from_checkpoint=True) continues from it." in log(folder)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert what_is_missing(folder / "checkpoint-2") == []
    assert lives.live(folder, **more) == 0, log(folder)
    reference.assert_same(folder, names=False)


@pytest.mark.parametrize(
    ("when", "step"),
    [
        ("sigterm_in", 3),  # no checkpoint is due
        ("sigterm_while_saving", 5),
        pytest.param("sigterm_in", 6, marks=slow),  # a log, an evaluation and a checkpoint are
        pytest.param("sigterm_in_evaluation_of", 9, marks=slow),
        pytest.param("sigterm_in", STEPS, marks=slow),
    ],
)
def test_sigterm_saves_and_stops(lives: Lives, reference: Reference, tmp_path: Path, when: str, step: int) -> None:
    folder = tmp_path / "run"
    assert lives.live(folder, **{when: step}) == 128 + signal.SIGTERM, log(folder)
    assert max(step for step, _ in drawn(folder)) == step == survivor(folder)
    assert lives.live(folder) == 0, log(folder)
    reference.assert_same(folder, told=True)


def test_sigterm_in_an_evaluation_saves_after_it(lives: Lives, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = {"save_steps": 5}  # a checkpoint is due at step 5, an evaluation at step 6
    assert lives.live(folder, sigterm_in_evaluation_of=6, arguments=more) == 128 + signal.SIGTERM, log(folder)
    assert max(step for step, _ in drawn(folder)) == 6 == survivor(folder)
    logged = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert logged[-1]["step"] == 6 and "eval_ema_loss" in logged[-1]


@slow
def test_sigterm_calls_the_handler_that_was_there_once_all_is_saved(
    lives: Lives, reference: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert lives.live(folder, sigterm_in=7, handler=True) == 0, log(folder)
    assert log(folder).count("HANDLER 7\n") == 1 and survivor(folder) == 7
    assert lives.live(folder) == 0, log(folder)
    reference.assert_same(folder, told=True)


@slow
def test_without_checkpoints_sigterm_is_what_it_was(lives: Lives, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = {"save_strategy": "no", "metric_for_best_model": None}
    assert lives.live(folder, sigterm_in=3, arguments=more) == -signal.SIGTERM, log(folder)
    assert survivor(folder) == 0


@slow
@pytest.mark.parametrize("when", ["sigterm_in", "sigterm_in_evaluation_of"])
def test_sigterm_to_every_process_of_the_group_saves_and_stops(
    lives: Lives, reference: Reference, tmp_path: Path, when: str
) -> None:
    """As SLURM and `timeout` send it: workers that load data for training and evaluation are told, too."""
    folder, step = tmp_path / "run", 6  # a log, an evaluation and a checkpoint are due
    more = {"to_group": True, "arguments": {"dataloader_num_workers": 1}}
    assert lives.live(folder, **{when: step}, **more) == 128 + signal.SIGTERM, log(folder)
    # The training's worker, and the evaluation's own.
    assert f"WORKERS {1 if when == 'sigterm_in' else 2} 1\n" in log(folder)
    assert max(step for step, _ in drawn(folder)) == step == survivor(folder)
    assert lives.live(folder) == 0, log(folder)
    reference.assert_same(folder, told=True)
