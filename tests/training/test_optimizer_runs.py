"""Runs with every family of optimizers: each step uses the plan's values, each switch its rule, a resume every bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lamb import Lamb, LAMBRule

from hf_ema_scaling import register_scaling_rule

# Steps of 1, 1, 1, 1 | 4, 4, 1 | 2, 2, 2 reference steps: the end of a stage cuts one short, to a stage of its own.
SCHEDULE = json.dumps([{"batch_size": 4, "until": 4}, {"batch_size": 16, "until": 13}, {"batch_size": 8}])
KAPPAS = [1.0] * 4 + [4.0, 4.0, 1.0] + [2.0] * 3
STAGES = KAPPAS
LR, DECAY = 1e-2, 0.1
Groups = list[dict[str, Any]]


def two_groups(model: Any) -> Groups:
    weights = list(model.parameters())
    return [{"params": weights[::2], "weight_decay": DECAY}, {"params": weights[1::2], "weight_decay": 0.0}]


# `None`: Trainer makes it by that name.
OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer] | None] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "rmsprop": None,
    "centered": lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.95, eps=1e-3, momentum=0.8, centered=True),
    "adagrad": None,
    "initial": lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-3, initial_accumulator_value=0.1),
    "lamb": lambda p: Lamb(p, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY),
}


def trainer(folder: Path, name: str, init: int = 0, **changes: Any) -> Any:
    register_scaling_rule("Lamb", LAMBRule("lamb"), replace=True)
    model = tiny.bert(dropout=0.1, seed=init)
    make = OPTIMIZERS[name]
    values: dict[str, Any] = {
        "max_steps": 19,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if not {"kappa", "batch_size", "batch_schedule"} & changes.keys():
        values["batch_schedule"] = SCHEDULE
    more: dict[str, Any] = {}
    if make is None:
        values["optim"] = name
    else:
        more["optimizers"] = (make(two_groups(model)), None)
    return tiny.trainer(model, tiny.arguments(folder, **(values | changes)), tiny.sentences(30), **more)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, request.param)
    made.train()
    return request.param, made, folder


def test_every_param_group_of_every_step_holds_the_plans_values(finished: tuple[str, Any, Path]) -> None:
    _, made, _ = finished
    assert len(made.recorder.groups) == len(made.plan) == len(KAPPAS)
    has = made.plan.rule.hyper_parameters
    for t, (decayed, plain) in enumerate(made.recorder.groups):
        values = made.plan.step(t)
        assert (values.kappa, values.stage_kappa) == (pytest.approx(KAPPAS[t]), STAGES[t])
        planned = {"betas": values.betas, "alpha": values.alpha, "eps": values.eps, "momentum": values.sgd_momentum}
        assert {key for key, value in planned.items() if value is not None} == set(has)
        for group in (decayed, plain):
            assert group["lr"] == pytest.approx(values.learning_rate, rel=1e-12)
            for key in has:
                assert group[key] == pytest.approx(planned[key], rel=1e-12), key
        assert decayed["weight_decay"] == pytest.approx(values.weight_decay, rel=1e-12)
        assert plain["weight_decay"] == 0.0


def test_those_values_by_hand(finished: tuple[str, Any, Path]) -> None:
    name, made, _ = finished
    clock = 0.0
    for kappa, k, groups in zip(KAPPAS, STAGES, made.recorder.groups, strict=True):
        rates = [LR * 0.5 * (1 + math.cos(math.pi * step / 19)) for step in range(int(clock), int(clock + kappa))]
        rate, group = sum(rates) / len(rates), groups[0]
        clock += kappa
        expected = {
            "sgd": {"lr": kappa * rate * (1 - 0.9**k) / 0.1, "momentum": 0.9**k},
            "rmsprop": {"lr": kappa**0.5 * rate, "alpha": 0.99**k, "eps": 1e-8 / k**0.5, "momentum": 0},
            "centered": {
                "lr": kappa**0.5 * rate * (1 - 0.8**k) / 0.2,
                "alpha": 0.95**k,
                "eps": 1e-3 / k**0.5,
                "momentum": 0.8**k,
            },
            "adagrad": {"lr": rate * kappa / k, "eps": 1e-10 / k},
            "initial": {"lr": rate * kappa / k, "eps": 1e-3 / k},
            "lamb": {
                "lr": (kappa * (1 - 0.9**k) / (1 + 0.9**k) * 19) ** 0.5 * rate,
                "eps": 1e-6 / k**0.5,
                "weight_decay": kappa**0.5 * DECAY,
            },
        }[name]
        assert {key: group[key] for key in expected} == pytest.approx(expected, rel=1e-9)
        if name == "lamb":
            assert group["betas"] == pytest.approx((0.9**k, 0.95**k), rel=1e-12)
        assert group["weight_decay"] == pytest.approx(expected.get("weight_decay", DECAY))
    assert clock == 19


def test_the_state_is_rescaled_at_a_switch_and_only_there(finished: tuple[str, Any, Path]) -> None:
    name, made, _ = finished
    recorder = made.recorder
    decayed = {id(p) for p in made.optimizer.param_groups[0]["params"]}
    parameters = dict(made.model.named_parameters())
    checked = 0
    for t in range(1, len(KAPPAS)):
        old, new = STAGES[t - 1], STAGES[t]
        q, group = new / old, recorder.groups[t][0]
        for key, before in recorder.before[t].items():
            after = recorder.after[t][key]
            decay = 0.0 if name == "lamb" or id(parameters[key]) not in decayed else DECAY
            gradient = recorder.gradients[t][key].double() + decay * recorder.weights[t - 1][key].double()
            if "sum" in after:
                expected = {"sum": before["sum"].double() / q**2 + gradient**2}
            elif name == "sgd":
                buffer = before["momentum_buffer"].double() * (1 - 0.9**old) / (1 - 0.9**new)
                expected = {"momentum_buffer": buffer * group["momentum"] + gradient}
            elif "square_avg" in after:
                alpha, square = group["alpha"], before["square_avg"].double()
                if name == "centered":
                    mean = before["grad_avg"].double()
                    square = (square - mean**2) / q + mean**2
                    expected = {
                        "grad_avg": alpha * mean + (1 - alpha) * gradient,
                        "square_avg": alpha * square + (1 - alpha) * gradient**2,
                    }
                else:
                    expected = {"square_avg": alpha * square / q + (1 - alpha) * gradient**2}
            else:
                second = group["betas"][1]
                expected = {
                    "exp_avg_sq": second * before["exp_avg_sq"].double() / q + (1 - second) * gradient**2,
                    "step": before["step"].double() / q + 1,
                }
            for entry, value in expected.items():
                torch.testing.assert_close(after[entry].double(), value, rtol=2e-4, atol=1e-9)
                checked += 1
    assert checked >= 9 * 19


@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_resumed_around_a_switch_is_the_uninterrupted_one_bit_for_bit(
    finished: tuple[str, Any, Path], tmp_path: Path, stop: int
) -> None:
    name, reference, folder = finished
    torch.manual_seed(99)
    made = trainer(tmp_path, name, init=7, save_strategy="no")
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert made.drawn == reference.drawn[stop:]
    assert made.recorder.groups == reference.recorder.groups[stop:]
    assert tiny.same_bits(made.recorder.after, reference.recorder.after[stop:])
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))


@pytest.mark.parametrize("kappa", [1.0, 4.0, 0.5])
def test_adagrads_first_sum_is_that_of_the_first_stage(tmp_path: Path, kappa: float) -> None:
    made = trainer(tmp_path, "initial", kappa=kappa, small_batch_until=0, max_steps=4, save_strategy="no")
    made.train()
    for key, after in made.recorder.after[0].items():
        if not key.endswith("bias"):
            before = made.recorder.before[0][key]["sum"]
            assert torch.equal(before, torch.full_like(before, 0.1))
        decayed = any(made.model.get_parameter(key) is p for p in made.optimizer.param_groups[0]["params"])
        gradient = made.recorder.gradients[0][key] + (DECAY * made.recorder.initial[key] if decayed else 0.0)
        torch.testing.assert_close(after["sum"], 0.1 / kappa**2 + gradient**2, rtol=1e-5, atol=0)


def test_a_second_run_goes_on_from_the_sum_of_the_first(tmp_path: Path) -> None:
    made = trainer(tmp_path, "initial", kappa=4.0, small_batch_until=0, max_steps=8, save_strategy="no")
    made.train()
    left = made.recorder.after[-1]
    made.train()
    key = "classifier.weight"
    (index,) = [
        n for n, p in enumerate(made.optimizer.param_groups) for w in p["params"] if w is made.model.classifier.weight
    ]
    decay = (DECAY, 0.0)[index]
    gradient = made.recorder.gradients[2][key] + decay * made.recorder.weights[1][key]
    torch.testing.assert_close(made.recorder.after[2][key]["sum"], left[key]["sum"] + gradient**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["sgd", "centered", "lamb"])
def test_an_optimizer_comes_back_as_it_was_given_and_serves_another_trainer(tmp_path: Path, name: str) -> None:
    first = trainer(tmp_path, name, save_strategy="no")
    given = [{key: value for key, value in group.items() if key != "params"} for group in first.optimizer.param_groups]
    first.train()
    optimizer = first.optimizer.optimizer if hasattr(first.optimizer, "optimizer") else first.optimizer
    left = [{key: group[key] for key in values} for group, values in zip(optimizer.param_groups, given, strict=True)]
    assert left == given and first.lr_scheduler.stage_kappa == 1.0
    # The second moment is that of the reference batch again, not that of the last stage, kappa 2.
    if name == "lamb":
        scaled = first.recorder.after[-1]["classifier.weight"]["exp_avg_sq"]
        torch.testing.assert_close(optimizer.state[first.model.classifier.weight]["exp_avg_sq"], 2 * scaled)
    again = tiny.trainer(
        first.model,
        tiny.arguments(tmp_path, max_steps=19, lr_scheduler_type="cosine", batch_schedule=SCHEDULE),
        tiny.sentences(30),
        optimizers=(optimizer, None),
    )
    again.train()
    assert again.recorder.groups == first.recorder.groups
