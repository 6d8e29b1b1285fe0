"""The gradient noise scale as the trainers measure it."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.data.stream import DataSource, ReferenceStream
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.scaling import BatchSchedule, noise_estimate, step_borders
from hf_ema_scaling.training.noise import (
    BUCKETED,
    BY_LENGTH,
    ENOUGH,
    FEW_ITEMS,
    TOO_FEW,
    UNEVEN,
    Halves,
    NoiseMeter,
    halve,
)
from hf_ema_scaling.training.run_state import read_run_state


class Measured(TrainerCallback):
    """The norms and division of every measurement."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: dict[int, tuple[float, float, Halves]] = {}

    def on_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        meter = self.trainer._noise
        if meter._halves is not None:
            self.seen[state.global_step] = (*meter.last, meter._halves)


def run(folder: Path, train: bool = True, fixed: bool = False, **changes: Any) -> Any:
    more = {
        key: changes.pop(key)
        for key in ("example_loss", "unlabeled_dataset", "pseudo_label_args", "labeler")
        if key in changes
    }
    if "data_collator" in changes:
        more["data_collator"] = changes.pop("data_collator")
    model, data = changes.pop("model", None) or tiny.bert(), changes.pop("data", None) or tiny.sentences(40)
    watch = tiny.Unwatched()
    measured = Measured()
    values = {"max_steps": 4, "reference_batch_size": 8, "per_device_train_batch_size": 2, "noise_scale_every": 1}
    values |= {"learning_rate": 0.0} if fixed else {}
    args = tiny.arguments(folder, **(values | changes))
    made = tiny.trainer(model, args, data, callbacks=[measured, *([watch] if fixed else [])], **more)
    watch.trainer = measured.trainer = made
    made.measured = measured.seen
    if train:
        made.train()
    return made


def gradient_of(made: Any, step: int, items: int) -> dict[str, torch.Tensor]:
    """Mean gradient of the first items of a step in stream order, by itself."""
    model, data = made.model, made.train_dataset
    rows = [data[index] for _, index, _ in sorted(made.drawn[step], key=lambda item: item[2])[:items]]
    model.zero_grad()
    losses = [
        nn.functional.cross_entropy(model(input_ids=row["input_ids"][None]).logits, row["labels"][None])
        for row in rows
    ]
    torch.stack(losses).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def square(gradient: dict[str, torch.Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in gradient.values())


def one_sided(count: int) -> datasets.Dataset:
    """Nine tenths of the labels alike, the others told by the first token."""
    return tiny.sentences(count).map(lambda row: {"labels": int(row["input_ids"][0] >= 18)}).with_format("torch")


# ---- What is measured


@pytest.mark.parametrize(("micro", "kappa", "first"), [(2, 1.0, 4), (3, 1.0, 3), (1, 2.5, 10), (8, 2.0, 8)])
def test_norms_are_those_of_the_parts_computed_alone(tmp_path: Path, micro: int, kappa: float, first: int) -> None:
    made = run(tmp_path, fixed=True, kappa=kappa, per_device_train_batch_size=micro, max_steps=10)
    assert len(made.measured) == made.state.global_step == round(10 / kappa)
    for step, (small, big, halves) in made.measured.items():
        whole = len(made.drawn[step])
        assert halves.items == (first,) and halves.step_items == whole == 8 * kappa
        assert small == pytest.approx(square(gradient_of(made, step, first)), rel=1e-5)
        assert big == pytest.approx(square(gradient_of(made, step, whole)), rel=1e-5)
        assert big == pytest.approx(square(made.recorder.gradients[step]), rel=1e-6)
        assert abs(small / big - 1) > 1e-2


@pytest.mark.parametrize(("micro", "kappa"), [(2, 1.0), (3, 2.5), (16, 2.0)])
def test_sorted_steps_are_measured_by_halves_in_stream_order(tmp_path: Path, micro: int, kappa: float) -> None:
    made = run(
        tmp_path, fixed=True, data=with_durations(40), kappa=kappa, per_device_train_batch_size=micro, max_steps=10
    )
    assert len(made.measured) == made.state.global_step == round(10 / kappa)
    for step, (small, big, halves) in made.measured.items():
        whole = len(made.drawn[step])
        assert halves.items == (whole // 2,) and halves.step_items == whole == 8 * kappa
        # What is drawn first, all positions before the others, in order of duration.
        assert {p for _, _, p in made.drawn[step][: whole // 2]} == set(range(whole * step, whole * step + whole // 2))
        durations = [float(made.train_dataset[index]["duration"]) for _, index, _ in made.drawn[step]]
        assert durations[: whole // 2] == sorted(durations[: whole // 2]) and durations != sorted(durations)
        assert small == pytest.approx(square(gradient_of(made, step, whole // 2)), rel=1e-5)
        assert big == pytest.approx(square(gradient_of(made, step, whole)), rel=1e-5)
        assert abs(small / big - 1) > 1e-2


def test_micro_batches_of_any_size_measure_the_same(tmp_path: Path) -> None:
    runs = [run(tmp_path, fixed=True, per_device_train_batch_size=micro) for micro in (1, 2, 4)]
    for step in range(4):
        for norm in (0, 1):
            values = [made.measured[step][norm] for made in runs]
            assert values == pytest.approx(values[:1] * 3, rel=1e-5)
    scales = [made._noise.scale.estimate for made in runs]
    assert scales[1] == pytest.approx(scales[0], rel=1e-4) and scales[2] == pytest.approx(scales[0], rel=1e-4)


def test_a_gradient_scaler_is_taken_out(tmp_path: Path) -> None:
    plain = run(tmp_path, fixed=True)
    scaled = run(tmp_path, train=False, fixed=True)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled.train()
    assert tiny.difference(plain.recorder.gradients[0], scaled.recorder.gradients[0]) == pytest.approx(1023)
    for step in range(4):
        assert scaled.measured[step][:2] == pytest.approx(plain.measured[step][:2], rel=1e-6)


class ByFirstToken:
    """Every third row is dropped."""

    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        tokens = batch["input_ids"][:, 0].tolist()
        return [PseudoLabel((), 0.5, "confidence") if t % 3 == 0 else PseudoLabel((t % 3,), 0.5, None) for t in tokens]


def with_durations(count: int) -> datasets.Dataset:
    """Sentences with a duration each, which grows with the first token."""
    noise = np.random.default_rng(0).uniform(0, 2, count)
    data = tiny.sentences(count)
    durations = [1 + int(row["input_ids"][0]) + extra for row, extra in zip(data, noise, strict=True)]
    column = datasets.Dataset.from_dict({"duration": durations})
    return datasets.concatenate_datasets([data, column], axis=1).with_format("torch")


def first_label(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels.reshape(len(logits), -1)[:, 0], reduction="none")


def test_both_parts_have_their_share_of_both_sources(tmp_path: Path) -> None:
    made = run(
        tmp_path,
        fixed=True,
        reference_batch_size=12,
        unlabeled_dataset=tiny.sentences(40, 1).remove_columns("labels"),
        pseudo_label_args=tiny.pseudo(unlabeled_ratio=2.0, unlabeled_weight=0.5),
        labeler=ByFirstToken(),
        example_loss=first_label,
    )
    assert len(made.measured) == 4
    for step, (small, big, halves) in made.measured.items():
        assert halves.items == (6,) and halves.step_items == 12
        drawn = sorted(made.drawn[step], key=lambda item: item[2])
        assert [sum(kind for kind, _, _ in part) for part in (drawn[:6], drawn[6:])] == [4, 4]
        for count, norm in ((6, small), (12, big)):
            made.model.zero_grad()
            for kind, index, _ in drawn[:count]:
                row = (made.unlabeled_dataset if kind else made.train_dataset)[index]
                token = int(row["input_ids"][0])
                if kind and token % 3 == 0:
                    continue
                label = torch.tensor([token % 3]) if kind else row["labels"][None]
                loss = nn.functional.cross_entropy(made.model(input_ids=row["input_ids"][None]).logits, label)
                (loss * (0.5 if kind else 1.0) / count).backward()
            alone = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
            assert norm == pytest.approx(square(alone), rel=1e-5)


def test_batch_norm_is_measured_between_reference_batches(tmp_path: Path) -> None:
    """The first half of a step of two reference batches is the reference step."""
    changes: dict[str, Any] = {"reference_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 4}
    speech = tiny.speech(20, features=8)
    reference = run(tmp_path, fixed=True, model=tiny.parakeet(), data=speech, **changes)
    made = run(tmp_path, fixed=True, model=tiny.parakeet(), data=speech, kappa=2.0, **changes)
    assert not reference.measured and len(made.measured) == 2
    for step, (small, big, halves) in made.measured.items():
        assert halves.items == (4,)
        assert small == pytest.approx(square(reference.recorder.gradients[2 * step]), rel=1e-5)
        assert big == pytest.approx(square(made.recorder.gradients[step]), rel=1e-5)


# ---- Where a step can be divided


def sampler(
    micro: int,
    batch: int,
    *,
    ratio: float | None = None,
    world: int = 1,
    statistics: bool = False,
    lengths: bool = False,
    reference: int | None = None,
    bucket_window: int = 0,
    halve_every: int = 1,
) -> ScheduledBatchSampler:
    rng = np.random.default_rng(0)
    reference = reference or batch
    sources = [DataSource.of_samples(50, rng.uniform(1, 9, 50) if lengths else None) for _ in range(2)]
    stream = ReferenceStream(
        sources[0],
        reference_batch_size=reference,
        reference_steps=10,
        unlabelled=None if ratio is None else sources[1],
        unlabelled_ratio=ratio or 1.0,
        bucket_window=bucket_window,
    )
    borders = step_borders(BatchSchedule.constant(batch).resolve(10, None), reference, ())
    return ScheduledBatchSampler(
        stream,
        borders,
        micro_batch_size=micro,
        world_size=world,
        batch_statistics=statistics,
        halve_every=halve_every,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
@pytest.mark.parametrize("ratio", [None, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("lengths", [False, True])
def test_a_division_is_one_of_the_stream(world: int, micro: int, ratio: float | None, lengths: bool) -> None:
    made = sampler(micro, 60, ratio=ratio, world=world, lengths=lengths)
    for number in range(made.num_steps):
        halves = halve(made, number)
        if (world, micro) == (3, 5) and ratio in (0.5, 3.0) and not lengths:
            # Two rounds of one source and three of the other, or one and three.
            assert halves == (UNEVEN if ratio == 0.5 else TOO_FEW)
            continue
        assert isinstance(halves, Halves)
        parts: list[list[int]] = [[], []]
        shares = []
        for rank in range(world):
            draws = [draw for draw in made.draws(number, rank) if draw.weight]
            mine = [draw for draw in draws if draw.micro_batch < halves.border]
            assert len(mine) == halves.items[rank] > 0
            shares.append(sum(draw.source for draw in mine))
            for draw in draws:
                parts[draw.micro_batch >= halves.border].append(draw.position)
        kinds = made.stream.source
        for kind in (0, 1):
            first, second = ([p for p in part if kinds[p] == kind] for part in parts)
            assert not first or max(first) < min(second)
        step = [kinds[p] for part in parts for p in part]
        for items, share in zip(halves.items, shares, strict=True):
            assert abs(share - items * int(np.sum(step)) / len(step)) <= 1
        assert 1 / 4 <= sum(halves.items) / halves.step_items <= 3 / 4
        assert halves.small_batch == pytest.approx(world / sum(1 / items for items in halves.items))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (sampler(8, 8), TOO_FEW),
        (sampler(4, 8, world=2), TOO_FEW),
        (sampler(4, 8, ratio=1.0), TOO_FEW),
        (sampler(1, 11, ratio=10.0), TOO_FEW),
        (sampler(2, 8, ratio=3.0, statistics=True), TOO_FEW),
        (sampler(2, 8, ratio=1.0, statistics=True), UNEVEN),
        (sampler(2, 8, lengths=True, statistics=True), BY_LENGTH),
        (sampler(2, 16, lengths=True, statistics=True, reference=8, world=2), BY_LENGTH),
        (sampler(2, 3, lengths=True, world=2), FEW_ITEMS),
        (sampler(1, 4, lengths=True, ratio=3.0), FEW_ITEMS),
        (sampler(2, 8, lengths=True, bucket_window=4), BUCKETED),
        (sampler(2, 8, lengths=True, bucket_window=4, statistics=True), BUCKETED),
        (sampler(2, 16, lengths=True, bucket_window=4, reference=8, world=2), BUCKETED),
    ],
)
def test_why_a_step_is_not_divided(made: ScheduledBatchSampler, reason: str) -> None:
    assert halve(made, 0) == reason


def test_the_chance_that_short_items_come_first_is_not_taken() -> None:
    """Or only steps would be measured whose first items are short."""
    made = sampler(1, 2, reference=2, statistics=True, lengths=True)
    assert {halve(made, number) for number in range(10)} == {BY_LENGTH}


def test_with_batch_statistics_reference_batches_are_parts() -> None:
    for lengths in (False, True):
        made = sampler(4, 16, reference=8, ratio=1.0, statistics=True, lengths=lengths)
        assert halve(made, 0) == Halves(2, (8,), 16, 1.0, 1.0)


def test_bucketed_steps_are_divided_between_reference_batches() -> None:
    for statistics in (False, True):
        made = sampler(3, 24, reference=8, lengths=True, bucket_window=5, statistics=statistics)
        for number in range(3):
            assert halve(made, number) == Halves(3, (8,), 24, 1.0, 1.0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("ratio", [None, 3.0])
def test_halving_changes_the_micro_batches_of_measured_steps_only(world: int, ratio: float | None) -> None:
    plain, halved, equal = (
        sampler(4, 30, ratio=ratio, world=world, lengths=lengths, halve_every=every)
        for lengths, every in ((True, 0), (True, 3), (False, 1))
    )
    of_equal = sampler(4, 30, ratio=ratio, world=world, halve_every=0)
    for number in range(10):
        before, after = ([group.tolist() for group in made.micro_batches(number)] for made in (plain, halved))
        assert (before == after) == (number % 3 != 2) == (halved.half(number) is None)
        assert sorted(chain(*before)) == sorted(chain(*after))
        # Without lengths nothing is sorted and nothing changes.
        assert [g.tolist() for g in equal.micro_batches(number)] == [
            g.tolist() for g in of_equal.micro_batches(number)
        ]
        assert equal.half(number) is None
        # At most one more round of each source.
        assert len(before) <= len(after) <= len(before) + world * (1 if ratio is None else 2)
        for rank in range(world):
            assert len({d.micro_batch for d in halved.draws(number, rank)}) == len(after) // world


def measure(made: ScheduledBatchSampler, gradients: np.ndarray, fair: bool) -> tuple[float, float]:
    """Mean estimates of |G|^2 and tr Sigma over all steps.

    Not `fair`: the first half of the micro-batches of the step as it is without measurement.
    """
    stream, world, found = made.stream, made.world_size, []
    for number in range(made.num_steps):
        groups = made.micro_batches(number)
        halves = halve(made, number) if fair else None
        border = halves.border if isinstance(halves, Halves) else len(groups) // world // 2
        parts = [np.concatenate(groups[rank : border * world : world]) for rank in range(world)]
        if isinstance(halves, Halves):
            assert halves.items == tuple(map(len, parts))
        step = np.concatenate(groups)
        means = [gradients[stream.index[part]].mean(0) for part in (*parts, step)]
        squares = [np.square(value).sum() for value in means]
        small = world / sum(1 / len(part) for part in parts)
        unit = float(stream.cumulative_units[-1]) / len(stream)
        if isinstance(halves, Halves):
            assert (halves.small_batch, halves.step_batch) == pytest.approx((small * unit, len(step) * unit))
        sizes = {"small_batch": small * unit, "big_batch": len(step) * unit}
        found.append(noise_estimate(np.mean(squares[:-1]), squares[-1], **sizes))
    return tuple(np.mean(found, axis=0).tolist())  # type: ignore[return-value]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_halves_of_sorted_steps_give_the_noise_in_closed_form(unit: str, world: int) -> None:
    """Gradients that grow with length, from passes without replacement.

    A mean of b of N items has E |g|^2 = |G|^2 + S^2 (1 / b - 1 / N), S^2 the sample variance: the estimates are
    |G|^2 - S^2 / N and S^2 for each item, in tokens S^2 times the tokens of one for each token. There steps end where
    their tokens reach a target, so what grows with length varies less between them than between random ones.
    """
    items, batch = 2400, 16 if unit == "samples" else 160
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 10, items).astype(np.float64)
    gradients = rng.normal(0, 1, (items, 8)) + 0.5
    gradients[:, 0] += 1.5 * (tokens - 5)
    sizes = np.ones(items) if unit == "samples" else tokens
    mean = gradients.mean(0)
    noise = np.square(gradients - mean).sum() / (items - 1) * sizes.mean()
    signal = np.square(mean).sum() - noise / sizes.sum()
    stream = ReferenceStream(
        DataSource(sizes, tokens), reference_batch_size=batch, reference_steps=8 * sizes.sum() // batch
    )
    estimates = {}
    for fair in (True, False):
        borders = step_borders(BatchSchedule.constant(batch).resolve(stream.reference_steps, None), batch, ())
        made = ScheduledBatchSampler(
            stream, borders, micro_batch_size=2, world_size=world, halve_every=1 if fair else 0
        )
        estimates[fair] = measure(made, gradients, fair)
    tolerance = 0.06 if unit == "samples" else 0.2
    assert estimates[True][1] == pytest.approx(noise, rel=tolerance)
    assert estimates[True][0] == pytest.approx(signal, abs=tolerance * noise / batch)
    assert abs(estimates[False][1] / noise - 1) > 0.5


@pytest.mark.parametrize("world", [1, 2])
def test_items_of_unequal_size_do_not_bias_the_estimate(world: int) -> None:
    """Eight items to a step, their tokens between 1 and 9: the tokens drawn would be a biased divisor."""
    items, batch, per_item = 2400, 40, 5.0
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 10, items).astype(np.float64)
    gradients = rng.normal(0, 1, (items, 50)) + 0.3
    stream = ReferenceStream(
        DataSource(tokens, tokens), reference_batch_size=batch, reference_steps=16 * items * 5 // batch
    )
    borders = step_borders(BatchSchedule.constant(batch).resolve(stream.reference_steps, None), batch, ())
    made = ScheduledBatchSampler(stream, borders, micro_batch_size=1, world_size=world, halve_every=1)
    signal, noise = measure(made, gradients, fair=True)
    mean = gradients.mean(0)
    expected = np.square(gradients - mean).sum() / (items - 1)
    assert noise == pytest.approx(expected * per_item, rel=0.03)
    assert signal == pytest.approx(np.square(mean).sum() - expected / items, rel=0.03)


def test_the_rescaling_makes_a_part_a_step_of_its_own() -> None:
    halves = Halves(1, (3, 2), 12, 1.0, 1.0)
    assert halves.small_batch == pytest.approx(2.4) and halves.step_batch == 12 and halves.mean == 1
    assert (halves.rescaling(0), halves.rescaling(1)) == (2.0, 3.0)
    # In tokens: 10 to an item on average, 8 in this step.
    halves = Halves(1, (3, 2), 12, 10.0, 0.8)
    assert halves.small_batch == pytest.approx(24) and halves.step_batch == 120
    assert (halves.rescaling(0), halves.rescaling(1)) == pytest.approx((1.6, 2.4))


def test_in_tokens_norms_are_those_of_means_over_items(tmp_path: Path) -> None:
    """Of the same items, whatever the number of tokens that they and the step happen to have."""
    data = tiny.sentences(60, lengths=(2, 9))
    made = run(
        tmp_path,
        fixed=True,
        data=data,
        data_collator=tiny.pad_sentences,
        batch_unit="tokens",
        reference_batch_size=50,
        per_device_train_batch_size=2,
        max_steps=6,
    )
    assert len(made.measured) == 6
    for step, (small, big, halves) in made.measured.items():
        (first,), whole = halves.items, len(made.drawn[step])
        assert 1 < first < whole == halves.step_items
        assert small == pytest.approx(square(gradient_of(made, step, first)), rel=1e-4)
        assert big == pytest.approx(square(gradient_of(made, step, whole)), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_device_train_batch_size": 8}, "lower per_device_train_batch_size"),
        ({"data": with_durations(40), "bucket_window": 2}, "set bucket_window=0"),
    ],
)
def test_what_cannot_be_measured_is_said_once_and_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str
) -> None:
    made = run(tmp_path, logging_strategy="steps", logging_steps=1, **changes)
    said = [record.message for record in caplog.records if "noise scale is not measured" in record.message]
    assert len(said) == 1 and "optimizer step 0" in said[0] and words in said[0]
    assert not made.measured and made._noise.scale.count == 0
    assert not any(key.startswith("noise/") for entry in made.state.log_history for key in entry)


def test_off_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path, noise_scale_every=0, per_device_train_batch_size=8)
    assert "noise scale" not in caplog.text and made._noise.scale.count == 0


@pytest.mark.parametrize("every", [-1, 0.5])
def test_intervals_that_are_none_are_refused(tmp_path: Path, every: float) -> None:
    with pytest.raises(ValueError, match=f"noise_scale_every.*{every}"):
        tiny.arguments(tmp_path, noise_scale_every=every)


# ---- What the run sees of it


def test_gradients_and_weights_are_the_same_bits_with_and_without(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, model=tiny.bert(dropout=0.2), noise_scale_every=every, max_grad_norm=0.5) for every in (0, 1, 3)
    ]
    assert [len(made.measured) for made in runs] == [0, 4, 1] and list(runs[2].measured) == [2]
    for made in runs[1:]:
        assert tiny.same_bits(made.recorder.gradients, runs[0].recorder.gradients)
        assert tiny.same_bits(made.recorder.weights, runs[0].recorder.weights)
        assert tiny.same_bits(made.recorder.averages, runs[0].recorder.averages)


def test_sorted_steps_keep_their_samples_and_their_gradients(tmp_path: Path) -> None:
    """Only the steps measured are cut into other micro-batches, which changes the last digits of their gradients."""
    runs = [run(tmp_path, data=with_durations(40), noise_scale_every=every) for every in (0, 3)]
    assert list(runs[1].measured) == [2]
    for step in range(4):
        drawn = [made.drawn[step] for made in runs]
        assert sorted(drawn[0]) == sorted(drawn[1]) and (drawn[0] == drawn[1]) == (step != 2)
        gradients = [made.recorder.gradients[step] for made in runs]
        assert tiny.same_bits(*gradients) == (step < 2)
        assert tiny.difference(*gradients) < 1e-5


def test_the_log_says_the_running_estimate(tmp_path: Path) -> None:
    made = run(
        tmp_path, data=one_sided(240), learning_rate=1e-4, max_steps=12, logging_strategy="steps", logging_steps=1
    )
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    sums, said = np.zeros(2), 0
    for step, entry in enumerate(logs):
        small, big, _ = made.measured[step]
        sums = sums * 0.5 ** (1 / 50) + [(8 * big - 4 * small) / 4, (small - big) / (1 / 4 - 1 / 8)]
        if (sums > 0).all():
            said += 1
            assert entry["noise/scale"] == pytest.approx(sums[1] / sums[0], rel=1e-9)
            assert entry["noise/largest_kappa"] == entry["noise/scale"] / 8
        else:
            assert "noise/scale" not in entry
    assert said > 0


def test_a_gradient_that_is_not_finite_is_not_counted(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        # The last of the four micro-batches of the second step.
        return nn.functional.cross_entropy(logits, labels, reduction="none") * (math.nan if calls[-1] == 7 else 1.0)

    made = run(tmp_path, example_loss=loss, max_example_loss=None, on_nonfinite="skip", logging_nan_inf_filter=True)
    assert made.state.global_step == 4 and made._noise.scale.count == 3
    estimate = made._noise.scale.estimate
    assert estimate is not None and all(map(math.isfinite, estimate))


def test_a_resumed_run_measures_on_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "max_steps": 8,
        "noise_scale_every": 2,
        "logging_strategy": "steps",
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = run(tmp_path / "whole", **changes)
    resumed = run(tmp_path / "resumed", train=False, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed._noise.state_dict() == whole._noise.state_dict()
    assert resumed._noise.scale.count == 4
    noise = [[e.get("noise/scale") for e in made.state.log_history if "loss" in e] for made in (whole, resumed)]
    assert noise[0] == noise[1]
    final = read_run_state(tmp_path / "whole" / "checkpoint-8").counters["noise"]
    assert final == whole._noise.state_dict()
    whole.train()
    assert whole._noise.scale.count == 4


# ---- The warning


def test_the_warning_comes_once_per_stage_after_enough_measurements(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nearly all labels alike and a small learning rate: gradients are far from 0 and hardly noisy."""
    schedule = '[{"batch_size": 16, "until": 52}, {"batch_size": 64, "until": 84}, {"batch_size": 8}]'
    made = run(
        tmp_path,
        data=one_sided(240),
        max_steps=86,
        batch_schedule=schedule,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
    )
    assert made.sampler.num_steps == 26 + 4 + 2
    warned = [record.message for record in caplog.records if "exceeds the largest useful one" in record.message]
    assert [message.split()[0] for message in warned] == ["kappa=2", "kappa=8", "kappa=1"]
    for message, count in zip(warned, (ENOUGH, 26, 30), strict=True):
        assert f"({count} measurements)" in message


def meter_at(kappa: float, noise: float, measurements: int) -> NoiseMeter:
    """A meter that has measured |G|^2 = 1 and tr Sigma = noise as often, at a stage of `kappa` and B = 4."""

    class Alone:
        is_main_process, num_processes, process_index, scaler = True, 1, 0, None

    meter: Any = NoiseMeter(1, 4.0, Alone())  # type: ignore[arg-type]
    meter._stage_kappa = kappa
    for _ in range(measurements):
        meter.scale.add(1 + noise / 2, 1 + noise / 4, small_batch=2, big_batch=4)
    meter._compare()
    return meter


@pytest.mark.parametrize(
    ("kappa", "noise", "measurements", "warns"),
    [(8.0, 31.9, ENOUGH, True), (8.0, 32.1, ENOUGH, False), (8.0, 1.0, ENOUGH - 1, False)],
)
def test_the_border_of_the_warning(
    caplog: pytest.LogCaptureFixture, kappa: float, noise: float, measurements: int, warns: bool
) -> None:
    meter = meter_at(kappa, noise, measurements)
    assert meter.logs() == pytest.approx({"noise/scale": noise, "noise/largest_kappa": noise / 4})
    assert ("exceeds the largest useful one" in caplog.text) == warns == bool(meter.state_dict()["warned"])


def test_a_stage_that_cannot_be_measured_is_compared_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """With what was measured before, which is not logged as if it were measured now."""
    meter = meter_at(1.0, 31.0, 30)
    assert meter.logs()["noise/largest_kappa"] == pytest.approx(7.75) and "exceeds" not in caplog.text
    for _ in range(3):
        meter.begin(sampler(16, 8, reference=1), 0, nn.Linear(1, 1))
    # 31 over a reference batch of 4 units.
    assert "kappa=8 of this stage exceeds the largest useful one, 7.75" in caplog.text
    assert caplog.text.count("exceeds the largest useful one") == 1 and meter.logs() == {}
    resumed = meter_at(1.0, 31.0, 0)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.logs() == {} and resumed.state_dict() == meter.state_dict()
