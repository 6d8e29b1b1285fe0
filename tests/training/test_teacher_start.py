"""Trainers, callback and collators compare their teacher with the student before it labels, whatever the head."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_generation
import torch
from datasets import Dataset
from torch import Tensor, nn
from transducers import build as transducer
from transformers import Trainer, TrainingArguments

from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.data.images import ImageRows, RandomViews
from hf_ema_scaling.ema import DeadTeacherError
from hf_ema_scaling.labels import CTCLabeler, generative_labeler_for
from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.byol_model import BYOLConfig, BYOLModel
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.pseudo_label_collator import PseudoLabelCollator
from hf_ema_scaling.training.self_check import FAILED, PASSED, self_check
from hf_ema_scaling.training.seq2seq import PseudoLabelSeq2SeqTrainer
from hf_ema_scaling.training.seq2seq_arguments import EMASeq2SeqTrainingArguments
from hf_ema_scaling.training.trainer import PseudoLabelTrainer


def classifier() -> Any:
    model = tiny.bert()
    model.config.problem_type = "single_label_classification"
    return model


HEADS = {
    "ctc": (tiny.wav2vec2, "lm_head"),
    "batch norm": (tiny.parakeet, "ctc_head"),
    "classifier": (classifier, "classifier"),
    "causal": (tiny_generation.gpt2, "lm_head"),
    "seq2seq": (tiny_generation.t5, "lm_head"),
    "speech seq2seq": (tiny_generation.whisper, "proj_out"),
    "transducer": (lambda: transducer("rnnt"), "joint"),
}


def turned(module: nn.Module, args: Any, output: Any) -> Any:
    """A change that a linear layer behind it cannot undo, of whatever the head returns."""
    return output.roll(1, -1) if isinstance(output, Tensor) else output


def text(count: int, seed: int, *, labels: bool, width: int = 5) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Any] = {"input_ids": torch.randint(10, 24, (count, width), generator=generator).tolist()}
    if labels:
        rows["labels"] = [[*row[:3], 1] if width > 5 else [-100, *row[1:]] for row in rows["input_ids"]]
    return Dataset.from_dict(rows)


def pad_text(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"labels": pad_labels([row["labels"] for row in rows])} if "labels" in rows[0] else {})


def whisper_rows(count: int, seed: int, *, labels: bool) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Any] = {"input_features": torch.randn(count, 4, 16, generator=generator).tolist()}
    if labels:
        rows["labels"] = [[5, 6, 9, 11, 12, 2]] * count
    return Dataset.from_dict(rows)


def transducer_rows(count: int, seed: int, *, labels: bool) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, Any] = {"input_features": [torch.randn(24, 8, generator=generator).numpy()] * count}
    if labels:
        columns["labels"] = [[3, 4, 1]] * count
    return Dataset.from_dict(columns).with_format("numpy")


def build(
    folder: Path,
    head: str,
    put: Callable[[Any], Any] = lambda model: model,
    factory: Callable[[], nn.Module] | None = None,
    teacher_dtype: str = "float32",
    **changes: Any,
) -> Any:
    model = put(HEADS[head][0]())
    data: dict[str, Any] = {
        "ctc": (tiny.speech(8), tiny.speech(8, 1, labels=False), CTCCollator()),
        "batch norm": (tiny.speech(8, features=8), tiny.speech(8, 1, labels=False, features=8), CTCCollator()),
        "classifier": (tiny.sentences(8), tiny.sentences(8, 1).remove_columns("labels"), tiny.pad_sentences),
        "causal": (text(8, 0, labels=True), text(8, 1, labels=False), pad_text),
        "seq2seq": (text(8, 0, labels=True, width=6), text(8, 1, labels=False, width=6), pad_text),
        "speech seq2seq": (
            whisper_rows(8, 0, labels=True),
            whisper_rows(8, 1, labels=False),
            CTCCollator(attention_mask=False),
        ),
        "transducer": (transducer_rows(8, 0, labels=True), transducer_rows(8, 1, labels=False), CTCCollator()),
    }[head]
    generates = head in ("causal", "seq2seq", "speech seq2seq")
    args = tiny.arguments(folder, max_steps=2, **changes)
    kind: Any = PseudoLabelTrainer
    if "seq2seq" in head:
        kind = PseudoLabelSeq2SeqTrainer
        values = {"max_steps": 2, "reference_batch_size": 4, "ema_momentum": 0.9, "learning_rate": 1e-2}
        flags = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        args = EMASeq2SeqTrainingArguments(str(folder), **values, **flags, **changes)
    options = {"language": "fr"} if head == "speech seq2seq" else {}
    return kind(
        model,
        args,
        train_dataset=data[0],
        unlabeled_dataset=data[1],
        data_collator=data[2],
        pseudo_label_args=tiny.pseudo(teacher_dtype=teacher_dtype),
        labeler=generative_labeler_for(model, max_new_tokens=4, **options) if generates else None,
        teacher_factory=factory,
    )


def hooked(head: str) -> Callable[[Any], Any]:
    def put(model: Any) -> Any:
        model.get_submodule(HEADS[head][1]).register_forward_hook(turned)
        return model

    return put


@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_that_says_something_else_starts_no_run(head: str, tmp_path: Path) -> None:
    name = HEADS[head][1]
    made = build(tmp_path, head, hooked(head))
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    with pytest.raises(
        DeadTeacherError, match=rf"part first in what {name} .*forward hook 'turned' on {name}.*`teacher_factory=`"
    ):
        made.train()
    assert tiny.same_bits(dict(made.model.state_dict()), before) and made.state.global_step == 0


@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_that_says_the_same_does(head: str, tmp_path: Path) -> None:
    # The factory's weights are not the student's: they are replaced by the average.
    made = build(tmp_path, head, hooked(head), lambda: hooked(head)(HEADS[head][0]()))
    made.train()
    assert made.state.global_step == 2
    with pytest.raises(DeadTeacherError, match="Put the same into the model that `factory` returns"):
        build(tmp_path, head, hooked(head), HEADS[head][0]).train()


@pytest.mark.parametrize("teacher", ["float32", "bfloat16"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_precision_is_compared(teacher: str, bf16: bool, tmp_path: Path) -> None:
    def scaled(model: Any) -> Any:
        model.lm_head.register_forward_hook(lambda module, args, output: 1.06 * output)
        return model

    # Half-precision teachers are held to the student by way of one in float32, and so no less tightly.
    allowed = 0.0312 if bf16 else 0.001
    with pytest.raises(DeadTeacherError, match=rf"differ by 0\.0\d+ of their size, {allowed} is allowed"):
        build(tmp_path, "ctc", scaled, teacher_dtype=teacher, bf16=bf16).train()
    made = build(tmp_path, "ctc", teacher_dtype=teacher, bf16=bf16)
    made.train()
    assert made.state.global_step == 2


def test_a_forward_that_keeps_the_student_starts_no_run(tmp_path: Path) -> None:
    def hidden(model: Any) -> Any:
        kept = types.SimpleNamespace(old=model.lm_head.forward)
        model.lm_head.forward = types.MethodType(lambda self, x: 2.0 * kept.old(x), model.lm_head)
        return model

    def plain(model: Any) -> Any:
        old = model.lm_head.forward
        model.lm_head.forward = types.MethodType(lambda self, x: 2.0 * old(x), model.lm_head)
        return model

    with pytest.raises(TypeError, match=r"'old', the forward of 'lm_head'"):
        build(tmp_path, "ctc", plain).train()
    with pytest.raises(DeadTeacherError, match=r"computes with the student's weights.*first what lm_head returns"):
        build(tmp_path, "ctc", hidden).train()
    for put in (plain, hidden):
        made = build(tmp_path, "ctc", put, lambda put=put: put(tiny.wav2vec2(seed=1)))
        made.train()
        assert made.state.global_step == 2
    student = tiny.wav2vec2()

    def factory() -> nn.Module:
        made = tiny.wav2vec2()
        made.lm_head.forward = student.lm_head.forward  # type: ignore[method-assign]
        return made

    with pytest.raises(DeadTeacherError, match=r"student's weights.*first what lm_head returns"):
        build(tmp_path, "ctc", lambda _: student, factory).train()


def test_the_check_changes_no_bit_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        made = build(tmp_path, "batch norm")
        made.train()
        return made

    checked = run()
    monkeypatch.setattr("hf_ema_scaling.training.teacher_start.check_before_labelling", lambda *_, **__: None)
    unchecked = run()
    assert tiny.same_bits(dict(checked.model.state_dict()), dict(unchecked.model.state_dict()))
    assert tiny.same_bits(dict(checked.average.tensors()), dict(unchecked.average.tensors()))


def test_the_self_check_says_so_before_any_training(tmp_path: Path) -> None:
    def result(*given: Any) -> Any:
        return next(one for one in self_check(lambda: build(tmp_path, "ctc", *given)) if one.name == "teacher")

    found = result(hooked("ctc"))
    assert found.result == FAILED and "forward hook 'turned' on lm_head" in found.detail
    assert result().result == PASSED
    assert result(hooked("ctc"), lambda: hooked("ctc")(tiny.wav2vec2())).result == PASSED


def byol(folder: Path, put: Callable[[Any], Any], factory: Callable[[], nn.Module] | None = None) -> Any:
    pixels = torch.randint(0, 256, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return BYOLTrainer(
        put(network()),
        tiny.arguments(folder, max_steps=2, optim="sgd", optim_args="momentum=0.9"),
        views=RandomViews(),
        train_dataset=ImageRows(pixels.__getitem__, 8, None),
        teacher_factory=factory,
    )


def network() -> BYOLModel:
    torch.manual_seed(0)
    return BYOLModel(BYOLConfig(num_channels=1, encoder_channels=[3, 4], hidden_size=6, projection_size=5))


def test_so_does_the_target_network_of_byol(tmp_path: Path) -> None:
    def put(model: Any) -> Any:
        model.projector.register_forward_hook(turned)
        return model

    with pytest.raises(DeadTeacherError, match="forward hook 'turned' on projector"):
        byol(tmp_path, put).train()
    made = byol(tmp_path, put, lambda: put(network()))
    made.train()
    assert made.state.global_step == 2


def stock(
    folder: Path, put: Callable[[Any], Any], factory: Callable[[], nn.Module] | None = None, **changes: Any
) -> tuple[Any, PseudoLabelCollator]:
    """The stock Trainer with a callback whose average labels half of the rows."""
    average = EMACallback(momentum=0.5, reference_batch_size=4, teacher_factory=factory)
    labelled, unlabelled = tiny.speech(8), tiny.speech(8, 1, labels=False)
    rows = [row for pair in zip(labelled, unlabelled, strict=True) for row in pair]
    rows = [{key: value for key, value in row.items() if key != "duration"} for row in rows]
    collator = PseudoLabelCollator(average, CTCLabeler(0), CTCCollator(), stand_ins=[rows[0]])
    values = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    flags = {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(str(folder), **{**values, **flags, **changes})
    trainer = Trainer(put(tiny.wav2vec2()), args, data_collator=collator, train_dataset=rows, callbacks=[average])
    return trainer, collator


@pytest.mark.parametrize("bf16", [False, True])
def test_so_does_the_collator_of_a_stock_trainer_before_its_first_label(tmp_path: Path, bf16: bool) -> None:
    trainer, collator = stock(tmp_path, hooked("ctc"), bf16=bf16)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(DeadTeacherError, match=r"forward hook 'turned' on lm_head.*`teacher_factory=`"):
        trainer.train()
    assert tiny.same_bits(dict(trainer.model.state_dict()), before) and not collator.counts
    trainer, collator = stock(tmp_path, hooked("ctc"), lambda: hooked("ctc")(tiny.wav2vec2(seed=1)), bf16=bf16)
    trainer.train()
    assert trainer.state.global_step == 3 and sum(collator.counts.values()) >= 6
    trainer, _ = stock(tmp_path, hooked("ctc"), tiny.wav2vec2, bf16=bf16)
    with pytest.raises(DeadTeacherError, match="Put the same into the model that `factory` returns"):
        trainer.train()


def test_the_callbacks_check_is_for_other_loops_too(tmp_path: Path) -> None:
    trainer, collator = stock(tmp_path, lambda model: model)
    with pytest.raises(RuntimeError, match="no average yet"):
        collator.callback.check_teacher({})
    trainer.train()
    inputs = {"input_values": torch.randn(1, 640)}
    collator.callback.check_teacher(inputs)
    trainer.model.lm_head.register_forward_hook(turned)
    with pytest.raises(DeadTeacherError, match="forward hook 'turned' on lm_head"):
        collator.callback.check_teacher(inputs)
    assert trainer.model.training
