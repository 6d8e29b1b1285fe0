from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.scaling import BatchSchedule, OptimizerValues, Recipe, ScalingPlan, Stage

BASE: dict[str, Any] = {
    "reference_batch_size": 64,
    "unit": "samples",
    "max_steps": 1000,
    "learning_rate": 1e-3,
    "ema_momentum": 0.99,
}


def recipe(**changes: Any) -> Recipe:
    return Recipe(**(BASE | changes))


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / 1000))


def test_reference_run_is_the_recipe_bit_for_bit() -> None:
    tuned = recipe(weight_decay=0.05, max_grad_norm=0.7, pl_start=500)
    plan = ScalingPlan(tuned, BatchSchedule.constant(64), lr_multiplier=cosine)
    assert len(plan) == 1000
    for t in (0, 1, 499, 500, 999):
        values = plan.step(t)
        assert (values.start, values.end, values.kappa, values.stage_kappa) == (t, t + 1, 1, 1)
        assert values.learning_rate == 1e-3 * cosine(t)
        assert (values.weight_decay, values.betas, values.eps) == (0.05, (0.9, 0.999), 1e-8)
        assert values.max_grad_norm == 0.7
        assert values.momentum == pytest.approx(0.99, rel=1e-15)
        assert values.ema_weight == pytest.approx(0.01, rel=1e-14)
    with pytest.raises(IndexError, match="optimizer step 1000 is outside the plan of 1000 steps"):
        plan.step(1000)


def test_scaled_step() -> None:
    plan = ScalingPlan(
        recipe(weight_decay=0.1, max_grad_norm=1.0), BatchSchedule.two_stage(64, 8, 500), lr_multiplier=cosine
    )
    assert len(plan) == 500 + 63 and plan.stages[1].start == 500
    values = plan.step(510)
    assert (values.start, values.end, values.stage_kappa) == (580, 588, 8)
    mean = sum(cosine(k) for k in range(580, 588)) / 8
    assert values.learning_rate == pytest.approx(1e-3 * mean * math.sqrt(8), rel=1e-14)
    assert 1 - values.learning_rate * values.weight_decay == pytest.approx((1 - 1e-4 * mean) ** 8, rel=1e-14)
    assert values.betas == pytest.approx((0.9**8, 0.999**8), rel=1e-14)
    assert values.eps == pytest.approx(1e-8 / math.sqrt(8)) and values.max_grad_norm == pytest.approx(8**-0.5)
    assert values.momentum == pytest.approx(0.99**8, rel=1e-14)
    assert values.ema_weight == pytest.approx(1 - 0.99**8, rel=1e-13)
    # The last step is cut short, to a stage of its own.
    last = plan.step(562)
    assert (last.kappa, last.stage_kappa) == (4, 4)
    assert last.betas == pytest.approx((0.9**4, 0.999**4), rel=1e-14)
    assert last.momentum == pytest.approx(0.99**4, rel=1e-14) and last.max_grad_norm == 0.5


def test_sgd_plan() -> None:
    values = ScalingPlan(recipe(optimizer="sgd", sgd_momentum=0.9), BatchSchedule.constant(128)).step(3)
    assert (values.betas, values.eps) == (None, None)
    assert values.sgd_momentum == pytest.approx(0.81, rel=1e-14)
    assert values.learning_rate == pytest.approx(2e-3 * 1.9, rel=1e-14)


def test_rmsprop_plan() -> None:
    tuned = recipe(optimizer="rmsprop", sgd_momentum=0.9, alpha=0.995, eps=1e-6, weight_decay=0.1)
    plan = ScalingPlan(tuned, BatchSchedule.two_stage(64, 4, 500))
    first, values = plan.step(0), plan.step(500)
    assert (first.learning_rate, first.alpha, first.eps, first.sgd_momentum) == (1e-3, 0.995, 1e-6, 0.9)
    assert (values.betas, values.weight_decay) == (None, 0.1)
    assert values.alpha == pytest.approx(0.995**4, rel=1e-14) and values.eps == 5e-7
    assert values.sgd_momentum == pytest.approx(0.9**4, rel=1e-14)
    assert values.learning_rate == pytest.approx(2e-3 * (1 - 0.9**4) / (1 - 0.9), rel=1e-13)
    table = {line[:30].strip(): line[30:].split() for line in plan.explain().splitlines()}
    assert table["alpha"] == ["0.995", "0.995", "0.9801495"]
    assert table["optimizer momentum"] == ["0.9", "0.9", "0.6561"]
    assert "betas" not in table and plan.stage_values()[1]["alpha"] == values.alpha


@pytest.mark.parametrize(
    ("optimizer", "rows"),
    [
        ("sgd", {"optimizer momentum"}),
        ("adamw_torch", {"betas", "eps"}),
        ("rmsprop", {"alpha", "eps", "optimizer momentum"}),
        ("adagrad", {"eps"}),
    ],
)
def test_a_table_has_the_rows_of_its_optimizer(optimizer: str, rows: set[str]) -> None:
    plan = ScalingPlan(recipe(optimizer=optimizer), BatchSchedule.constant(256))
    labels = {line[:30].strip() for line in plan.explain().splitlines()}
    assert labels & {"betas", "alpha", "eps", "optimizer momentum"} == rows
    values = plan.step(0)
    found = {
        "betas": values.betas,
        "alpha": values.alpha,
        "eps": values.eps,
        "optimizer momentum": values.sgd_momentum,
    }
    assert {name for name, value in found.items() if value is not None} == rows


def test_adagrad_plan() -> None:
    plan = ScalingPlan(
        recipe(optimizer="adagrad", eps=1e-4, max_grad_norm=1.0, max_steps=10), BatchSchedule.constant(256)
    )
    found = [plan.step(t) for t in range(3)]
    assert [values.kappa for values in found] == [4, 4, 2]
    # The last step is at half the others' batch.
    assert [values.learning_rate for values in found] == [1e-3] * 3
    assert [values.eps for values in found] == [2.5e-5, 2.5e-5, 5e-5]
    assert [values.max_grad_norm for values in found] == pytest.approx([0.5, 0.5, 2**-0.5])


def test_an_optimizer_without_a_rule_has_the_values_of_the_rule_it_is_given() -> None:
    foreign = recipe(optimizer="paged_adamw_32bit")
    scaled = ScalingPlan(foreign, BatchSchedule.constant(256), scaling_rule="adamw").step(0)
    assert scaled.betas == pytest.approx((0.9**4, 0.999**4)) and scaled.learning_rate == 2e-3
    left = ScalingPlan(foreign, BatchSchedule.constant(256), scaling_rule="none").step(0)
    assert (left.betas, left.eps, left.learning_rate) == (None, None, 1e-3)


def test_lr_factor_is_the_mean_over_the_interval() -> None:
    plan = ScalingPlan(recipe(), BatchSchedule.constant(64), lr_multiplier=cosine)
    for k in (0, 17, 999):
        assert plan.lr_factor(k, k + 1) == plan.lr_factor(k + 0.25, k + 0.75) == cosine(k)
    expected = (0.5 * cosine(2) + cosine(3) + cosine(4) + 0.25 * cosine(5)) / 2.75
    assert plan.lr_factor(2.5, 5.25) == pytest.approx(expected, rel=1e-15)
    # The learning rate summed over the data is the same for every layout, and so at the decayed tail.
    borders = [0, 0.3, 8, 8.7, 100, 512.25, 990, 999.5, 1000]
    total = sum(plan.lr_factor(a, b) * (b - a) for a, b in pairwise(borders))
    assert total == pytest.approx(math.fsum(map(cosine, range(1000))), rel=1e-14)
    assert plan.lr_factor(998, 1000) == pytest.approx((cosine(998) + cosine(999)) / 2, rel=1e-15)
    # A real step may end an utterance past the run's end; the schedule is not asked for step 1000.
    assert plan.lr_factor(1000, 1001.5) == cosine(999)
    with pytest.raises(ValueError, match="0 <= start < end"):
        plan.lr_factor(3, 3)


def test_warm_up_without_a_schedule() -> None:
    plan = ScalingPlan(recipe(warmup_steps=10), BatchSchedule.constant(256))
    assert plan.step(0).learning_rate == pytest.approx(2e-3 * (0 + 0.1 + 0.2 + 0.3) / 4, rel=1e-14)
    assert plan.step(3).learning_rate == 2e-3
    assert ScalingPlan(recipe(), BatchSchedule.constant(64)).step(0).learning_rate == 1e-3


def test_optimizer_values_of_another_param_group() -> None:
    plan = ScalingPlan(recipe(weight_decay=0.1), BatchSchedule.constant(256), lr_multiplier=cosine)
    group = OptimizerValues(5e-4, 0.0, betas=(0.8, 0.9), eps=1e-6)
    values = plan.optimizer_values(group, start=0, end=2, stage_kappa=4)
    assert values.learning_rate == pytest.approx(5e-4 * plan.lr_factor(0, 2) * math.sqrt(4) / 2, rel=1e-15)
    assert values.weight_decay == 0.0 and values.betas == pytest.approx((0.8**4, 0.9**4))
    assert values.eps == 5e-7


@pytest.mark.parametrize("batches", [(64,), (192,), (32, 64, 128, 256), (448, 100, 7)])
def test_total_decay_does_not_depend_on_the_layout(batches: tuple[float, ...]) -> None:
    ends = np.linspace(0, 1000, len(batches) + 1)[1:-1].tolist()
    stages = [Stage(batch, end) for batch, end in zip(batches[:-1], ends, strict=True)] + [Stage(batches[-1])]
    plan = ScalingPlan(recipe(pl_start=333.3), BatchSchedule(tuple(stages)))
    intervals = list(pairwise(plan.borders.tolist()))
    assert math.fsum(plan.log_momentum(a, b) for a, b in intervals) == pytest.approx(1000 * math.log(0.99), rel=1e-12)
    before = math.fsum(plan.log_momentum(a, b) for a, b in intervals if b <= 333.3)
    assert before == pytest.approx(333.3 * math.log(0.99), rel=1e-12)


def test_ema_start_and_unscaled_momentum() -> None:
    plan = ScalingPlan(recipe(ema_start=100), BatchSchedule.constant(512))
    assert (
        plan.log_momentum(99, 107) == -math.inf and plan.step(12).ema_weight == 1.0 and plan.step(12).momentum == 0.0
    )
    assert plan.log_momentum(100 - 1e-12, 108) == pytest.approx(8 * math.log(0.99), rel=1e-12)
    unscaled = ScalingPlan(recipe(), BatchSchedule.constant(512), scale_ema=False)
    assert unscaled.step(0).momentum == pytest.approx(0.99, rel=1e-15)
    assert unscaled.step(0).learning_rate == pytest.approx(1e-3 * math.sqrt(8))
    assert unscaled.stage_values()[0]["half_life_units"] == pytest.approx(512 * math.log(2) / -math.log(0.99))


def test_rule_override() -> None:
    tuned = recipe(weight_decay=0.1, max_grad_norm=1.0)
    values = ScalingPlan(tuned, BatchSchedule.constant(512), scaling_rule="none").step(0)
    assert (values.learning_rate, values.weight_decay, values.betas) == (1e-3, 0.1, (0.9, 0.999))
    assert values.max_grad_norm == 1.0 and values.momentum == pytest.approx(0.99**8, rel=1e-14)
    with pytest.raises(ValueError, match="no scaling rule for optimizer 'adafactor'"):
        ScalingPlan(recipe(optimizer="adafactor"), BatchSchedule.constant(64))
    assert len(ScalingPlan(recipe(optimizer="adafactor"), BatchSchedule.constant(64), scaling_rule="none")) == 1000


def test_resumed_plan_keeps_what_was_run() -> None:
    first = ScalingPlan(recipe(pl_start=100), BatchSchedule.two_stage(64, 3, 100))
    done = first.step_borders.prefix(150)
    plan = ScalingPlan(recipe(pl_start=100), BatchSchedule.two_stage(64, 8, 100), done=done)
    assert plan.borders[:151].tobytes() == first.borders[:151].tobytes()
    assert plan.borders[150:153].tolist() == [250, 258, 266] and len(plan) == 150 + 94
    assert plan.step(149) == first.step(149) and plan.step(150).stage_kappa == 8
    assert "150 steps are already run and fixed, up to reference step 250." in plan.explain()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_batch_size": 0}, "reference_batch_size must be a finite number above 0, got 0"),
        ({"unit": "frames"}, "unit must be one of samples, seconds, tokens, got 'frames'"),
        ({"max_steps": -5}, "max_steps"),
        ({"ema_momentum": 1.0}, r"ema_momentum must lie in \[0, 1\), got 1.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"sgd_momentum": 1.0}, "momentum"),
        ({"alpha": 1.0}, "alpha"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"pl_start": 1000}, r"pl_start=1000 must be before the end of the run \(max_steps=1000\)"),
        ({"ema_start": -1}, "ema_start must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_impossible_weight_decay_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"learning_rate \* weight_decay is 2"):
        ScalingPlan(recipe(learning_rate=2.0, weight_decay=1.0), BatchSchedule.constant(64))


# Each case: what is raised on one side of the threshold and not on the other.
@pytest.mark.parametrize(
    ("fragment", "raises", "silent"),
    [
        ("is 0.101 at kappa=1.01, above 0.1", {"ema_momentum": 0.9, "kappa": 1.01}, {"ema_momentum": 0.9, "kappa": 1}),
        ("above 0.1:", {"ema_momentum": 0.9898, "kappa": 10}, {"ema_momentum": 0.9902, "kappa": 10}),
        ("strong warning: kappa", {"ema_momentum": 0.979, "kappa": 10}, {"ema_momentum": 0.981, "kappa": 10}),
        ("momentum of one step is", {"ema_momentum": 0.99, "kappa": 100}, {"ema_momentum": 0.99, "kappa": 99}),
        ("momentum of one step is", {"ema_momentum": 0.36, "kappa": 1}, {"ema_momentum": 0.37, "kappa": 1}),
        ("teacher still holds", {"pl_start": 298}, {"pl_start": 299}),
        ("teacher still holds", {"pl_start": 398, "ema_start": 100}, {"pl_start": 399, "ema_start": 100}),
        ("lies after pl_start", {"pl_start": 400, "ema_start": 401}, {"pl_start": 400, "ema_start": 400}),
        ("kappa is 0.5, below 1", {"kappa": 0.5}, {"kappa": 1}),
        ("kappa is 2 from step 0", {"kappa": 2}, {"kappa": 2, "small_batch_until": 10}),
        (
            "half-life of the average, 1001 steps",
            {"ema_momentum": 0.5 ** (1 / 1001)},
            {"ema_momentum": 0.5 ** (1 / 999)},
        ),
        (
            "half-life of the average",
            {"ema_momentum": 0.5 ** (1 / 999), "ema_start": 2},
            {"ema_momentum": 0.5 ** (1 / 997)},
        ),
        (
            "alpha=0.9 becomes 0.368",
            {"optimizer": "rmsprop", "alpha": 0.9, "kappa": 9.5},
            {"optimizer": "rmsprop", "alpha": 0.9, "kappa": 9.4},
        ),
        ("beta2=0.9 becomes", {"betas": (0.9, 0.9), "kappa": 9.5}, {"betas": (0.9, 0.9), "kappa": 9.4}),
    ],
)
def test_warnings_at_their_thresholds(fragment: str, raises: dict[str, Any], silent: dict[str, Any]) -> None:
    def warnings(kappa: float = 1, small_batch_until: float = 0, **changes: Any) -> str:
        return "\n".join(
            ScalingPlan(recipe(**changes), BatchSchedule.two_stage(64, kappa, small_batch_until)).warnings()
        )

    assert fragment in warnings(**raises)
    assert fragment not in warnings(**silent)


def test_no_warning_for_a_sound_plan() -> None:
    plan = ScalingPlan(recipe(ema_momentum=0.993, pl_start=500), BatchSchedule.two_stage(64, 8, 500))
    assert plan.warnings() == []


def test_unscaled_momentum_is_judged_by_optimizer_steps() -> None:
    tuned = recipe(ema_momentum=0.99, pl_start=400)
    assert ScalingPlan(tuned, BatchSchedule.two_stage(64, 4, 400)).warnings() == []
    found = ScalingPlan(tuned, BatchSchedule.constant(256), scale_ema=False).warnings()
    (warning,) = (text for text in found if "from step 0" not in text)
    assert f"still holds {0.99**100:.3g} of the weights" in warning


def test_an_unscaled_half_life_is_compared_with_optimizer_steps() -> None:
    tuned = recipe(ema_momentum=0.999, max_steps=1000)
    (found,) = (
        text for text in ScalingPlan(tuned, BatchSchedule.constant(512), scale_ema=False).warnings() if "half" in text
    )
    assert "692.8 optimizer steps" in found and "longer than the run (125 of them from ema_start)" in found


def test_a_stage_shorter_than_one_of_its_steps() -> None:
    schedule = BatchSchedule((Stage(64, 100), Stage(512, 103), Stage(128)))
    plan = ScalingPlan(recipe(), schedule)
    row, step = plan.stage_values()[1], plan.step(100)
    assert row["steps"] == 1 and step.kappa == 3
    for name in ("learning_rate", "weight_decay", "betas", "eps", "momentum"):
        assert row[name] == pytest.approx(getattr(step, name))
    (warning,) = plan.warnings()
    assert "from reference step 100 to 103 is shorter than one step of its batch (kappa=8)" in warning


def test_a_batch_that_does_not_grow_has_no_small_start() -> None:
    assert "smaller batches" not in ScalingPlan(recipe(max_steps=100), BatchSchedule.constant(64 * 32)).explain()


def test_table_and_summary() -> None:
    tuned = recipe(weight_decay=0.1, ema_momentum=0.9999, max_grad_norm=1.0, max_steps=20_000, pl_start=5_000)
    plan = ScalingPlan(tuned, BatchSchedule.two_stage(64, 8, 5_000))
    lines = plan.explain().splitlines()
    width = len("EMA half-life (optimizer steps)")
    table = {line[:width].strip(): line[width:].split() for line in lines}
    assert table["kappa"] == ["1", "1", "8"]
    assert table["optimizer steps"] == ["20000", "5000", "1875"]
    assert table["EMA momentum"] == ["0.9999", "0.9999", "0.9992003"]
    assert table["clip norm"] == ["1", "1", "0.3535534"]
    assert len({*table["EMA half-life (samples)"]}) == 1
    totals = (
        "6875 optimizer steps for 20000 reference steps (1.28e+06 samples); idealised speed-up 2.91x (8x without the "
        "smaller batches before). Rule: adamw."
    )
    assert totals in lines
    assert "In optimizer steps (reference steps): pseudo-labels start at 5000 (5000)." in lines
    assert "Pseudo-labels from reference step 5000; there the teacher holds 0.607 of the weights it had at 0." in lines
    assert any(line.startswith("WARNING: at pl_start=5000 the teacher still holds 0.607") for line in lines)

    summary = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert summary["steps"] == 6875 and summary["idealised_speedup"] == pytest.approx(20_000 / 6875)
    assert [stage["steps"] for stage in summary["stages"]] == [5000, 1875]
    assert summary["stages"][1]["momentum"] == pytest.approx(0.9999**8, rel=1e-14)
    assert summary["stages"][1]["half_life_units"] == pytest.approx(summary["reference"]["half_life_units"], rel=1e-14)
    assert summary["stages"][1]["weight_decay"] * summary["stages"][1]["learning_rate"] == pytest.approx(
        1 - (1 - 1e-4) ** 8, rel=1e-11
    )
    assert Recipe(**(summary["recipe"] | {"betas": tuple(summary["recipe"]["betas"])})) == tuned
    assert BatchSchedule.from_json(summary["schedule"]) == plan.schedule


def test_published_speed_up() -> None:
    # 60 of 480 epochs at the small batch, then 6 times as much: 3.7x, not 6x.
    tuned = recipe(max_steps=4800, steps_per_epoch=10)
    plan = ScalingPlan(tuned, BatchSchedule((Stage(64, 60, "epochs"), Stage(384))))
    assert plan.to_dict()["idealised_speedup"] == pytest.approx(480 / (60 + 420 / 6)) and len(plan) == 1300


def test_events_in_optimizer_steps() -> None:
    tuned = recipe(max_steps=100, warmup_steps=30, ema_start=10, pl_start=50, augment_start=20)
    plan = ScalingPlan(tuned, BatchSchedule.two_stage(64, 8, 20))
    # 20 steps, then 20 to 50 in steps of 8, the last of them cut short: 4 steps.
    assert [plan.step_at(clock) for clock in (0, 10, 20, 21, 30, 50, 100)] == [0, 10, 20, 21, 22, 24, len(plan)]
    stated = (
        "warm-up ends at 22 (30); the average starts at 10 (10); augmentation starts at 20 (20); "
        "pseudo-labels start at 24 (50)."
    )
    assert f"In optimizer steps (reference steps): {stated}" in plan.explain()
