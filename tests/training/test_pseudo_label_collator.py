from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import labelled_runs
import pytest
import tiny_generation
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC

import hf_ema_scaling.training.pseudo_label_collator as module
from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels import ClassLabeler, CTCLabeler, PseudoLabel, generative_labeler_for, two_views
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
    folder: Path,
    collator: PseudoLabelCollator,
    *more: TrainerCallback,
    data: Any = None,
    kind: type[Trainer] = Trainer,
    **changes: Any,
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
    trainer = kind(
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


@pytest.mark.parametrize(("accumulated", "ages"), [(1, [0, 1, 1, 1, 1, 1, 0]), (3, [0, 0, 0, 1, 0, 0, 0, 0, 0])])
def test_labels_of_the_first_batch_of_a_step_are_one_step_old(
    tmp_path: Path, accumulated: int, ages: list[int]
) -> None:
    spy = Spy(callback(), CTCLabeler(blank_id=BLANK), pad, stand_ins=examples()[::3])
    used: list[tuple[int, Tensor]] = []

    class Uses(Trainer):
        def training_step(self, model: Any, inputs: Any, *more: Any) -> Tensor:
            used.append((self.state.global_step, inputs["input_values"]))
            return super().training_step(model, inputs, *more)

    # Six batches are an epoch.
    run(tmp_path, spy, kind=Uses, max_steps=len(ages) // accumulated, gradient_accumulation_steps=accumulated)
    made = [updates for updates, *_ in spy.calls]
    assert [step - updates for (step, _), updates in zip(used, made, strict=False)] == ages
    assert all(torch.equal(rows, call[3]["input_values"]) for (_, rows), call in zip(used, spy.calls, strict=False))


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


def test_a_callback_that_the_trainer_does_not_have_is_an_error(tmp_path: Path) -> None:
    """Its clock would stand still, and no example ever be labelled, without a word."""

    class Forgets(Trainer):
        def __init__(self, *args: Any, callbacks: Any, **named: Any) -> None:
            super().__init__(*args, **named)

    collator = PseudoLabelCollator(callback(), CTCLabeler(blank_id=BLANK), pad, pl_start=3)
    with pytest.raises(RuntimeError, match=r"EMACallback\(momentum=0.5, .* must be in the callbacks= of the Trainer"):
        run(tmp_path, collator, kind=Forgets)


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


def test_filters_drop_labels_as_in_the_trainers(tmp_path: Path) -> None:
    """Labels of the fixed teacher: the first average, which the student never reaches at learning rate 0."""
    processor = labelled_runs.processor(tmp_path / "processor")
    data = [row | {"seconds": len(row["input_values"]) / 100} for row in examples()]
    found = [
        label
        for row in data
        if "labels" not in row
        for label in CTCLabeler(BLANK).label(wav2vec2().eval(), pad([{"input_values": row["input_values"]}]))
    ]
    rates = [len(label.ids) / row["seconds"] for label, row in zip(found, unlabelled_of(data), strict=True)]
    longest, limit = sorted(len(label.ids) for label in found)[12], sorted(rates)[8]
    sure = sorted(label.confidence for label in found)[4]
    seen: list[set[str]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.extend(set(row) for row in rows)
        return pad(rows)

    made = PseudoLabelCollator(
        callback(),
        CTCLabeler(BLANK),
        collate,
        stand_ins=examples()[:1],
        filters={"too_long": {"maximum": longest}, "rate": {"max_characters": limit}},
        min_confidence=sure,
        processing_class=processor,
        duration_column="seconds",
    )
    run(tmp_path, made, data=data, learning_rate=0.0, max_steps=6)
    expected: Counter[str] = Counter()
    decode = made._decode
    assert decode is not None
    for label, row in zip(found, unlabelled_of(data), strict=True):
        reason = label.reason or ("too_long" if len(label.ids) > longest else None)
        reason = reason or ("rate" if len(decode(label.ids).strip()) / row["seconds"] > limit else None)
        expected[reason or ("confidence" if label.confidence < sure else "kept")] += 1
    made.counts.pop("stand_in", None)
    assert made.counts == expected and min(expected[name] for name in ("too_long", "rate", "confidence", "kept")) > 0
    assert not any("seconds" in names for names in seen)


def unlabelled_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "labels" not in row]


def test_filters_that_cannot_work_here_are_refused(tmp_path: Path) -> None:
    def made(**changes: Any) -> PseudoLabelCollator:
        return PseudoLabelCollator(callback(), CTCLabeler(BLANK), pad, **changes)

    with pytest.raises(ValueError, match=r"the filter no_speech judges by .*\(CTCLabeler\); filters that work here: "):
        made(filters={"no_speech": {}})
    with pytest.raises(ValueError, match="the filters Repeat need processing_class="):
        made(filters='{"repeat": {}}')
    with pytest.raises(ValueError, match="the filters Duration need duration_column="):
        made(filters={"duration": {"maximum": 3.0}})
    with pytest.raises(NotImplementedError, match=r"ConfidenceQuantile.* follows the labels of each optimizer step"):
        made(filters={"confidence_quantile": {"share": 0.3}})
    with pytest.raises(ValueError, match="the filter rate cannot be fitted"):
        processor = labelled_runs.processor(tmp_path)
        made(filters={"rate": "fit"}, processing_class=processor, duration_column="seconds")


class Draws:
    """Labels that are drawn: by the position of a row, or its number in the batch."""

    def __init__(self, positions: tuple[int, ...] | None = None) -> None:
        self.positions = positions

    def at(self, positions: Any) -> Draws:
        return Draws(tuple(positions))

    def label(self, teacher: Any, batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        assert self.positions is not None and "id" not in batch
        return [PseudoLabel((1 + position % 7,), 0.5) for position in self.positions]


def test_drawn_labels_belong_to_examples_and_not_to_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Draws draws its labels at random, .* by id_column, decode without"):
        PseudoLabelCollator(callback(), Draws(), pad)
    data = [row | {"id": 100 + number} for number, row in enumerate(examples())]
    labels: list[dict[float, list[int]]] = []
    for size in (4, 3):
        collator = Spy(callback(), Draws(), pad, id_column="id")
        run(tmp_path, collator, data=data, per_device_train_batch_size=size, max_steps=24 // size)
        labels.append(
            {
                float(values[0]): [i for i in ids if i >= 0]
                for *_, batch in collator.calls
                for values, ids in zip(batch["input_values"], batch["labels"].tolist(), strict=True)
            }
        )
    assert labels[0] == labels[1] and len(labels[0]) == 24
    for row in unlabelled_of(data):
        assert labels[0][float(row["input_values"][0])] == [1 + row["id"] % 7]
    # What does not draw needs no ids: generation without a temperature, two views of CTC labels.
    t5 = tiny_generation.t5()
    PseudoLabelCollator(callback(), generative_labeler_for(t5, max_new_tokens=4), pad)
    PseudoLabelCollator(callback(), two_views(CTCLabeler(BLANK), lambda batch: batch), pad)
    with pytest.raises(ValueError, match="Seq2SeqLabeler draws its labels at random"):
        PseudoLabelCollator(callback(), generative_labeler_for(t5, max_new_tokens=4, temperature=1.0), pad)
