"""Where the plan, the optimizer, the average and what was passed in could come apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_ema_scaling import EMATrainer, PseudoLabelArguments
from hf_ema_scaling.training.run_state import optimizer_family


def test_a_warm_up_from_zero_at_a_small_kappa_is_no_dead_teacher(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, kappa=0.25, max_steps=6, lr_scheduler_type="linear", warmup_steps=3)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(30))
    assert made.train().global_step == 24


def test_the_plan_is_that_of_the_optimizer_that_was_passed(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    args = tiny.arguments(tmp_path, kappa=4.0, max_steps=8, lr_scheduler_type="constant")
    made = tiny.trainer(model, args, tiny.sentences(30), optimizers=(optimizer, None))
    planned = made.plan.step(0)
    made.train()
    (group,) = made.recorder.groups[0]
    assert (group["lr"], group["momentum"]) == (planned.learning_rate, planned.sgd_momentum)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.01, 0.9)
    assert planned.sgd_momentum == pytest.approx(0.9**4)
    assert planned.learning_rate == pytest.approx(4 * 0.01 * (1 - 0.9**4) / (1 - 0.9))


def test_optimizers_are_told_apart_by_what_they_do() -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    assert optimizer_family("adamw_torch", torch.optim.Adam(weights)) == "adam"
    assert optimizer_family("adamw_torch", torch.optim.Adam(weights, decoupled_weight_decay=True)) == "adamw"
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "decoupled_weight_decay": decoupled} for decoupled in (1, 0)
    ]
    assert optimizer_family("adamw_torch", torch.optim.Adam(groups[:1])) == "adamw"
    with pytest.raises(ValueError, match="do not agree on decoupled_weight_decay"):
        optimizer_family("adamw_torch", torch.optim.Adam(groups))
    assert optimizer_family("adamw_torch", None) == "adamw_torch"
    with pytest.raises(ValueError, match="dampening"):
        optimizer_family("sgd", torch.optim.SGD(weights, lr=0.1, momentum=0.9, dampening=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "momentum=0.9"}, "optim_args"),
        ({"train_sampling_strategy": "group_by_length"}, "bucket_window"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, **changes), tiny.sentences(30))


def test_optimizer_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        EMATrainer(
            model=tiny.bert(),
            args=tiny.arguments(tmp_path),
            train_dataset=tiny.sentences(30),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )


def test_a_skipped_step_leaves_running_statistics_alone(tmp_path: Path) -> None:
    made = tiny.trainer(
        tiny.parakeet(), tiny.arguments(tmp_path, on_nonfinite="skip", max_steps=3), tiny.speech(12, features=8)
    )
    step = made.training_step
    poisoned: dict[str, dict[str, torch.Tensor]] = {}

    def poison(model: Any, inputs: Any, items: Any = None) -> torch.Tensor:
        if made.state.global_step == 1:
            poisoned["before"] = {name: b.clone() for name, b in made.model.named_buffers()}
            for micro_batch in inputs["micro_batches"]:
                micro_batch["inputs"]["input_features"][:] = float("inf")
        if made.state.global_step == 2:
            poisoned["after"] = {name: b.clone() for name, b in made.model.named_buffers()}
        return step(model, inputs, items)

    made.training_step = poison
    made.train()
    assert made.state.global_step == 3
    assert tiny.same_bits(poisoned["before"], poisoned["after"])
    assert all(tensor.isfinite().all() for tensor in made.average.tensors().values())


@pytest.mark.parametrize(("metric", "greater"), [("eval_ema_wer", False), ("cer", False), ("accuracy", True)])
def test_lower_error_rates_are_better(tmp_path: Path, metric: str, greater: bool) -> None:
    args = tiny.arguments(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    assert args.greater_is_better is greater


def test_epoch_stages_are_ambiguous_with_unlabelled_data(tmp_path: Path) -> None:
    schedule = '[{"batch_size": 4, "until_epochs": 1}, {"batch_size": 8}]'
    with pytest.raises(ValueError, match="ambiguous"):
        tiny.trainer(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, batch_schedule=schedule),
            tiny.speech(12),
            unlabeled_dataset=tiny.speech(12, 1, labels=False),
            pseudo_label_args=PseudoLabelArguments(pl_start=2),
            labeler=tiny.ContentLabeler(),
        )


def test_a_schedule_that_is_no_list_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="list of objects"):
        tiny.arguments(tmp_path, batch_schedule='{"batch_size": 64}').schedule()
    with pytest.raises(ValueError, match="neither a JSON list nor a file"):
        tiny.arguments(tmp_path, batch_schedule="no-such-file.json").schedule()
