from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream


def durations(items: int, seed: int = 0) -> NDArray[np.float64]:
    """Lognormal seconds, most between 1 and 20."""
    return np.clip(np.random.default_rng(seed).lognormal(1.5, 0.7, items), 0.3, 30.0)


def seconds(items: int, seed: int = 0) -> DataSource:
    sizes = durations(items, seed)
    return DataSource(sizes, sizes)


def samples(items: int, seed: int = 0) -> DataSource:
    return DataSource.of_samples(items, durations(items, seed))


def items_of(stream: ReferenceStream, kind: int) -> NDArray[np.int32]:
    return stream.index[stream.source == kind]


def assert_passes(indices: NDArray[np.int32], items: int) -> None:
    """Every pass, the last and partial one included, has no item twice; full ones have all."""
    passes = [indices[i : i + items] for i in range(0, len(indices), items)]
    assert len(passes) >= 3
    for one in passes:
        assert len(np.unique(one)) == len(one)
        assert len(one) in (items, len(indices) % items)
    assert all((a[: len(b)] != b).any() for a, b in pairwise(passes))


@pytest.mark.parametrize("bucket_window", [0, 1, 4, 1000])
@pytest.mark.parametrize("source", [samples, seconds])
def test_every_pass_visits_every_item_once_and_batches_straddle_passes(source: Any, bucket_window: int) -> None:
    stream = ReferenceStream(
        source(101),
        unlabelled=source(67, 1),
        reference_batch_size=16,
        reference_steps=30 if source is samples else 180,
        pl_start=5.5,
        bucket_window=bucket_window,
    )
    assert_passes(items_of(stream, LABELLED), 101)
    assert_passes(items_of(stream, UNLABELLED), 67)


@pytest.mark.parametrize("bucket_window", [0, 4])
def test_a_run_in_samples_has_exactly_its_units(bucket_window: int) -> None:
    stream = ReferenceStream(
        samples(50),
        unlabelled=samples(70, 1),
        reference_batch_size=12,
        reference_steps=40,
        pl_start=10,
        unlabelled_ratio=2,
        bucket_window=bucket_window,
    )
    assert len(stream) == 480
    assert (stream.source[:120] == LABELLED).all() and stream.source[120:].sum() == 240
    assert stream.position(10.0) == 120 and stream.source[120:].reshape(-1, 12).sum(1).tolist() == [8] * 30
    assert stream.examples_per_reference_batch == 12
    assert stream.cumulative_units.tolist() == list(range(481))


@pytest.mark.parametrize("ratio", [1.0, 3.0, 1 / 3, 0.3, 2.5, 7.0])
def test_the_ratio_is_never_off_by_more_than_one_item(ratio: float) -> None:
    stream = ReferenceStream(
        samples(50),
        unlabelled=samples(70, 1),
        reference_batch_size=12,
        reference_steps=100,
        pl_start=7,
        unlabelled_ratio=ratio,
    )
    start = int(stream.position(7.0))
    assert start == 84 and (stream.source[:start] == LABELLED).all()
    unlabelled = np.cumsum(stream.source[start:])
    drawn = np.arange(1, len(unlabelled) + 1)
    assert len(stream) == 1200
    assert np.abs(unlabelled - drawn * ratio / (1 + ratio)).max() < 1 + 1e-9


@pytest.mark.parametrize("bucket_window", [0, 5])
@pytest.mark.parametrize("ratio", [1.0, 4.0, 0.3])
@pytest.mark.parametrize("pl_start", [0.0, 7.0, 7.3])
def test_in_seconds_the_ratio_is_never_off_by_more_than_one_utterance(
    ratio: float, pl_start: float, bucket_window: int
) -> None:
    labelled, unlabelled = seconds(80), seconds(120, 1)
    stream = ReferenceStream(
        labelled,
        unlabelled=unlabelled,
        reference_batch_size=90,
        reference_steps=50,
        pl_start=pl_start,
        unlabelled_ratio=ratio,
        bucket_window=bucket_window,
    )
    longest = max(labelled.units.max(), unlabelled.units.max())
    start = int(stream.position(pl_start))
    assert (stream.source[:start] == LABELLED).all()
    # The greedy order begins with one item of each source.
    assert stream.source[start : start + 2].tolist() == [LABELLED, UNLABELLED]
    sizes = np.diff(stream.cumulative_units)[start:]
    units = np.cumsum(sizes * (stream.source[start:] == UNLABELLED))
    assert np.abs(units - np.cumsum(sizes) * ratio / (1 + ratio)).max() < longest
    both = np.where(stream.source == LABELLED, labelled.units[stream.index % 80], unlabelled.units[stream.index])
    np.testing.assert_allclose(np.diff(stream.cumulative_units), both, rtol=1e-9)
    assert 0 <= stream.cumulative_units[-1] - 4500 < longest


def test_position_and_clock_are_inverse_and_at_most_one_item_past_the_target() -> None:
    source = seconds(300)
    stream = ReferenceStream(source, reference_batch_size=40, reference_steps=70)
    every = np.arange(len(stream) + 1)
    assert (stream.position(stream.clock(every)) == every).all()
    targets = np.linspace(0, 70, 997)
    positions = stream.position(targets)
    overshoot = stream.cumulative_units[positions] - targets * 40
    assert overshoot.min() > -1e-6 and overshoot.max() < source.units.max()
    assert (stream.cumulative_units[np.maximum(positions - 1, 0)] <= targets * 40).all()
    assert stream.position(0.0) == 0 and stream.position(70.0) == stream.position(1e9) == len(stream)


def test_sizes_that_binary_cannot_hold_do_not_drift() -> None:
    # Sums of 0.1 miss whole numbers in float64, each by a rounding more.
    stream = ReferenceStream(
        DataSource(np.full(37, 0.1)),
        unlabelled=DataSource(np.full(53, 0.1)),
        reference_batch_size=0.6,
        reference_steps=20_000,
        pl_start=5_000,
    )
    positions = stream.position(np.arange(20_001.0))
    assert np.abs(positions - 6 * np.arange(20_001)).max() <= 1 and len(stream) == 120_000
    assert (stream.source[: stream.position(5_000.0)] == LABELLED).all() and stream.source.sum() == 45_000


def test_n_ref_in_seconds_is_the_mean_number_of_examples() -> None:
    stream = ReferenceStream(DataSource(np.array([2.0, 4.0])), reference_batch_size=12, reference_steps=10)
    assert stream.examples_per_reference_batch == 4 and len(stream) == 40


@pytest.mark.parametrize("bucket_window", [0, 3])
def test_the_seed_decides(bucket_window: int) -> None:
    def order(seed: int) -> list[int]:
        stream = ReferenceStream(
            samples(40),
            unlabelled=samples(40, 1),
            reference_batch_size=10,
            reference_steps=16,
            pl_start=4,
            seed=seed,
            bucket_window=bucket_window,
        )
        return (stream.index + 1000 * stream.source.astype(np.int32)).tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)
    # Equal sizes and the same pass number: the two sources have an order each.
    labelled = [item for item in order(3) if item < 1000]
    assert [item - 1000 for item in order(3) if item >= 1000][:40] != labelled[:40]


@pytest.mark.parametrize("bucket_window", [0, 3])
@pytest.mark.parametrize("source", [samples, seconds])
def test_a_longer_run_begins_like_a_shorter_one(source: Any, bucket_window: int) -> None:
    short, long = (
        ReferenceStream(
            source(40),
            unlabelled=source(30, 1),
            reference_batch_size=14,
            reference_steps=steps,
            pl_start=3,
            unlabelled_ratio=2,
            bucket_window=bucket_window,
        )
        for steps in (20, 47)
    )
    assert (long.index[: len(short)] == short.index).all() and (long.source[: len(short)] == short.source).all()


def spreads(stream: ReferenceStream, lengths: NDArray[np.float64], kind: int) -> NDArray[np.float64]:
    """Standard deviation of the lengths of one source in each reference batch."""
    borders = stream.position(np.arange(np.floor(stream.reference_steps) + 1))
    batches = [np.arange(a, b) for a, b in pairwise(borders)]
    rows = [stream.index[batch[stream.source[batch] == kind]] for batch in batches]
    return np.array([lengths[row].std() if len(row) else np.nan for row in rows])


@pytest.mark.parametrize("batch", [64, 50])
def test_bucketing_makes_reference_batches_alike_in_every_pass(batch: int) -> None:
    # 1000 = 15.6 * 64: later passes begin inside a reference batch, and their batches must still lie on its borders.
    lengths = durations(1000)
    source = DataSource.of_samples(1000, lengths)
    plain, bucketed = (
        spreads(
            ReferenceStream(source, reference_batch_size=batch, reference_steps=80, bucket_window=window),
            lengths,
            LABELLED,
        )
        for window in (0, 50)
    )
    assert 3.5 < plain.mean() < 4.5
    of_pass = (np.arange(80) * batch) // 1000
    straddles = (np.arange(1, 81) * batch - 1) // 1000 != of_pass
    for number in range(4):
        inside = bucketed[(of_pass == number) & ~straddles]
        assert len(inside) > 10 and inside.mean() < 0.15 * plain.mean()


def test_bucketing_holds_for_both_sources_after_pl_start() -> None:
    lengths = durations(500), durations(900, 1)
    stream = ReferenceStream(
        DataSource.of_samples(500, lengths[0]),
        unlabelled=DataSource.of_samples(900, lengths[1]),
        reference_batch_size=40,
        reference_steps=120,
        pl_start=20,
        unlabelled_ratio=3,
        bucket_window=20,
    )
    # Passes begun after pl_start; the labelled one under way there is cut for whole batches of labelled items.
    for kind in (LABELLED, UNLABELLED):
        assert np.median(spreads(stream, lengths[kind], kind)[50:]) < 0.1 * lengths[kind].std()


def test_bucketing_in_seconds() -> None:
    lengths = durations(3000)
    source = DataSource(lengths, lengths)
    bucketed, plain = (
        spreads(
            ReferenceStream(source, reference_batch_size=200, reference_steps=200, bucket_window=window),
            lengths,
            LABELLED,
        ).mean()
        for window in (10, 0)
    )
    assert bucketed < 0.45 * plain


def test_long_utterances_do_not_end_every_window() -> None:
    # In seconds nearly no batch is filled exactly; only the last one of a pass may be held in its place for that.
    lengths = durations(20_000)
    steps = int(lengths.sum() / 100) // 10 * 10
    stream = ReferenceStream(
        DataSource(lengths, lengths), reference_batch_size=100, reference_steps=steps, bucket_window=10
    )
    borders = stream.position(np.arange(steps + 1.0))
    means = np.array([lengths[stream.index[a:b]].mean() for a, b in pairwise(borders)])
    longest = np.bincount(means.reshape(-1, 10).argmax(1), minlength=10) / (steps // 10)
    assert steps == 1140 and longest.max() < 0.25


def test_sort_by_length_is_stable_and_needs_lengths() -> None:
    stream = ReferenceStream(
        DataSource.of_samples(4, np.array([3.0, 1.0, 3.0, 2.0])), reference_batch_size=4, reference_steps=1
    )
    ordered = stream.sort_by_length(np.arange(4))
    lengths = [[3.0, 1.0, 3.0, 2.0][i] for i in stream.index[ordered]]
    assert lengths == [1, 2, 3, 3] and ordered[2] < ordered[3]
    assert stream.sort_by_length(np.empty(0, dtype=np.int64)).tolist() == []
    plain = ReferenceStream(DataSource.of_samples(4), reference_batch_size=4, reference_steps=1)
    assert plain.sort_by_length(np.array([2, 0, 1])).tolist() == [2, 0, 1]


def test_labelled_passes_count_labelled_items_only() -> None:
    stream = ReferenceStream(
        samples(20), unlabelled=samples(5, 1), reference_batch_size=10, reference_steps=10, pl_start=4
    )
    clocks = stream.position(np.array([0.0, 1.0, 2.0, 4.0, 6.0, 10.0]))
    assert stream.labelled_passes(clocks).tolist() == [0, 0.5, 1, 2, 2.5, 3.5]


def test_two_million_draws_take_little_time_and_13_bytes_each() -> None:
    labelled, unlabelled = samples(50_000), samples(200_000, 1)
    began = time.process_time()
    stream = ReferenceStream(
        labelled,
        unlabelled=unlabelled,
        reference_batch_size=64,
        reference_steps=31_250,
        pl_start=1_000,
        unlabelled_ratio=3,
        bucket_window=50,
    )
    assert time.process_time() - began < 5
    assert len(stream) == 2_000_000
    held = stream.source.nbytes + stream.index.nbytes + stream.cumulative_units.nbytes
    assert held == 13 * 2_000_000 + 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "at least one item"),
        ([[1.0]], "at least one item"),
        ([1.0, 0.0], r"item 1 has size 0\.0"),
        ([1.0, 2.0, np.nan, -1.0], r"item 2 has size nan.*2 of 4"),
        ([np.inf], "item 0 has size inf"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(sizes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource(np.array(sizes))


def test_lengths_must_match_the_items() -> None:
    with pytest.raises(ValueError, match="2 lengths for 3 items"):
        DataSource.of_samples(3, np.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_batch_size": 0}, "reference_batch_size.*0"),
        ({"reference_batch_size": np.nan}, "reference_batch_size.*nan"),
        ({"reference_steps": 0}, "length above 0.*0"),
        ({"reference_steps": np.inf}, "length above 0.*inf"),
        ({"bucket_window": -1}, "bucket_window.*-1"),
        ({"unlabelled_ratio": 0}, "unlabelled_ratio.*0"),
        ({"unlabelled_ratio": np.nan}, "unlabelled_ratio.*nan"),
        ({"pl_start": 10}, "pl_start=10 lies outside the run of 10"),
        ({"pl_start": -1}, "pl_start=-1 lies outside"),
        ({"pl_start": np.nan}, "pl_start=nan lies outside"),
    ],
)
def test_layouts_that_make_no_run_are_refused(options: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"reference_batch_size": 4, "reference_steps": 10, "unlabelled": samples(3)}
    with pytest.raises(ValueError, match=message):
        ReferenceStream(samples(5), **(fine | options))


def test_what_a_labelled_example_weighs_depends_on_the_labelled_set_alone() -> None:
    rng = np.random.default_rng(0)
    short, long = DataSource(rng.uniform(2.0, 6.0, 30)), DataSource(rng.uniform(8.0, 16.0, 50))
    alone = ReferenceStream(short, reference_batch_size=40.0, reference_steps=12)
    assert alone.examples_per_reference_batch == pytest.approx(40.0 / short.units.mean(), rel=1e-12)
    for steps in (12, 60):
        mixed = ReferenceStream(
            short,
            reference_batch_size=40.0,
            reference_steps=steps,
            unlabelled=long,
            pl_start=6.0,
            unlabelled_ratio=3.0,
        )
        assert mixed.examples_per_reference_batch == alone.examples_per_reference_batch
        supervised = int(mixed.position(6.0))
        assert mixed.index[:supervised].tolist() == alone.index[:supervised].tolist()
    assert (
        ReferenceStream(
            DataSource.of_samples(7), reference_batch_size=4, reference_steps=9
        ).examples_per_reference_batch
        == 4
    )
