"""The plan's values, as every step of a run really uses them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import get_cosine_schedule_with_warmup, get_scheduler

from hf_ema_scaling.scaling import weight_from_log_momentum
from hf_ema_scaling.training.scheduler import PlanScheduler, lr_multiplier

DOUBLING = json.dumps([{"batch_size": 4, "until": 5}, {"batch_size": 8, "until": 12}, {"batch_size": 16}])
# Borders by hand: 5 single steps, then 7 reference steps by two (3 whole, 1 half), then 11 by four (2 whole, 3 left).
DOUBLING_KAPPAS = [1.0] * 5 + [2.0, 2.0, 2.0, 1.0] + [4.0, 4.0, 3.0]
TRIPLE_KAPPAS = [1.0] * 5 + [3.0] * 6


def run(folder: Path, **changes: Any) -> Any:
    values = {
        "max_steps": 23,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,
    }
    made = tiny.trainer(tiny.bert(), tiny.arguments(folder, **(values | changes)), tiny.sentences(30))
    made.train()
    return made


@pytest.fixture(scope="module", params=["doubling", "triple"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    folder = tmp_path_factory.mktemp("run")
    if request.param == "doubling":
        return run(folder, batch_schedule=DOUBLING), DOUBLING_KAPPAS
    return run(folder, kappa=3.0, small_batch_until=5), TRIPLE_KAPPAS


def test_the_number_of_optimizer_steps_is_known_and_run(finished: tuple[Any, list[float]]) -> None:
    made, kappas = finished
    assert made.state.max_steps == made.state.global_step == len(made.plan) == len(kappas)
    assert [made.plan.step(t).kappa for t in range(len(kappas))] == pytest.approx(kappas)
    assert [len(step) for step in made.drawn] == [4 * kappa for kappa in kappas]
    assert made.args.max_steps == 23 and made.args.warmup_steps == 4


def test_every_param_group_holds_the_plans_values(finished: tuple[Any, list[float]]) -> None:
    made, _ = finished
    assert len(made.recorder.groups) == len(made.plan)
    for t, (decayed, plain) in enumerate(made.recorder.groups):
        values = made.plan.step(t)
        for group in (decayed, plain):
            assert group["lr"] == pytest.approx(values.learning_rate, rel=1e-12, abs=1e-18)
            assert group["betas"] == pytest.approx(values.betas, rel=1e-12)
            assert group["eps"] == pytest.approx(values.eps, rel=1e-12)
        assert decayed["weight_decay"] == pytest.approx(values.weight_decay, rel=1e-12)
        assert plain["weight_decay"] == 0.0


def test_those_values_by_hand(finished: tuple[Any, list[float]]) -> None:
    """The learning rate is sqrt(kappa) times the mean of transformers' own over the reference steps covered."""
    made, kappas = finished
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    reference = get_cosine_schedule_with_warmup(optimizer, 4, 23)
    rates = []
    for _ in range(23):
        rates.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    start = 0
    for t, kappa in enumerate(kappas):
        covered = rates[start : start + int(kappa)]
        start += int(kappa)
        mean = sum(covered) / len(covered)
        group = made.recorder.groups[t][0]
        assert group["lr"] == pytest.approx(math.sqrt(kappa) * mean, rel=1e-12, abs=1e-18)
        # The last step of `doubling` is cut short, to a stage of its own.
        assert group["betas"] == pytest.approx((0.9**kappa, 0.95**kappa), rel=1e-12)
        assert group["eps"] == pytest.approx(1e-4 / math.sqrt(kappa), rel=1e-12)
        # One step shrinks the weights as kappa reference steps do.
        assert 1 - group["lr"] * group["weight_decay"] == pytest.approx((1 - mean * 0.1) ** kappa, rel=1e-12)
    assert start == 23


def test_the_average_is_the_closed_form_of_the_recorded_weights(finished: tuple[Any, list[float]]) -> None:
    made, kappas = finished
    recorder = made.recorder
    expected = {name: value.double() for name, value in recorder.initial.items()}
    for t, kappa in enumerate(kappas):
        rho = 0.9**kappa
        expected = {
            name: rho * value + (1 - rho) * recorder.weights[t][name].double() for name, value in expected.items()
        }
        found = {name: recorder.averages[t][name] for name in expected}
        assert tiny.difference(expected, found) < 3e-7 * (t + 1)
    last = {name: recorder.weights[-1][name] for name in expected}
    assert tiny.difference(expected, last) > 1e-3


def test_adams_state_is_rescaled_at_a_switch_and_only_there(finished: tuple[Any, list[float]]) -> None:
    made, kappas = finished
    recorder = made.recorder
    stage = [made.sampler.step(t).stage_kappa for t in range(len(kappas))]
    assert stage == pytest.approx(kappas) and len(set(stage)) == (4 if len(kappas) == 12 else 2)
    for t in range(1, len(kappas)):
        q = stage[t] / stage[t - 1]
        beta1, beta2 = recorder.groups[t][0]["betas"]
        for name, before in recorder.before[t].items():
            after, gradient = recorder.after[t][name], recorder.gradients[t][name]
            assert float(after["step"]) == pytest.approx(float(before["step"]) / q + 1, rel=1e-6)
            second = before["exp_avg_sq"].double() / q * beta2 + (1 - beta2) * gradient.double() ** 2
            torch.testing.assert_close(after["exp_avg_sq"].double(), second, rtol=1e-5, atol=1e-20)
            first = before["exp_avg"].double() * beta1 + (1 - beta1) * gradient.double()
            torch.testing.assert_close(after["exp_avg"].double(), first, rtol=1e-4, atol=1e-10)


def test_ema_start_makes_the_average_the_student_until_then(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=8, warmup_steps=0, kappa=2.0, ema_start=4)
    recorder = made.recorder
    for t in (0, 1):
        assert all(torch.equal(recorder.averages[t][name], value) for name, value in recorder.weights[t].items())
    for t in (2, 3):
        assert any(not torch.equal(recorder.averages[t][name], value) for name, value in recorder.weights[t].items())


def test_the_ablation_leaves_the_momentum_alone(tmp_path: Path) -> None:
    recorder = run(tmp_path, max_steps=8, warmup_steps=0, kappa=4.0, scale_ema=False, scaling_rule="none").recorder
    name = "classifier.weight"
    expected = recorder.initial[name].double()
    for t in (0, 1):
        expected = 0.9 * expected + 0.1 * recorder.weights[t][name].double()
        torch.testing.assert_close(recorder.averages[t][name].double(), expected, rtol=1e-6, atol=1e-7)
        assert recorder.groups[t][0]["betas"] == (0.9, 0.95) and recorder.groups[t][0]["eps"] == 1e-4


def test_sgd_with_momentum_follows_its_own_rule(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    args = tiny.arguments(tmp_path, max_steps=10, kappa=3.0, small_batch_until=4, max_grad_norm=0.5)
    made = tiny.trainer(model, args, tiny.sentences(30), optimizers=(optimizer, None))
    made.train()
    recorder = made.recorder
    assert [group[0]["momentum"] for group in recorder.groups] == pytest.approx([0.9] * 4 + [0.729] * 2)
    rates = [1e-2] * 4 + [1e-2 * 3 * (1 - 0.729) / (1 - 0.9)] * 2
    assert [group[0]["lr"] for group in recorder.groups] == pytest.approx(rates)
    assert made.plan.max_grad_norm(3.0) == 0.5
    name = "classifier.weight"
    # Changing mu from 0.9 to 0.729 shrinks the buffer: what it holds is g / (1 - mu).
    buffer = recorder.before[4][name]["momentum_buffer"].double() * ((1 - 0.9) / (1 - 0.729))
    expected = 0.729 * buffer + recorder.gradients[4][name].double()
    torch.testing.assert_close(recorder.after[4][name]["momentum_buffer"].double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_clipping_scales_with_the_rule_and_its_rate_is_logged(tmp_path: Path, kappa: float) -> None:
    made = run(
        tmp_path,
        max_steps=8,
        kappa=kappa,
        warmup_steps=0,
        max_grad_norm=0.2,
        logging_strategy="steps",
        logging_steps=4,
    )
    limit = 0.2 / math.sqrt(kappa)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in step.values())) for step in made.recorder.gradients]
    clipped = [abs(norm - limit) < 1e-5 for norm in norms]
    assert all(norm < limit + 1e-5 for norm in norms) and any(clipped)
    logs = [entry for entry in made.state.log_history if "clip/rate" in entry]
    per_log = int(4 / kappa)
    for number, entry in enumerate(logs):
        assert entry["clip/rate"] == sum(clipped[number * per_log : (number + 1) * per_log]) / per_log


@pytest.mark.parametrize(
    ("name", "specific"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("polynomial", {"lr_end": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
    ],
)
def test_multipliers_are_transformers_own(name: str, specific: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=10, scheduler_specific_kwargs=specific
    )
    function = lr_multiplier(name, learning_rate=0.5, warmup_steps=3, reference_steps=10, specific=specific)
    for step in range(10):
        assert function(step) == pytest.approx(schedule.get_last_lr()[0] / 0.5, rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_warmup_below_one_is_a_share_of_the_reference_steps(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=20, warmup_steps=0.25, lr_scheduler_type="constant_with_warmup", kappa=2.0)
    rates = [group[0]["lr"] / (1e-2 * math.sqrt(2)) for group in made.recorder.groups]
    assert rates == pytest.approx([0.1, 0.5, 0.9, *[1.0] * 7])


def test_a_schedulers_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=2)
    scheduler = made.lr_scheduler
    assert isinstance(scheduler, PlanScheduler) and scheduler.state_dict() == {"stage_kappa": 1.0}
    with pytest.raises(ValueError, match="written by another trainer"):
        scheduler.load_state_dict({"last_epoch": 3})


def test_log_momenta_of_any_partition_add_up(finished: tuple[Any, list[float]]) -> None:
    made, kappas = finished
    borders = made.plan.borders
    total = sum(made.plan.log_momentum(float(borders[t]), float(borders[t + 1])) for t in range(len(kappas)))
    assert total == pytest.approx(23 * math.log(0.9), rel=1e-12)
    assert weight_from_log_momentum(total) == pytest.approx(1 - 0.9**23, rel=1e-12)
