"""Runs with averages in float64, teachers in half precision, and students that were loaded in half precision."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny import same_bits
from transformers import Trainer, TrainingArguments

from hf_ema_scaling import ReferenceClock, WeightAverage
from hf_ema_scaling.ema.accelerate_state import register_average
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.callback import EMACallback


def labelling(folder: Path, teacher_dtype: str = "float32", **changes: Any) -> Any:
    args = tiny.arguments(folder, max_steps=6, save_steps=3, save_strategy="steps", **changes)
    return tiny.trainer(
        tiny.wav2vec2(), args, tiny.speech(12), unlabeled_dataset=tiny.speech(12, 1, labels=False),
        pseudo_label_args=PseudoLabelArguments(teacher_dtype=teacher_dtype),
    )  # fmt: skip


def test_a_float64_average_and_a_half_precision_teacher_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = labelling(tmp_path / "a", "bfloat16", ema_dtype="float64")
    whole.train()
    assert {t.dtype for t in whole.average.tensors().values()} == {torch.float64}
    assert whole.teacher.dtype == torch.bfloat16
    resumed = labelling(tmp_path / "b", "bfloat16", ema_dtype="float64")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same_bits(tiny.average(whole), tiny.average(resumed))
    assert same_bits(tiny.parameters(whole.model), tiny.parameters(resumed.model))
    exported = type(whole.model).from_pretrained(tmp_path / "a" / "checkpoint-6" / "ema")
    name, tensor = next(iter(whole.average.tensors().items()))
    assert torch.equal(exported.get_parameter(name), tensor.float()) and not torch.equal(
        tensor.float().double(), tensor
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_teacher_labels_and_follows(
    tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = labelling(tmp_path, dtype)
    with caplog.at_level(logging.INFO, logger="hf_ema_scaling.training.teacher_start"):
        made.train()
    (said,) = [record.message for record in caplog.records if "labels are the same" in record.message]
    assert f"The teacher in {dtype} differs from one in float32 by " in said and " of 4 labels" in said
    kept = dict(made.teacher.module.named_parameters())
    for name, tensor in made.average.tensors().items():
        if name in kept:
            assert torch.equal(kept[name], tensor.to(getattr(torch, dtype))), name


def test_the_callback_keeps_a_float64_average_over_a_resume(tmp_path: Path) -> None:
    def run(average: EMACallback, checkpoint: str | None = None) -> Any:
        args = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        made = Trainer(tiny.bert(), args, train_dataset=tiny.sentences(30), callbacks=[average])
        made.train(resume_from_checkpoint=checkpoint)
        return {name: tensor.clone() for name, tensor in average.average.tensors().items()}

    def callback() -> EMACallback:
        return EMACallback(momentum=0.9, reference_batch_size=4, dtype=torch.float64)

    whole = run(callback())
    assert {tensor.dtype for tensor in whole.values() if tensor.is_floating_point()} == {torch.float64}
    assert same_bits(whole, run(callback(), str(tmp_path / "checkpoint-2")))
    with pytest.raises(ValueError, match=r"got torch.bfloat16"):
        EMACallback(momentum=0.9, reference_batch_size=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("door", ["trainer", "callback"])
def test_a_student_in_half_precision_is_warned_of_once(tmp_path: Path, door: str) -> None:
    model = tiny.bert().to(torch.bfloat16)
    made: Any
    if door == "trainer":
        made = tiny.trainer(model, tiny.arguments(tmp_path, max_steps=1, learning_rate=0.5), tiny.sentences(8))
    else:
        args = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.5, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        callback = EMACallback(momentum=0.9, reference_batch_size=4)
        made = Trainer(model, args, train_dataset=tiny.sentences(8), callbacks=[callback])
    with pytest.warns(UserWarning, match=r"torch.bfloat16 .*1 part in 512 .*dtype=torch.float32") as caught:
        made.train()
        made.train()
    assert sum("trainable parameters are" in str(w.message) for w in caught) == 1


def test_a_registered_average_warns_too() -> None:
    model = tiny.bert().to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"trainable parameters are torch.bfloat16 .*1 part in 512"):
        register_average(Accelerator(cpu=True), model, WeightAverage(model), ReferenceClock(4)).remove()


def test_frozen_half_precision_and_float32_are_not_warned_of(tmp_path: Path) -> None:
    model = tiny.bert()
    model.bert.to(torch.bfloat16).requires_grad_(False)
    model.bert.float().embeddings.to(torch.bfloat16)
    made = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, max_steps=1), tiny.sentences(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from hf_ema_scaling.ema.half_precision import warn_of_half_precision

        warn_of_half_precision(model)
        warn_of_half_precision(made.model)


def test_the_claim_of_the_warning() -> None:
    """A bfloat16 weight loses a step below 1 part in 512 of it, a float16 weight one below 1 in 4096."""
    for dtype, parts in ((torch.bfloat16, 512), (torch.float16, 4096)):
        weight = torch.ones((), dtype=dtype)
        assert weight - 0.24 / parts * weight == weight  # above 1 the spacing is twice that below
        assert weight + 0.99 / (parts / 2) / 2 == weight and weight + 1.01 / (parts / 2) > weight
