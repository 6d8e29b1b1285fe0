"""Stopping anywhere and resuming is as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hf_ema_scaling.ema import AverageStateError
from hf_ema_scaling.training.run_state import read_run_state

SCHEDULE = json.dumps([{"batch_size": 4, "until": 4}, {"batch_size": 8, "until": 9}, {"batch_size": 12}])
# Steps end at 1, 2, 3, 4 | 6, 8, 9 | 12, 15, 18, 20.
STEPS = 11
VOLATILE = ("runtime", "per_second", "train_loss", "preparation_time")


def augment(inputs: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
    """Each row's own noise."""
    features = inputs["input_features"]
    rows = [
        torch.randn(row.shape, generator=torch.Generator().manual_seed(s))
        for row, s in zip(features, seeds, strict=True)
    ]
    return {"input_features": features + 0.3 * torch.stack(rows)}


def supervised(folder: Path, init: int = 0, **changes: Any) -> Any:
    values = {"max_grad_norm": 1.0, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    args = schedule_arguments(folder, values | changes)
    return tiny.trainer(
        tiny.wav2vec2(dropout=0.1, layerdrop=0.2, masking=0.2, seed=init),
        args,
        tiny.speech(18),
        eval_dataset={"a": tiny.speech(4, 5), "b": tiny.speech(3, 6)},
    )


def semi_supervised(folder: Path, init: int = 0, **changes: Any) -> Any:
    ratio = changes.pop("ratio", 2.0)
    pl_start = changes.pop("pl_start", 2.0)
    items = changes.pop("items", 22)
    args = schedule_arguments(folder, {"learning_rate": 3e-3, "augment_start": 3} | changes)
    return tiny.trainer(
        tiny.parakeet(dropout=0.1, seed=init),
        args,
        tiny.speech(18, features=8),
        unlabeled_dataset=tiny.speech(items, 1, features=8, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=pl_start, unlabeled_ratio=ratio, min_confidence=0.15),
        augmentation=augment,
        eval_dataset=tiny.speech(4, 5, features=8),
    )


def seconds(folder: Path, init: int = 0, **changes: Any) -> Any:
    """Small batches of long utterances: some planned steps draw nothing and are none."""
    values = {"batch_unit": "seconds", "reference_batch_size": 12.0, "save_steps": 0.5, "max_grad_norm": 1.0}
    return tiny.trainer(
        tiny.wav2vec2(dropout=0.1, seed=init),
        schedule_arguments(folder, {"batch_size": 10.0, "bucket_window": 3} | values | changes),
        tiny.speech(18),
        eval_dataset=tiny.speech(4, 5),
    )


def schedule_arguments(folder: Path, changes: dict[str, Any]) -> Any:
    values = {
        "max_steps": 20,
        "per_device_train_batch_size": 3,
        "bucket_window": 2,
        "logging_strategy": "steps",
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if not {"kappa", "batch_size", "batch_schedule"} & changes.keys():
        values["batch_schedule"] = SCHEDULE
    return tiny.arguments(folder, **(values | changes))


KINDS: dict[str, Callable[..., Any]] = {"supervised": supervised, "semi_supervised": semi_supervised}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    finished: dict[str, tuple[Any, Path]] = {}

    def get(kind: str) -> tuple[Any, Path]:
        if kind not in finished:
            folder = tmp_path_factory.mktemp(kind)
            made = KINDS[kind](folder)
            made.train()
            assert made.state.global_step == STEPS
            finished[kind] = made, folder
        return finished[kind]

    return get


def history(made: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in VOLATILE)}
        for entry in made.state.log_history
    ]


def optimizer_state(folder: Path, step: int) -> Any:
    return torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)


# In the first stage; at a switch; in the middle of a stage and between two logs; before the last step.
@pytest.mark.parametrize("stop", [1, 4, 6, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path, kind: str, stop: int
) -> None:
    reference, folder = whole(kind)
    torch.manual_seed(99)
    made = KINDS[kind](tmp_path, init=7)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert made.drawn == reference.drawn[stop:]
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert tiny.same_bits(dict(made.model.named_buffers()), dict(reference.model.named_buffers()))
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    assert made.average.num_updates == reference.average.num_updates == STEPS
    assert tiny.same_bits(optimizer_state(tmp_path, STEPS), optimizer_state(folder, STEPS))
    assert history(made) == history(reference)
    assert len([entry for entry in history(made) if "loss" in entry]) == 4
    for step in range(STEPS - stop):
        assert tiny.same_bits(made.recorder.gradients[step], reference.recorder.gradients[stop + step])
        assert made.recorder.groups[step] == reference.recorder.groups[stop + step]


def test_so_it_is_in_seconds(tmp_path: Path) -> None:
    reference = seconds(tmp_path / "whole")
    reference.train()
    assert 12 < reference.state.global_step == reference.sampler.num_steps < len(reference.plan) == 24
    clocks = [reference.sampler.step(i).end for i in range(reference.sampler.num_steps)]
    assert clocks[-1] >= 20 and len({round(b - a, 6) for a, b in pairwise(clocks)}) > 4
    stop = next(i for i, clock in enumerate(clocks) if clock >= 10) + 1
    made = seconds(tmp_path / "resumed", init=7)
    made.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
    assert made.drawn == reference.drawn[stop:]
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    assert history(made) == history(reference)
    other = seconds(tmp_path / "other", init=7, batch_size=48.0)
    other.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
    rest = [sorted(item[2] for item in step) for step in other.drawn]
    drawn = [position for step in reference.drawn[stop:] for position in sorted(item[2] for item in step)]
    assert [position for step in rest for position in step] == drawn
    assert len(rest) == 3


def test_the_log_of_the_semi_supervised_run_says_something(whole: Callable[[str], tuple[Any, Path]]) -> None:
    logs = [entry for entry in history(whole("semi_supervised")[0]) if "loss" in entry]
    kept = [entry["pseudo/kept"] for entry in logs]
    assert len(kept) == 4 and any(0 < share < 1 for share in kept)


def test_resuming_the_last_checkpoint_in_the_output_folder(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    reference, folder = whole("supervised")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    made = supervised(tmp_path, init=3)
    made.train(resume_from_checkpoint=True)
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        supervised(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_changes_nothing(whole: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    reference, folder = whole("supervised")
    made = supervised(tmp_path, init=3)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert "drawn" not in made.__dict__
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"kappa": 1.0}, {"kappa": 5.0}, {"batch_size": 10}], ids=str)
def test_another_kappa_continues_at_the_same_clock_with_the_same_items(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path, kind: str, change: dict[str, float]
) -> None:
    reference, folder = whole(kind)
    made = KINDS[kind](
        tmp_path, init=7, save_strategy="no", small_batch_until=0 if "kappa" in change else None, **change
    )
    made.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert made.sampler.step(5).end == 8.0
    kappa = change.get("kappa", 2.5)
    # Batches of ten samples are two and a half reference batches.
    assert made.state.max_steps == 6 + -(-12 // kappa) == made.state.global_step
    assert made.sampler.step(6).kappa == kappa
    rest = [item for step in reference.drawn[6:] for item in step]
    drawn = [item for step in made.drawn for item in step]
    assert sorted(drawn, key=lambda item: item[2]) == sorted(rest, key=lambda item: item[2])
    position = 0
    for step in made.drawn:
        assert sorted(item[2] for item in step) == list(range(32 + position, 32 + position + len(step)))
        position += len(step)
    log = [entry for entry in made.state.log_history if "loss" in entry][-1]
    assert log["clock/reference_step"] == 20.0


def test_a_switch_on_resume_rescales_adams_state(whole: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = whole("supervised")
    made = supervised(tmp_path, init=7, save_strategy="no", kappa=4.0)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    saved = {float(entry["step"]) for entry in optimizer_state(folder, 6)["state"].values()}
    # Four reference steps, then two of two: 4 / 2 + 2 = 4; now of four.
    assert saved == {4.0}
    assert {float(state["step"]) for state in made.recorder.after[0].values()} == {3.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_batch_size": 8}, "reference_batch_size: 4 then, 8 now"),
        ({"seed": 43}, "seed: 42 then, 43 now"),
        ({"bucket_window": 0}, "bucket_window: 2 then, 0 now"),
        ({"pl_start": 3.0}, "pl_start: 2.0 then, 3.0 now"),
        ({"ratio": 1.0}, "unlabelled_ratios: [[2.0, 2.0]] then, [[2.0, 1.0]] now"),
        ({"items": 21}, "unlabelled_items: 22 then, 21 now"),
        ({"batch_unit": "seconds"}, "batch_unit: samples then, seconds now"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_another_recipe_or_other_data_are_refused(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, folder = whole("semi_supervised")
    made = semi_supervised(tmp_path, **change)
    with pytest.raises(ValueError, match="other data or another reference recipe") as error:
        made.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert message in str(error.value)


def test_what_concerns_unlabelled_data_may_change_before_any_was_drawn(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = whole("semi_supervised")
    made = semi_supervised(tmp_path, items=21, ratio=1.0, save_strategy="no")
    made.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert made.state.global_step == STEPS


def test_a_run_shorter_than_its_checkpoint_is_refused(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = whole("supervised")
    made = supervised(tmp_path, max_steps=7, kappa=1.0)
    with pytest.raises(ValueError, match="beyond the end of the run"):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_checkpoints_that_cannot_be_resumed_say_why(whole: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = whole("supervised")

    def damaged(name: str, damage: Callable[[Path], None]) -> str:
        shutil.copytree(folder / "checkpoint-6", tmp_path / name)
        damage(tmp_path / name)
        return str(tmp_path / name)

    made = supervised(tmp_path / "run")
    with pytest.raises(AverageStateError, match="missing or damaged"):
        made.train(resume_from_checkpoint=damaged("foreign", lambda path: shutil.rmtree(path / "ema")))
    with pytest.raises(AverageStateError, match="missing or damaged"):
        made.train(resume_from_checkpoint=damaged("cut", lambda path: (path / "ema/ema_state.json").write_text("{")))
    with pytest.raises(ValueError, match="no optimizer state"):
        made.train(resume_from_checkpoint=damaged("weights", lambda path: (path / "optimizer.pt").unlink()))

    def flip(path: Path) -> None:
        data = bytearray((path / "ema/model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "ema/model.safetensors").write_bytes(data)

    with pytest.raises(AverageStateError, match="damaged"):
        made.train(resume_from_checkpoint=damaged("flipped", flip))


def test_the_root_of_a_checkpoint_is_the_student_and_ema_the_average(
    whole: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    reference, folder = whole("semi_supervised")
    checkpoint = folder / "checkpoint-6"
    state = read_run_state(checkpoint)
    assert (state.global_step, state.clock, state.recipe["ema_momentum"]) == (6, 8.0, 0.9)
    names = reference.recorder.weights[5]
    student, average = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "ema/model.safetensors")
    assert tiny.same_bits({name: student[name] for name in names}, names)
    assert tiny.same_bits(
        {name: average[name] for name in names}, {n: reference.recorder.averages[5][n] for n in names}
    )
    assert tiny.difference(student, average) > 1e-4


def test_skipping_the_fast_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ignore_data_skip"):
        tiny.arguments(tmp_path, ignore_data_skip=True)
