from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC

import hf_ema_scaling.training.pseudo_label_collator as module
from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels import ClassLabeler, CTCLabeler, PseudoLabel
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.pseudo_label_collator import PseudoLabelCollator

pytestmark = pytest.mark.filterwarnings("ignore:EMACallback scales only the momentum")

BLANK = 0


def wav2vec2() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            conv_dim=(8, 8),
            conv_stride=(4, 2),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            ctc_loss_reduction="mean",
            pad_token_id=BLANK,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # so that the best path has more than one token
    return model


def examples(count: int = 24, hidden: list[int] | None = None) -> list[dict[str, Any]]:
    """Every third one is labelled; the others carry `hidden` where it is given."""
    generator = torch.Generator().manual_seed(5)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        labels = [1 + i % 7, 2] if i % 3 == 0 else hidden
        row = {"input_values": torch.randn(160 + 16 * (i % 4), generator=generator), "labelled": i % 3 == 0}
        rows.append(row if labels is None else row | {"labels": labels})
    return rows


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_values"]) for row in rows)
    batch = {
        "input_values": torch.stack(
            [torch.nn.functional.pad(row["input_values"], (0, longest - len(row["input_values"]))) for row in rows]
        ),
        "attention_mask": torch.stack([(torch.arange(longest) < len(row["input_values"])).long() for row in rows]),
    }
    if all("labels" in row for row in rows):
        width = max(len(row["labels"]) for row in rows)
        batch["labels"] = torch.tensor([[*row["labels"]] + [-100] * (width - len(row["labels"])) for row in rows])
    return batch


def run(
    folder: Path, collator: PseudoLabelCollator, *more: TrainerCallback, data: Any = None, **changes: Any
) -> Trainer:
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "remove_unused_columns": False,
            **changes,
        },
    )
    trainer = Trainer(
        wav2vec2(),
        args,
        data_collator=collator,
        train_dataset=examples() if data is None else data,
        callbacks=[collator.callback, *more],
    )
    trainer.train()
    return trainer


def callback() -> EMACallback:
    return EMACallback(momentum=0.5, reference_batch_size=4)


class Drops:
    """A labeler that drops every row."""

    def label(self, teacher: Any, batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        return [PseudoLabel((), 0.0, "empty") for _ in batch["input_values"]]


class Spy(PseudoLabelCollator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[int, list[Any], dict[str, Tensor], dict[str, Tensor]]] = []

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        weights = {name: tensor.clone() for name, tensor in self.callback.average.tensors().items()}
        self.calls.append((self.callback.average.num_updates, list(examples), weights, dict(batch)))
        return batch


def test_labels_are_those_of_the_labeler_on_the_average(tmp_path: Path) -> None:
    labeler = CTCLabeler(BLANK)
    collator = Spy(callback(), labeler, pad)
    trainer = run(tmp_path, collator)
    reference, found = wav2vec2().eval(), set()
    # the loader collates one batch ahead, so two batches are made before the first update
    assert [updates for updates, *_ in collator.calls] == [0, 0, 1, 2, 3, 4]
    for _, rows, weights, batch in collator.calls:
        state = {name: weights.get(name, tensor) for name, tensor in reference.state_dict().items()}
        reference.load_state_dict(state)
        unlabelled = [row for row in rows if "labels" not in row]
        made = iter(labeler.label(reference, pad(unlabelled)) if unlabelled else [])
        expected = []
        for row in rows:
            label = None if "labels" in row else next(made)
            if label is None or label.kept:
                expected.append(list(row["labels"]) if label is None else list(label.ids))
        assert [[i for i in line if i >= 0] for line in batch["labels"].tolist()] == expected
        assert batch["labels"].device.type == "cpu"
        assert len(batch["input_values"]) == len(expected)
        found.update(tuple(line) for line in expected)
    assert trainer.state.global_step == 6
    assert collator.counts["kept"] > 6
    assert len(found) > 6


def test_hidden_labels_are_never_seen(tmp_path: Path) -> None:
    results = []
    for hidden in (None, [7, 7, 7], [1]):
        average = callback()
        collator = PseudoLabelCollator(
            average, CTCLabeler(BLANK), pad, is_unlabeled=lambda example: not example["labelled"]
        )
        run(tmp_path, collator, data=examples(hidden=hidden))
        assert collator.counts["kept"] > 0
        results.append({name: tensor.clone() for name, tensor in average.average.tensors().items()})
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])


def test_dropped_rows_leave_the_batch_and_a_stand_in_fills_an_empty_one(tmp_path: Path) -> None:
    labelled = [row for row in examples() if "labels" in row]
    only_unlabelled = [row for row in examples() if "labels" not in row]
    collator = Spy(callback(), Drops(), pad, stand_ins=labelled)
    run(tmp_path, collator, data=only_unlabelled, max_steps=4)
    assert [batch["labels"].tolist() for *_, batch in collator.calls] == [
        [labelled[step]["labels"]] for step in (0, 0, 1, 2)
    ]
    assert collator.counts == {"empty": 16, "stand_in": 4}

    mixed = Spy(callback(), Drops(), pad, stand_ins=labelled)
    run(tmp_path, mixed, max_steps=4)
    for _, rows, _, batch in mixed.calls:
        assert len(batch["labels"]) == max(1, sum("labels" in row for row in rows))

    bare = PseudoLabelCollator(callback(), Drops(), pad)
    with pytest.raises(RuntimeError, match=r"nothing is left of a batch of 4.*'empty': 4.*stand_ins"):
        run(tmp_path, bare, data=only_unlabelled)


def test_nothing_is_labelled_before_pl_start(tmp_path: Path) -> None:
    collator = Spy(callback(), CTCLabeler(BLANK), pad, pl_start=2, stand_ins=examples()[:1])
    run(tmp_path, collator, data=[row for row in examples() if "labels" not in row])
    # one pass is 4 batches, and the loader of a new pass makes two at once
    assert [updates for updates, *_ in collator.calls] == [0, 0, 1, 2, 4, 4, 5]
    assert collator.counts["before_start"] == 12
    assert collator.counts["kept"] + collator.counts["empty"] == 16
    assert [len(batch["labels"]) for *_, batch in collator.calls[:3]] == [1, 1, 1]


def test_the_teacher_sees_its_own_clean_batch(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    devices: list[Any] = []

    def noisy(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(rows)
        return batch | {"input_values": batch["input_values"] + 100.0}

    class Looks(CTCLabeler):
        def label(self, teacher: Any, batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
            assert isinstance(teacher, EMATeacher)
            assert batch["input_values"].abs().max() < 50
            devices.append(batch["input_values"].device)
            seen.append(set(batch))
            return super().label(teacher, batch)

    collator = Spy(callback(), Looks(BLANK), noisy, teacher_collate=pad)
    run(tmp_path, collator, max_steps=2)
    assert seen == [{"input_values", "attention_mask"}] * len(seen)
    assert set(devices) == {torch.device("cpu")}
    assert all(batch["input_values"].mean() > 90 for *_, batch in collator.calls)


def test_a_teacher_that_labels_nothing_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "DROPPED_IN_A_ROW", 12)
    unlabelled = [row for row in examples() if "labels" not in row]
    collator = PseudoLabelCollator(callback(), Drops(), pad, stand_ins=examples()[:1])
    with pytest.raises(RuntimeError, match=r"last 12 pseudo-labels were all dropped .*'empty': 12"):
        run(tmp_path, collator, data=unlabelled)


def test_what_cannot_work_is_refused() -> None:
    collator = PseudoLabelCollator(callback(), CTCLabeler(BLANK), pad)
    with pytest.raises(RuntimeError, match="dataloader_num_workers=0"):
        next(iter(DataLoader(examples(4), batch_size=4, collate_fn=collator, num_workers=1)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no average yet"):
        collator(examples(4))
    assert collator(examples(1))["labels"].tolist() == [[1, 2]]
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="pl_start"):
            PseudoLabelCollator(callback(), CTCLabeler(BLANK), pad, pl_start=value)
    with pytest.raises(NotImplementedError, match="ClassLabeler makes targets of a kind of its own"):
        PseudoLabelCollator(callback(), ClassLabeler(2), pad)
