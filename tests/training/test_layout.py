"""Runs in other circumstances: workers, precision, frozen parts, columns; and what identifies a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from hf_ema_scaling.training.layout import data_source, lay_out


def run(folder: Path, model: Any = None, **changes: Any) -> Any:
    values = {"max_steps": 4, "kappa": 2.0, "per_device_train_batch_size": 3, "small_batch_until": 1}
    made = tiny.trainer(
        model or tiny.wav2vec2(),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(9, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=1.0),
        labeler=tiny.ContentLabeler(),
        eval_dataset=tiny.speech(4, 2),
    )
    made.train()
    return made


def test_workers_change_no_bit(tmp_path: Path) -> None:
    plain = run(tmp_path)
    workers = run(tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=2)
    assert workers.drawn == plain.drawn
    assert tiny.same_bits(tiny.average(workers), tiny.average(plain))


def test_keeping_every_column_changes_no_bit(tmp_path: Path) -> None:
    plain, everything = run(tmp_path), run(tmp_path, remove_unused_columns=False)
    assert tiny.same_bits(tiny.average(everything), tiny.average(plain))
    assert everything.evaluate()["eval_ema_loss"] == plain.evaluate()["eval_ema_loss"]


def test_rows_of_the_labelled_set_are_those_of_the_index(tmp_path: Path) -> None:
    """What the student hears, against the data sets."""
    heard: list[torch.Tensor] = []
    model = tiny.wav2vec2()
    made = tiny.trainer(
        model,
        tiny.arguments(tmp_path, max_steps=3, per_device_train_batch_size=1),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(9, 1, labels=False),
        labeler=tiny.ContentLabeler(),
    )
    model.register_forward_pre_hook(
        # The teacher is compared with it in eval mode as training begins.
        lambda module, args, kwargs: heard.append(kwargs["input_values"][0].clone()) if module.training else None,
        with_kwargs=True,
    )
    made.train()
    drawn = [item for step in made.drawn for item in step]
    assert len(drawn) == len(heard) == 12
    sources = [tiny.speech(12), tiny.speech(9, 1, labels=False)]
    for (source, index, _), values in zip(drawn, heard, strict=True):
        assert np.array_equal(values.numpy(), sources[source][index]["input_values"])


def test_bf16_autocast_keeps_float32_weights_and_average(tmp_path: Path) -> None:
    model = tiny.wav2vec2()
    made = run(tmp_path, model, bf16=True)
    assert (
        {p.dtype for p in made.model.parameters()} == {t.dtype for t in tiny.average(made).values()} == {torch.float32}
    )
    plain = run(tmp_path)
    apart = tiny.difference(plain.recorder.gradients[0], made.recorder.gradients[0])
    assert 1e-4 < apart < 0.2


def test_a_bf16_student_has_a_float32_average(tmp_path: Path) -> None:
    made = tiny.trainer(tiny.bert().bfloat16(), tiny.arguments(tmp_path, ema_momentum=0.999), tiny.sentences(12))
    made.train()
    recorder = made.recorder
    name = "classifier.weight"
    assert recorder.weights[0][name].dtype == torch.bfloat16 and recorder.averages[0][name].dtype == torch.float32
    expected = recorder.initial[name].double()
    for step in range(4):
        expected = 0.999 * expected + 0.001 * recorder.weights[step][name].double()
        torch.testing.assert_close(recorder.averages[step][name].double(), expected, rtol=1e-6, atol=1e-7)


def test_frozen_parts_stay_and_are_copied(tmp_path: Path) -> None:
    model = tiny.wav2vec2()
    model.freeze_feature_encoder()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = tiny.parameters(model)
    made = run(tmp_path, model, weight_decay=0.1)
    average = tiny.average(made)
    assert frozen and all(torch.equal(average[name], before[name]) for name in frozen)
    moved = [name for name in before if name not in frozen and not torch.equal(average[name], before[name])]
    # `masked_spec_embed` has no gradient without masking.
    assert set(before) - frozen - set(moved) <= {"wav2vec2.masked_spec_embed"}


def test_several_passes_draw_every_item_equally_often(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, max_steps=9, kappa=5.0)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(12))
    made.train()
    counts = np.bincount([index for step in made.drawn for _, index, _ in step], minlength=12)
    assert counts.tolist() == [3] * 12


def test_identity_knows_the_data_and_the_reference_recipe(tmp_path: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        data = changes.pop("data", None) or tiny.speech(12)
        return lay_out(tiny.arguments(tmp_path, bucket_window=2, **changes), data, optimizer="adamw").identity

    base = identity()
    assert identity(kappa=3.0) == identity(batch_size=7) == identity(per_device_train_batch_size=1) == base
    assert identity(learning_rate=1e-4) == base
    for changes in (
        {"reference_batch_size": 5},
        {"seed": 1},
        {"data_seed": 1},
        {"bucket_window": 3},
        {"data": tiny.speech(11)},
        {"data": tiny.speech(12, 8)},
    ):
        if "bucket_window" in changes:
            other = lay_out(tiny.arguments(tmp_path, **changes), tiny.speech(12), optimizer="adamw").identity
        else:
            other = identity(**changes)
        assert other != base, changes


def test_sizes_come_from_the_columns(tmp_path: Path) -> None:
    data = tiny.speech(5)
    durations = np.array(data["duration"][:])
    seconds = data_source(
        data, tiny.arguments(tmp_path, batch_unit="seconds", reference_batch_size=9.5), "train_dataset"
    )
    assert np.array_equal(seconds.units, durations) and seconds.lengths is not None
    samples = data_source(data, tiny.arguments(tmp_path), "train_dataset")
    assert samples.units.tolist() == [1.0] * 5 and np.array_equal(samples.lengths, durations)
    named = data.rename_column("duration", "length")
    assert np.array_equal(data_source(named, tiny.arguments(tmp_path), "train_dataset").lengths, durations)
    assert data_source(tiny.sentences(5), tiny.arguments(tmp_path), "train_dataset").lengths is None
    with pytest.raises(TypeError, match="train_dataset must be a map-style data set with a length, got generator"):
        data_source((row for row in data), tiny.arguments(tmp_path), "train_dataset")
