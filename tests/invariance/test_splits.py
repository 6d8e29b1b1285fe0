"""The same samples give the same gradient however split, and a kappa-step is the mean of its reference steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

TOLERANCE = 3e-5
"""Relative, in the norm over all parameters: float32 sums in another order, and a few steps of their consequences."""

FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "wav2vec2": (tiny.wav2vec2, lambda: tiny.speech(40)),
    "bert": (tiny.bert, lambda: tiny.sentences(40)),
}


def semi_supervised() -> dict[str, Any]:
    return {
        "unlabeled_dataset": tiny.speech(30, 1, labels=False),
        "pseudo_label_args": tiny.pseudo(pl_start=1.0, unlabeled_ratio=3.0, unlabeled_weight=0.7),
        "labeler": tiny.ContentLabeler(),
    }


def run(folder: Path, family: str, micro: int, **changes: Any) -> Any:
    model, data = FAMILIES[family]
    values: dict[str, Any] = {"max_steps": 3, "reference_batch_size": 16, "adam_epsilon": 1e-3}
    more = changes.pop("more", {})
    args = tiny.arguments(folder, per_device_train_batch_size=micro, **(values | changes))
    made = tiny.trainer(model(), args, data(), **more)
    made.train()
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_gradient_weights_and_average_do_not_depend_on_micro_batches(tmp_path: Path, family: str, optim: str) -> None:
    whole = run(tmp_path, family, 16, optim=optim).recorder
    assert all(sum(float(g.square().sum()) for g in step.values()) > 1e-4 for step in whole.gradients)
    for micro in (4, 1):
        split = run(tmp_path, family, micro, optim=optim).recorder
        for step in range(3):
            assert tiny.difference(whole.gradients[step], split.gradients[step]) < TOLERANCE
            assert tiny.difference(whole.weights[step], split.weights[step]) < TOLERANCE
            assert tiny.difference(whole.averages[step], split.averages[step]) < TOLERANCE


def test_nor_with_dropped_pseudo_labels(tmp_path: Path) -> None:
    whole = run(tmp_path, "wav2vec2", 16, more=semi_supervised())
    counts = whole.label_statistics.counts
    assert counts["rows"] == 24 and 0 < counts["dropped_confidence"] < 24
    for micro in (5, 4, 1):
        split = run(tmp_path, "wav2vec2", micro, more=semi_supervised())
        assert split.label_statistics.counts == counts
        for step in range(3):
            assert tiny.difference(whole.recorder.gradients[step], split.recorder.gradients[step]) < TOLERANCE
            assert tiny.difference(whole.recorder.weights[step], split.recorder.weights[step]) < TOLERANCE
            assert tiny.difference(whole.recorder.averages[step], split.recorder.averages[step]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_trainer_multiplies_the_gradient_by_the_accumulation_steps(tmp_path: Path, family: str) -> None:
    """What these trainers exist to avoid; if it fails, transformers has changed and this library may say so."""
    build, data = FAMILIES[family]

    def norm(batch: int, accumulation: int) -> float:
        seen: list[float] = []

        class Spy(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                seen.append(float(torch.nn.utils.get_total_norm(grads)))

        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        model = build()
        # One mean per utterance, as here; a sum would not depend on the split, but grow with the batch.
        model.config.ctc_loss_reduction = "mean"
        collator = tiny.CTCCollator() if family == "wav2vec2" else None
        train = data().select(range(16))
        Trainer(model, args, train_dataset=train, data_collator=collator, callbacks=[Spy()]).train()
        return seen[0]

    assert norm(4, 4) / norm(16, 1) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_kappa_step_is_the_mean_of_its_reference_steps(tmp_path: Path, family: str) -> None:
    model, data = FAMILIES[family]
    small = tiny.at_fixed_weights(model(), tiny.arguments(tmp_path, max_steps=8), data())
    large = tiny.at_fixed_weights(model(), tiny.arguments(tmp_path, max_steps=8, kappa=3.0), data())
    assert [len(step) for step in small.drawn] == [4] * 8
    assert [len(step) for step in large.drawn] == [12, 12, 8]
    for step, span in enumerate([(0, 3), (3, 6), (6, 8)]):
        drawn = sorted(item for reference in small.drawn[slice(*span)] for item in reference)
        assert sorted(large.drawn[step]) == drawn
        expected = tiny.mean(small.recorder.gradients[slice(*span)])
        assert tiny.difference(expected, large.recorder.gradients[step]) < TOLERANCE


def test_also_with_dropped_pseudo_labels(tmp_path: Path) -> None:
    gradients, counts = {}, {}
    for kappa in (1.0, 4.0):
        made = tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, max_steps=9, kappa=kappa, per_device_train_batch_size=3),
            tiny.speech(20),
            **semi_supervised(),
        )
        gradients[kappa] = made.recorder.gradients
        counts[kappa] = made.label_statistics.counts
    assert counts[1.0] == counts[4.0] and counts[1.0]["rows"] == 24 and 0 < counts[1.0]["kept"] < 24
    assert len(gradients[4.0]) == 3
    for step in (1, 2):
        expected = tiny.mean(gradients[1.0][4 * step - 3 : 4 * step + 1])
        assert tiny.difference(expected, gradients[4.0][step]) < TOLERANCE


def test_also_in_seconds_weighted_by_the_seconds_of_each_step(tmp_path: Path) -> None:
    gradients, kappas = {}, {}
    for kappa in (1.0, 4.0):
        made = tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(
                tmp_path, max_steps=8, kappa=kappa, batch_unit="seconds", reference_batch_size=40.0, bucket_window=2
            ),
            tiny.speech(20),
        )
        gradients[kappa] = made.recorder.gradients
        kappas[kappa] = [made.sampler.step(i).kappa for i in range(made.sampler.num_steps)]
    assert len(gradients[4.0]) == 2 and len(set(kappas[1.0])) > 4
    for step in (0, 1):
        span = slice(4 * step, 4 * step + 4)
        assert sum(kappas[1.0][span]) == pytest.approx(kappas[4.0][step])
        expected = tiny.mean(gradients[1.0][span], kappas[1.0][span])
        assert tiny.difference(expected, gradients[4.0][step]) < TOLERANCE


def test_batch_norm_sees_the_reference_batches_at_every_kappa(tmp_path: Path) -> None:
    gradients, statistics = {}, {}
    for kappa in (1.0, 4.0):
        made = tiny.at_fixed_weights(
            tiny.parakeet(),
            tiny.arguments(tmp_path, max_steps=8, kappa=kappa, ema_buffers="copy"),
            tiny.speech(30, features=8),
            unlabeled_dataset=tiny.speech(30, 1, features=8, labels=False),
            pseudo_label_args=tiny.pseudo(unlabeled_ratio=1.0),
            labeler=tiny.ContentLabeler(),
        )
        assert made.batch_statistics
        gradients[kappa] = made.recorder.gradients
        statistics[kappa] = {n: b.double().clone() for n, b in made.model.named_buffers() if "running" in n}
        tracked = [int(b) for n, b in made.model.named_buffers() if "num_batches_tracked" in n]
        assert tracked == [16]
    initial = {name: buffer for name, buffer in tiny.parakeet().named_buffers() if name in statistics[1.0]}
    assert tiny.difference(statistics[1.0], initial) > 0.1
    assert tiny.difference(statistics[1.0], statistics[4.0]) < TOLERANCE
    for step in (0, 1):
        expected = tiny.mean(gradients[1.0][4 * step : 4 * step + 4])
        assert tiny.difference(expected, gradients[4.0][step]) < TOLERANCE


def test_micro_batches_would_change_batch_norm_so_only_equal_ones_are_compared(tmp_path: Path) -> None:
    """The claim of the test above is not empty: other micro-batches give another gradient."""
    runs = [
        tiny.at_fixed_weights(
            tiny.parakeet(),
            tiny.arguments(tmp_path, max_steps=1, reference_batch_size=8, per_device_train_batch_size=micro),
            tiny.speech(30, features=8),
        )
        for micro in (8, 4)
    ]
    assert tiny.difference(runs[0].recorder.gradients[0], runs[1].recorder.gradients[0]) > 0.01
