"""A stream whose ratio of unlabelled to labelled units changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream
from hf_ema_scaling.scaling import BatchSchedule, step_borders

Changes = list[tuple[float, float]]
CHANGES: list[Changes] = [[(20.0, 7.0)], [(7.31, 0.2)], [(20.0, 5.0), (41.5, 0.5), (60.0, 2.0)]]
STEPS = 80


def durations(items: int, seed: int = 0) -> NDArray[np.float64]:
    """Lognormal seconds, most between 1 and 20."""
    return np.clip(np.random.default_rng(seed).lognormal(1.5, 0.7, items), 0.3, 30.0)


def samples(items: int, seed: int = 0) -> DataSource:
    return DataSource.of_samples(items, durations(items, seed))


def seconds(items: int, seed: int = 0) -> DataSource:
    sizes = durations(items, seed)
    return DataSource(sizes, sizes)


def stream_of(source: Any, changes: Changes, **more: Any) -> ReferenceStream:
    values = {"reference_batch_size": 12 if source is samples else 90, "reference_steps": STEPS, "pl_start": 7.3}
    return ReferenceStream(
        source(80), unlabelled=source(120, 1), **(values | {"unlabelled_ratio": 1.5} | more), ratio_changes=changes
    )


def target(stream: ReferenceStream, changes: Changes, ratio: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unlabelled units drawn after every item from `pl_start` on, and the integral of their share up to there."""
    first = int(stream.position(stream.pl_start))
    units = stream.cumulative_units[first:]
    drawn = np.cumsum(np.diff(units) * (stream.source[first:] == UNLABELLED))
    clocks = np.array([units[0], *(clock * stream.reference_batch_size for clock, _ in changes), np.inf])
    expected = np.zeros(len(units))
    for (low, high), value in zip(pairwise(clocks), [ratio, *(ratio for _, ratio in changes)], strict=True):
        low = max(low, units[0])
        expected += np.clip(units - low, 0.0, max(high - low, 0.0)) * value / (1 + value)
    return np.concatenate([[0.0], drawn]), expected


@pytest.mark.parametrize("bucket_window", [0, 5])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("source", [samples, seconds])
def test_neither_source_is_off_its_target_by_more_than_an_item(
    source: Any, changes: Changes, bucket_window: int
) -> None:
    stream = stream_of(source, changes, bucket_window=bucket_window)
    longest = max(source(80).units.max(), source(120, 1).units.max())
    drawn, expected = target(stream, changes, 1.5)
    assert np.abs(drawn - expected).max() <= longest + 1e-6
    # Far more than an item from what the first ratio alone asks for.
    assert np.abs(drawn - target(stream, [], 1.5)[1]).max() > 5 * longest
    assert 0 <= stream.cumulative_units[-1] - STEPS * stream.reference_batch_size < longest
    for kind, items in ((LABELLED, 80), (UNLABELLED, 120)):
        rows = stream.index[stream.source == kind]
        assert len(rows) > items
        assert all(len(set(rows[i : i + items])) == len(rows[i : i + items]) for i in range(0, len(rows), items))


@pytest.mark.parametrize("bucket_window", [0, 1, 5])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("source", [samples, seconds])
def test_the_stream_before_a_change_does_not_know_of_it(
    source: Any, changes: Changes, ratio: float, bucket_window: int
) -> None:
    streams = [
        stream_of(source, changes[:count], unlabelled_ratio=ratio, bucket_window=bucket_window)
        for count in range(len(changes) + 1)
    ]
    for count, (clock, _) in enumerate(changes):
        before, after = streams[count], streams[count + 1]
        end = int(before.position(clock))
        assert end == int(after.position(clock)) > 80
        for name in ("source", "index", "cumulative_units"):
            assert getattr(before, name)[:end].tobytes() == getattr(after, name)[:end].tobytes()
        assert before.source[end:].tolist() != after.source[end:].tolist()


def test_sizes_that_binary_cannot_hold_do_not_reach_back() -> None:
    # Sums of 0.1 miss the borders of reference batches by roundings, and with them those of bucketing windows.
    random = np.random.default_rng(0)
    for seed in range(300):
        lengths = [random.uniform(1, 9, int(random.integers(2, 90))) for _ in range(2)]
        sources = [DataSource(np.full(len(of), 0.1), of) for of in lengths]
        clock, ratio = int(random.integers(7, 40)), int(random.integers(1, 9))
        before, after = (
            ReferenceStream(
                sources[0],
                unlabelled=sources[1],
                reference_batch_size=0.1 * (2 + seed % 28),
                reference_steps=40,
                pl_start=6,
                unlabelled_ratio=ratio,
                ratio_changes=changes,
                bucket_window=1 + seed % 3,
                seed=seed,
            )
            for changes in ([], [(clock, 2.5)])
        )
        end = int(before.position(clock))
        assert end == after.position(clock) and (before.index[:end] == after.index[:end]).all()


def test_a_change_to_the_same_ratio_changes_no_bit() -> None:
    for source in (samples, seconds):
        plain, cut = stream_of(source, []), stream_of(source, [(20.0, 1.5), (33.3, 1.5)])
        assert plain.source.tobytes() == cut.source.tobytes() and plain.index.tobytes() == cut.index.tobytes()


def test_whole_numbers_are_drawn_exactly() -> None:
    """Ratio 2 and 5 at batches of 12: 4 + 8 items in a reference batch, then 2 + 10."""
    stream = stream_of(samples, [(20.0, 5.0)], pl_start=10, unlabelled_ratio=2.0)
    labelled = (stream.source == LABELLED).reshape(-1, 12).sum(1)
    assert labelled.tolist() == [12] * 10 + [4] * 10 + [2] * 60


def test_buckets_are_cut_for_the_ratio_at_which_a_pass_begins() -> None:
    lengths = durations(500), durations(900, 1)
    stream = ReferenceStream(
        DataSource.of_samples(500, lengths[0]),
        unlabelled=DataSource.of_samples(900, lengths[1]),
        reference_batch_size=40,
        reference_steps=240,
        pl_start=20,
        unlabelled_ratio=3,
        ratio_changes=[(100, 1.0)],
        bucket_window=20,
    )
    borders = stream.position(np.arange(241.0))
    # From step 150 on both sources are in passes begun after the change.
    for kind in (LABELLED, UNLABELLED):
        rows = [stream.index[a:b][stream.source[a:b] == kind] for a, b in pairwise(borders[50:].tolist())]
        spreads = np.array([lengths[kind][batch].std() for batch in rows])
        assert np.median(spreads[:50]) < 0.1 * lengths[kind].std()
        assert np.median(spreads[100:]) < 0.1 * lengths[kind].std()


@pytest.mark.parametrize("source", [samples, seconds])
@pytest.mark.parametrize("batches", [[(12, None)], [(12, 20), (48, None)], [(30, 13.5), (20, 20), (84, None)]])
def test_every_step_of_every_schedule_follows_the_same_targets(source: Any, batches: Any) -> None:
    changes = [(20.0, 5.0), (41.5, 0.5)]
    stream = stream_of(source, changes)
    scale = stream.reference_batch_size / 12
    stages = [{"batch_size": b * scale} | ({} if until is None else {"until": until}) for b, until in batches]
    borders = step_borders(
        BatchSchedule.from_json(stages).resolve(STEPS), stream.reference_batch_size, (7.3, 20.0, 41.5)
    )
    for world in (1, 2):
        sampler = ScheduledBatchSampler(stream, borders, micro_batch_size=5, world_size=world)
        drawn, expected = target(stream, changes, 1.5)
        sizes = np.diff(stream.cumulative_units)
        first = int(stream.position(7.3))
        unlabelled = 0.0
        for number in range(sampler.num_steps):
            draws = [d for rank in range(world) for d in sampler.draws(number, rank) if d.weight]
            unlabelled += sum(sizes[d.position] for d in draws if d.source == UNLABELLED)
            end = int(sampler.positions[number + 1])
            if end >= first:
                assert unlabelled == pytest.approx(drawn[end - first])
                assert abs(unlabelled - expected[end - first]) <= sizes.max() + 1e-6


def test_steps_must_end_at_a_change() -> None:
    stream = stream_of(samples, [(20.5, 5.0)])
    borders = step_borders(BatchSchedule.constant(12).resolve(STEPS), 12, (7.3,))
    with pytest.raises(ValueError, match=r"no step ends at a change of the ratio, reference step 20\.5"):
        ScheduledBatchSampler(stream, borders, micro_batch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(7.3, 2.0)], r"in order between pl_start=7\.3 and the end of the run at 80, got \[7\.3\]"),
        ([(30.0, 2.0), (20.0, 1.0)], r"got \[30\.0, 20\.0\]"),
        ([(80.0, 2.0)], r"got \[80\.0\]"),
        ([(20.0, 0.0)], "unlabelled_ratio must be above 0, got 0.0"),
        ([(np.nan, 2.0)], r"got \[nan\]"),
    ],
)
def test_changes_that_make_no_stream_are_refused(changes: Changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(samples, changes)


def test_a_change_without_unlabelled_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the ratio changes at 3\.0, but there is no unlabelled source"):
        ReferenceStream(samples(9), reference_batch_size=3, reference_steps=9, ratio_changes=[(3.0, 2.0)])
