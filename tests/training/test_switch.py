"""Where the batch changes: what changes with it, what does not, and that it happens at the stated point."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ema_scaling.training.arguments import EMATrainingArguments

Schedule = list[dict[str, float]]
STAGES: Schedule = [
    {"batch_size": 4, "until": 4},
    {"labelled": 4, "unlabelled": 4, "until": 10},
    {"labelled": 4, "unlabelled": 12},
]
ENDS = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 14.0, 18.0, 22.0]
SWITCHES = {4: 2.0, 7: 2.0}
"""Steps that begin a stage, and the ratio of its batch to the one before."""
# Units of both sources at the end of every step, by hand: four a reference step, 1 : 1 from 4 on, 1 : 3 from 10 on.
LABELLED = [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
UNLABELLED = [0, 0, 0, 0, 4, 8, 12, 24, 36, 48]


class Settings(TrainerCallback):
    """What a step finds once it has begun: the optimizer's state, the average, and settings of the model's layers."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.state: list[dict[str, dict[str, Any]]] = []
        self.averages: list[dict[str, torch.Tensor]] = []
        self.layers: list[dict[str, float | bool]] = []
        self.planned: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.planned = state.max_steps

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.state.append(
            {
                name: {key: value.clone() for key, value in optimizer.state[p].items()}
                for name, p in model.named_parameters()
                if p in optimizer.state
            }
        )
        self.averages.append(tiny.average(self.trainer))
        self.layers.append(
            {
                f"{name}.{key}": value
                for name, part in model.named_modules()
                for key, value in vars(part).items()
                if isinstance(value, (bool, float))
            }
        )


def build(folder: Path, stages: Schedule = STAGES, init: int = 0, ratio: float = 1.0, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "max_steps": 22,
        "batch_schedule": json.dumps(stages),
        "per_device_train_batch_size": 3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "logging_strategy": "steps",
        "logging_steps": 5,
    }
    settings = Settings()
    made = tiny.trainer(
        tiny.parakeet(dropout=0.1, seed=init),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(18, features=8),
        unlabeled_dataset=tiny.speech(15, 1, features=8, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=4.0, unlabeled_ratio=ratio),
        callbacks=[settings],
    )
    made.settings, settings.trainer = settings, made
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    made = build(folder, save_strategy="steps", save_steps=1)
    made.train()
    return made, folder


def items(drawn: list[list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
    """Position, source and row of every item, in stream order."""
    return sorted((position, source, index) for step in drawn for source, index, position in step)


def counts(drawn: list[list[tuple[int, int, int]]]) -> tuple[list[int], list[int]]:
    """Labelled and unlabelled items at the end of every step."""
    unlabelled = np.cumsum([sum(source for source, _, _ in step) for step in drawn])
    return (np.cumsum([len(step) for step in drawn]) - unlabelled).tolist(), unlabelled.tolist()


def test_the_steps_are_known_and_end_where_they_should(whole: tuple[Any, Path]) -> None:
    made, _ = whole
    assert len(made.plan) == made.settings.planned == made.state.max_steps == made.state.global_step == 10
    assert made.state.log_history[-1]["step"] == 10 and made.args.max_steps == 22
    assert [made.sampler.step(t).end for t in range(10)] == ENDS == made.plan.borders[1:].tolist()
    logged = {entry["step"]: entry["clock/reference_step"] for entry in made.state.log_history}
    assert logged.items() <= {t + 1: end for t, end in enumerate(ENDS)}.items()


def test_every_step_draws_what_its_stage_states(whole: tuple[Any, Path]) -> None:
    assert counts(whole[0].drawn) == (LABELLED, UNLABELLED)


def test_what_changes_at_a_switch(whole: tuple[Any, Path]) -> None:
    made, _ = whole
    recorder = made.recorder
    for t in range(1, 10):
        q = SWITCHES.get(t, 1.0)
        before, after = recorder.groups[t - 1][0], recorder.groups[t][0]
        assert after["betas"] == pytest.approx([beta**q for beta in before["betas"]], rel=1e-12)
        assert after["eps"] == pytest.approx(before["eps"] / q**0.5, rel=1e-12)
        # A cosine moves the learning rate too, and with it the weight decay.
        factors = [made.plan.lr_factor(made.sampler.step(i).start, made.sampler.step(i).end) for i in (t - 1, t)]
        assert after["lr"] / before["lr"] == pytest.approx(q**0.5 * factors[1] / factors[0], rel=1e-12)
        kappa = made.sampler.step(t).kappa
        assert 1 - after["lr"] * after["weight_decay"] == pytest.approx((1 - 1e-3 * factors[1]) ** kappa, rel=1e-12)
        rho = 0.9**kappa
        for name, average in recorder.averages[t].items():
            if name in recorder.weights[t]:
                expected = rho * recorder.averages[t - 1][name] + (1 - rho) * recorder.weights[t][name]
                torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        found = made.settings.state[t]
        assert found.keys() == recorder.after[t - 1].keys() != set()
        for name, state in recorder.after[t - 1].items():
            assert float(found[name]["step"]) == float(state["step"]) / q
            assert torch.equal(found[name]["exp_avg_sq"], state["exp_avg_sq"] / q)


def test_what_does_not(whole: tuple[Any, Path]) -> None:
    made, _ = whole
    for t in range(1, 10):
        for name, state in made.recorder.after[t - 1].items():
            assert torch.equal(made.settings.state[t][name]["exp_avg"], state["exp_avg"])
        assert tiny.same_bits(made.settings.averages[t], made.recorder.averages[t - 1])
        assert made.settings.layers[t] == made.settings.layers[0]
    # Among them those of BatchNorm and of dropout.
    settings = made.settings.layers[0]
    assert settings["encoder.layers.0.conv.norm.momentum"] == 0.1 and settings["encoder.layers.0.training"]
    assert 0.1 in [value for name, value in settings.items() if name.endswith("dropout")]


def test_other_batches_of_the_same_ratios_see_the_same_items(whole: tuple[Any, Path], tmp_path: Path) -> None:
    made = build(
        tmp_path,
        [
            {"batch_size": 8, "until": 4},
            {"labelled": 6, "unlabelled": 6, "until": 10},
            {"labelled": 2, "unlabelled": 6},
        ],
    )
    made.train()
    assert items(made.drawn) == items(whole[0].drawn)
    ends = [made.sampler.step(t).end for t in range(made.sampler.num_steps)]
    assert ends == [2.0, 4.0, 7.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0]


@pytest.mark.parametrize("stop", [6, 7, 8], ids=["before", "at", "after"])
def test_a_run_resumed_around_a_switch_is_the_uninterrupted_one(
    whole: tuple[Any, Path], tmp_path: Path, stop: int
) -> None:
    reference, folder = whole
    torch.manual_seed(99)
    made = build(tmp_path, init=7)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert made.settings.planned == made.state.max_steps == 10
    assert made.drawn == reference.drawn[stop:]
    for key in ("gradients", "groups", "weights", "averages", "after"):
        assert tiny.same_bits(getattr(made.recorder, key), getattr(reference.recorder, key)[stop:]), key
    assert tiny.same_bits(dict(made.model.named_buffers()), dict(reference.model.named_buffers()))
    assert tiny.same_bits(made.settings.state, reference.settings.state[stop:])


@pytest.mark.parametrize("labelled", [1, 2, 3, 8])
def test_a_run_resumed_with_another_batch_switches_at_the_same_point(
    whole: tuple[Any, Path], tmp_path: Path, labelled: int
) -> None:
    """From step 5 (clock 6) on in batches of half, one, one and a half, or four reference batches up to 10."""
    reference, folder = whole
    stages = [STAGES[0], STAGES[1] | {"until": 6}, {"labelled": labelled, "unlabelled": labelled, "until": 10}]
    made = build(tmp_path, [*stages, STAGES[2]], init=7)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert items(made.drawn) == items(reference.drawn[5:])
    kappa = labelled / 2
    ends = [made.sampler.step(t).end for t in range(made.sampler.num_steps)]
    assert ends[:5] == ENDS[:5] and ends[-3:] == ENDS[-3:] and ends[-4] == 10.0
    assert len(ends) == made.state.max_steps == 5 + int(np.ceil(4 / kappa)) + 3
    switch = len(made.drawn) - 3
    cut = 4 % kappa  # the last step before the switch, where batches do not fill the stage
    steps = [float(next(iter(state.values()))["step"]) for state in made.settings.state]
    # Counted in steps of the stage: (4 / 2 + 1) * 2 / kappa, one for each step, then divided by 4 / kappa.
    assert steps[0] == pytest.approx(3 * 2 / kappa)
    # A step that is cut short counts for its own share of data.
    assert steps[switch] * 4 == pytest.approx(3 * 2 + 4)
    kappas = [float(np.log(group[0]["betas"][0]) / np.log(0.9)) for group in made.recorder.groups]
    whole = [kappa] * (switch - 1) + [cut] if cut else [kappa] * switch
    assert kappas == pytest.approx([*whole, *[4.0] * 3])
    found = counts(reference.drawn[:5] + made.drawn)
    for t, end in enumerate(ends):
        unlabelled = 2 * max(0.0, min(end, 10.0) - 4) + 3 * max(0.0, end - 10)
        assert abs(found[1][t] - unlabelled) <= 1 and found[0][t] + found[1][t] == 4 * end


def test_the_ratio_may_change_from_a_checkpoint_on(whole: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = whole
    made = build(tmp_path, [*STAGES[:2], {"labelled": 8, "unlabelled": 8}], init=7)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-7"))
    found = counts(reference.drawn[:7] + made.drawn)
    assert found == ([*LABELLED[:7], 36, 44, 52], [*UNLABELLED[:7], 20, 28, 36])


@pytest.mark.parametrize(
    ("stages", "stop", "message"),
    [
        # The last stage has begun; the stage of the checkpoint; the recipe's ratio in a stage that states none.
        (
            [*STAGES[:2], {"labelled": 8, "unlabelled": 8}],
            8,
            r"unlabelled_ratios: \[\[4.0, 1.0\], \[10.0, 3.0\]\] then",
        ),
        ([STAGES[0], {"labelled": 2, "unlabelled": 6}], 5, r"\[\[4.0, 1.0\]\] then, \[\[4.0, 3.0\]\] now"),
        ([STAGES[0], STAGES[1] | {"until": 9}, STAGES[2]], 7, r"\[\[4.0, 1.0\], \[9.0, 3.0\]\] now"),
    ],
)
def test_ratios_of_steps_done_cannot_change(
    whole: tuple[Any, Path], tmp_path: Path, stages: Schedule, stop: int, message: str
) -> None:
    made = build(tmp_path, stages)
    with pytest.raises(ValueError, match=message) as error:
        made.train(resume_from_checkpoint=str(whole[1] / f"checkpoint-{stop}"))
    assert f"may from reference step {ENDS[stop - 1]:g} on" in str(error.value)


def test_the_recipes_ratio_may_change_where_no_stage_had_it(whole: tuple[Any, Path], tmp_path: Path) -> None:
    made = build(tmp_path, init=7, ratio=5.0)
    made.train(resume_from_checkpoint=str(whole[1] / "checkpoint-6"))
    assert made.drawn == whole[0].drawn[6:]
    assert sum("in the recipe 5" in warning for warning in made.plan.warnings()) == 2


def test_in_seconds_too(tmp_path: Path) -> None:
    """Both sources keep within an utterance of their targets, at other batches and under resume."""
    stages: Schedule = [
        {"batch_size": 12.0, "until": 4},
        {"labelled": 12.0, "unlabelled": 12.0, "until": 10},
        {"labelled": 9.0, "unlabelled": 27.0},
    ]
    shared: dict[str, Any] = {"batch_unit": "seconds", "reference_batch_size": 12.0, "bucket_window": 3}
    whole = build(tmp_path / "whole", stages, save_strategy="steps", save_steps=1, **shared)
    whole.train()
    sizes = np.diff(whole.sampler.stream.cumulative_units)
    for end, drawn in zip(np.cumsum([len(step) for step in whole.drawn]), whole.drawn, strict=True):
        position = int(end)
        clock = float(whole.sampler.stream.clock(position))
        target = 6 * max(0.0, min(clock, 10.0) - 4) + 9 * max(0.0, clock - 10)
        # The last utterance before pl_start overshoots it too.
        found = sum(sizes[p] for p in range(position) if whole.sampler.stream.source[p] == 1)
        assert abs(found - target) <= sizes.max() * 1.5 and drawn
    stop = next(t for t in range(whole.sampler.num_steps) if whole.sampler.done(t).position >= 10.0)
    for changed in (stages[2], {"labelled": 30.0, "unlabelled": 6.0}):
        made = build(tmp_path / str(changed["labelled"]), [*stages[:2], changed], init=5, **shared)
        made.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
        same = changed is stages[2]
        assert (made.drawn == whole.drawn[stop:]) == same
        assert tiny.same_bits(tiny.average(made), tiny.average(whole)) == same


def test_sizes_need_unlabelled_data_and_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 1 states 4 labelled and 4 unlabelled units, but the run has no"):
        args = tiny.arguments(tmp_path, max_steps=22, batch_schedule=json.dumps(STAGES))
        tiny.trainer(tiny.bert(), args, tiny.sentences(12))
    with pytest.raises(ValueError, match=r"stage 0 states 4 labelled .* up to pl_start=4 all units are labelled"):
        build(tmp_path, STAGES[1:])
    with pytest.raises(ValueError, match=r"max_steps is needed where a stage states .*num_train_epochs=2"):
        build(tmp_path, max_steps=-1, num_train_epochs=2)


def test_a_schedule_of_sizes_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    path.write_text(json.dumps(STAGES))
    args: EMATrainingArguments = tiny.arguments(tmp_path, batch_schedule=str(path))
    assert args.schedule().to_json() == STAGES
    assert [b for _, b in pairwise(stage.batch_size for stage in args.schedule().stages)] == [8, 16]
