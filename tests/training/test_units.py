"""Runs in seconds and tokens: what is counted, how close targets are met, and what the average makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch

from hf_ema_scaling.training.layout import RunLayout, data_source, lay_out

HALF_LIFE = 1000.0


def tokens_of(data: datasets.Dataset) -> np.ndarray:
    return np.array([len(row) for row in data.with_format(None)["input_ids"]], dtype=np.float64)


def rows(unit: str, count: int, seed: int = 0) -> datasets.Dataset:
    """Sentences of 2 to 8 tokens, and with as many seconds and a fraction where seconds count."""
    data = tiny.sentences(count, seed, lengths=(2, 9))
    if unit == "seconds":
        seconds = tokens_of(data) + np.random.default_rng(seed).uniform(0, 0.9, count)
        data = datasets.concatenate_datasets([data, datasets.Dataset.from_dict({"duration": seconds})], axis=1)
    return data


def sizes_of(unit: str, data: datasets.Dataset) -> np.ndarray:
    return np.array(data.with_format(None)["duration"]) if unit == "seconds" else tokens_of(data)


def laid_out(folder: Path, unit: str, kappa: float, *, pseudo: bool = False, world: int = 1, **more: Any) -> RunLayout:
    args = tiny.arguments(
        folder,
        batch_unit=unit,
        reference_batch_size=24,
        max_steps=60,
        kappa=kappa,
        small_batch_until=10.0,
        per_device_train_batch_size=4,
        **more,
    )
    if not pseudo:
        return lay_out(args, rows(unit, 70), optimizer="adamw", world_size=world)
    return lay_out(
        args,
        rows(unit, 70),
        optimizer="adamw",
        unlabelled=rows(unit, 50, 1),
        pseudo=tiny.pseudo(pl_start=7.5, unlabeled_ratio=2.0),
        world_size=world,
    )


# ---- What is counted


def test_batches_below_the_longest_item_are_said(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, "tokens", 1.0)
    assert layout.sampler.num_steps == len(layout.plan) == 60 and layout.warnings() == layout.plan.warnings()
    small = laid_out(tmp_path, "tokens", 0.1)
    assert small.sampler.num_steps < len(small.plan)
    counts = f"takes {small.sampler.num_steps} optimizer steps and not the {len(small.plan)} of its plan"
    assert counts in small.warnings()[-1]


def test_tokens_are_counted_before_padding(tmp_path: Path) -> None:
    data = rows("tokens", 30)
    args = tiny.arguments(tmp_path, batch_unit="tokens", reference_batch_size=24)
    counts = tokens_of(data)
    assert len(set(counts)) > 4
    order = np.random.default_rng(0).permutation(30)
    plain = [dict(row) for row in data]
    for source, expected in (
        (data, counts),
        (data.select(order), counts[order]),
        (data.shuffle(seed=3), tokens_of(data.shuffle(seed=3))),
        (plain, counts),
        (torch.utils.data.Subset(data, order.tolist()), counts[order]),
    ):
        found = data_source(source, args, "train_dataset")
        assert np.array_equal(found.units, expected) and np.array_equal(found.lengths, expected)


def test_a_column_of_lengths_wins(tmp_path: Path) -> None:
    data = rows("seconds", 5).rename_column("duration", "length")
    args = tiny.arguments(tmp_path, batch_unit="tokens", reference_batch_size=24)
    lengths = np.array(data["length"][:])
    for source in (data, [dict(row) for row in data]):
        assert np.allclose(data_source(source, args, "train_dataset").units, lengths, rtol=1e-6)
    named = tiny.arguments(tmp_path, batch_unit="tokens", reference_batch_size=24, length_column_name="words")
    assert np.allclose(data_source(data.rename_column("length", "words"), named, "train_dataset").units, lengths)
    assert np.array_equal(data_source(data, named, "train_dataset").units, tokens_of(data))


@pytest.mark.parametrize("stored", [True, False])
def test_data_without_tokens_is_refused(tmp_path: Path, stored: bool) -> None:
    data: Any = tiny.speech(3)
    args = tiny.arguments(tmp_path, batch_unit="tokens", reference_batch_size=24)
    with pytest.raises(
        ValueError, match=r"'length' .* or 'input_ids' in unlabeled_dataset; .*'input_values'.*tokenise"
    ):
        data_source(data if stored else list(data), args, "unlabeled_dataset")


def test_rows_without_tokens_and_padded_rows_are_refused(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, batch_unit="tokens", reference_batch_size=24)
    empty = datasets.Dataset.from_dict({"input_ids": [[1], [2, 3], []]})
    with pytest.raises(ValueError, match=r"item 2 has size 0\.0"):
        data_source(empty, args, "train_dataset")
    masks = [[1, 1, 1], [1, 0, 0]]
    padded = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 0, 0]], "attention_mask": masks})
    with pytest.raises(ValueError, match=r"rows of train_dataset are padded.*'length'"):
        data_source(padded, args, "train_dataset")
    # Padded in pieces, as by a batched map: lengths differ, and are those of padding nevertheless.
    pieces = [[1, 1, 0], [1, 0, 0], [1, 1, 1, 1]]
    rows = [{"input_ids": [5] * len(mask), "attention_mask": mask} for mask in pieces]
    for data in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(ValueError, match=r"rows of train_dataset are padded"):
            data_source(data, args, "train_dataset")
    whole = padded.map(lambda row: {"attention_mask": [1, 1, 1]})
    assert data_source(whole, args, "train_dataset").units.tolist() == [3, 3]
    counted = padded.add_column("length", [3, 1])
    assert data_source(counted, args, "train_dataset").units.tolist() == [3, 1]


# ---- Steps


@pytest.mark.parametrize("pseudo", [False, True])
@pytest.mark.parametrize("bucket_window", [0, 4])
@pytest.mark.parametrize("unit", ["seconds", "tokens"])
def test_cumulative_targets_are_met_to_one_item_at_every_step(
    tmp_path: Path, unit: str, bucket_window: int, pseudo: bool
) -> None:
    orders = []
    for kappa in (1.0, 2.5, 8.0):
        found = laid_out(tmp_path, unit, kappa, pseudo=pseudo, bucket_window=bucket_window)
        stream, sampler, plan = found.stream, found.sampler, found.plan
        assert sampler.num_steps == len(plan)
        sizes = np.diff(stream.cumulative_units)
        longest = sizes.max()
        drawn = stream.cumulative_units[sampler.positions]
        over = drawn - 24 * plan.borders
        # The item that reaches the target is the last one of the step.
        assert over.min() > -1e-6 and over.max() < longest
        assert (over[1:] < sizes[sampler.positions[1:] - 1]).all()
        # Batches, too, are off by no more than one item.
        assert np.abs(np.diff(drawn) - 24 * np.diff(plan.borders)).max() < longest
        data = [rows(unit, 70), rows(unit, 50, 1)]
        real = [sizes_of(unit, source)[stream.index[stream.source == kind]] for kind, source in enumerate(data)]
        assert np.allclose(np.sort(np.concatenate(real)), np.sort(sizes), atol=1e-9)
        assert (stream.source[: stream.position(7.5)] == 0).all() and stream.source.any() == pseudo
        orders.append((stream.source.tolist(), stream.index.tolist()))
        steps = [sorted(d.position for d in sampler.draws(n, 0)) for n in range(sampler.num_steps)]
        assert sum(steps, []) == list(range(len(stream)))  # noqa: RUF017
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("pseudo", [False, True])
@pytest.mark.parametrize("unit", ["seconds", "tokens"])
def test_momenta_are_those_of_the_units_drawn(tmp_path: Path, unit: str, pseudo: bool) -> None:
    rho = 0.5 ** (24 / HALF_LIFE)
    for kappa in (1.0, 2.5, 8.0):
        found = laid_out(tmp_path, unit, kappa, pseudo=pseudo, ema_momentum=None, ema_half_life=HALF_LIFE)
        assert found.plan.recipe.ema_momentum == pytest.approx(rho, rel=1e-15)
        sampler, total = found.sampler, 0.0
        for number in range(sampler.num_steps):
            step = sampler.step(number)
            momentum = math.exp(found.plan.log_momentum(step.start, step.end))
            assert momentum == pytest.approx(0.5 ** (step.units / HALF_LIFE), rel=1e-12)
            total += math.log(momentum)
        assert total == pytest.approx(found.stream.cumulative_units[-1] / 24 * math.log(rho), rel=1e-9)


@pytest.mark.parametrize("bucket_window", [0, 4])
def test_two_processes_in_tokens_share_every_item_once(tmp_path: Path, bucket_window: int) -> None:
    found = laid_out(tmp_path, "tokens", 2.5, pseudo=True, world=2, bucket_window=bucket_window)
    alone = laid_out(tmp_path, "tokens", 2.5, pseudo=True, bucket_window=bucket_window)
    dealt = list(found.sampler)
    assert len(dealt) == 2 * found.sampler.num_steps == 2 * alone.sampler.num_steps
    for number in range(found.sampler.num_steps):
        sides = dealt[2 * number : 2 * number + 2]
        drawn = sorted((d.position, d.source, d.index) for side in sides for d in side if d.weight)
        assert drawn == sorted((d.position, d.source, d.index) for d in alone.sampler.draws(number, 0))
        assert sides[0][-1].micro_batch == sides[1][-1].micro_batch


# ---- A run


def test_a_run_in_tokens(tmp_path: Path) -> None:
    data, items = rows("tokens", 70), {}
    for kappa in (1.0, 2.5):
        made = tiny.trainer(
            tiny.bert(),
            tiny.arguments(
                tmp_path,
                batch_unit="tokens",
                reference_batch_size=24,
                max_steps=20,
                kappa=kappa,
                small_batch_until=4.0,
                ema_momentum=None,
                ema_half_life=HALF_LIFE / 5,
                per_device_train_batch_size=3,
                logging_strategy="steps",
                logging_steps=1,
                bucket_window=2,
            ),
            data,
            data_collator=tiny.pad_sentences,
        )
        made.train()
        logs = [entry for entry in made.state.log_history if "ema/momentum" in entry]
        assert len(logs) == made.state.global_step == made.sampler.num_steps
        counts, weights = tokens_of(data), made.recorder.initial
        expected = {name: value.double() for name, value in weights.items()}
        total = 0.0
        for step, entry in enumerate(logs):
            units = sum(counts[index] for _, index, _ in made.drawn[step])
            total += units
            assert entry["batch/units"] == units and entry["clock/reference_step"] == pytest.approx(total / 24)
            assert entry["ema/kappa"] == pytest.approx(units / 24, rel=1e-12)
            momentum = 0.5 ** (units * 5 / HALF_LIFE)
            assert entry["ema/momentum"] == pytest.approx(momentum, rel=1e-12)
            for name, value in made.recorder.weights[step].items():
                expected[name] = momentum * expected[name] + (1 - momentum) * value.double()
                torch.testing.assert_close(
                    made.recorder.averages[step][name].double(), expected[name], rtol=1e-5, atol=1e-6
                )
        product = sum(math.log(entry["ema/momentum"]) for entry in logs)
        assert product == pytest.approx(total * 5 / HALF_LIFE * math.log(0.5), rel=1e-9)
        assert 480 <= total < 488
        items[kappa] = sorted(item for step in made.drawn for item in step)
    assert items[1.0] == items[2.5]
