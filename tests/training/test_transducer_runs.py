"""Transducers in the trainers: the loss of a step, and pseudo-labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transducers import BLANK, PAD, build

from hf_ema_scaling import EMATeacher, EMATrainer, PseudoLabelArguments, PseudoLabelTrainer, WeightAverage
from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.labels.transducer import TransducerLabeler, decoder_inputs
from hf_ema_scaling.training.label_judge import decoder
from hf_ema_scaling.training.losses import loss_for


def speech(rows: int, *, labels: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(rows)
    columns = {"input_features": [torch.randn(24 + 4 * row, 8, generator=generator).numpy() for row in range(rows)]}
    if labels:
        columns["labels"] = [[3, 4, 1 + 4 * (row % 2)] for row in range(rows)]
    return Dataset.from_dict(columns).with_format("numpy")


@pytest.mark.parametrize("head", ["rnnt", "tdt"])
def test_a_step_has_the_gradient_of_the_models_own_loss(head: str, tmp_path: Path) -> None:
    model = build(head)
    data = speech(2)
    made = EMATrainer(
        model,
        tiny.arguments(tmp_path, reference_batch_size=2, max_example_loss=None),
        train_dataset=data,
        data_collator=CTCCollator(),
    )
    (batch,) = next(iter(made.get_train_dataloader()))["micro_batches"]
    loss = made.micro_batch_loss(model.eval(), batch)
    total = 0.0
    for row in data:
        ids = torch.tensor(row["labels"])[None]
        features = torch.tensor(row["input_features"])[None]
        # transformers pads labels with the blank (RNN-T) or the padding (TDT), never with -100; one row has none.
        assert BLANK not in ids and PAD not in ids
        read = decoder_inputs(ids, BLANK)
        mask = torch.ones(features.shape[:2], dtype=torch.long)
        own = model(input_features=features, attention_mask=mask, decoder_input_ids=read, labels=ids)
        total += float(own.loss)
    assert float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("head", ["rnnt", "tdt"])
def test_a_run_learns_from_labels_of_the_average(head: str, tmp_path: Path) -> None:
    model = build(head)
    unlabelled = speech(5, labels=False)
    made = PseudoLabelTrainer(
        model,
        tiny.arguments(tmp_path, learning_rate=1e-3, logging_strategy="steps", logging_steps=1),
        train_dataset=speech(4),
        unlabeled_dataset=unlabelled,
        pseudo_label_args=PseudoLabelArguments(pl_start=1),
        data_collator=CTCCollator(),
    )
    assert isinstance(made.labeler, TransducerLabeler)
    before = [parameter.clone() for parameter in model.parameters()]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    logs = [row for row in made.state.log_history if "pseudo/kept" in row]
    assert len(logs) == 3 and logs[0]["pseudo/kept"] > 0
    assert loss_for(model) is made.example_loss


@pytest.mark.parametrize("head", ["rnnt", "tdt"])
def test_a_teacher_in_half_precision_labels_too(head: str) -> None:
    model = build(head)
    average = WeightAverage(model)
    inputs = CTCCollator()([dict(row) for row in speech(4, labels=False)])
    labeler = TransducerLabeler(BLANK)
    full, half = (EMATeacher(model, average, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    wanted, found = labeler.label(full, inputs), labeler.label(half, inputs)
    assert [label.confidence for label in found] == pytest.approx([label.confidence for label in wanted], abs=0.05)
    assert labeler.label(model, inputs) == wanted


def test_doubled_letters_of_a_transducer_stay() -> None:
    class Merging:
        """Merges repeats unless it is told not to, as Parakeet's tokenizer."""

        def decode(self, ids: list[int], group_tokens: bool = True) -> str:
            kept = [i for place, i in enumerate(ids) if not group_tokens or place == 0 or i != ids[place - 1]]
            return "".join("abcdefgh"[i] for i in kept)

    decode = decoder(build("tdt"), Merging(), ctc=False)
    assert decode is not None and decode([1, 3, 3, 4]) == "bdde"
