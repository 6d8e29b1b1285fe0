"""The pool of pseudo-labelled items against a pool that is kept item by item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_ema_scaling.data.stream import UNLABELLED, DataSource, ReferenceStream

STEPS, PL_START, CACHE = 60, 4, 7


def durations(items: int, seed: int = 0) -> NDArray[np.float64]:
    return np.clip(np.random.default_rng(seed).lognormal(1.5, 0.7, items), 0.3, 30.0)


def samples(items: int, seed: int = 0) -> DataSource:
    return DataSource.of_samples(items, durations(items, seed))


def seconds(items: int, seed: int = 0) -> DataSource:
    sizes = durations(items, seed)
    return DataSource(sizes, sizes)


def stream_of(source: Any = samples, **changes: Any) -> ReferenceStream:
    values = {
        "reference_batch_size": 12 if source is samples else 80,
        "reference_steps": STEPS,
        "pl_start": PL_START,
        "unlabelled_ratio": 2.0,
        "cache_steps": CACHE,
        "cache_refresh": 0.3,
    }
    return ReferenceStream(source(50), unlabelled=source(70, 1), **(values | changes))


def replay(stream: ReferenceStream) -> tuple[list[int], list[int], list[int]]:
    """A pool kept item by item: of each unlabelled draw the place at which its label was made, how often that label
    had been used before, and the rows that entered after the pool was full, in order.
    """
    assert stream.pool is not None
    holds: dict[int, list[int]] = {}
    made, uses, entered = [], [], []
    for position in np.flatnonzero(stream.source == UNLABELLED).tolist():
        slot, enters = int(stream.pool.slot[position]), int(stream.pool.entering[position])
        if len(holds) < stream.pool.size:
            assert slot == len(holds) and enters == -1
            holds[slot] = [int(stream.index[position]), position, 0]
            assert (len(holds) == stream.pool.size) == (position + 1 == stream.pool.full_at)
        row, place, used = holds[slot]
        assert row == stream.index[position]
        made.append(place)
        uses.append(used)
        holds[slot][2] += 1
        if enters >= 0:
            holds[slot] = [enters, position, 0]
            entered.append(enters)
    assert stream.pool.held(len(stream)).tolist() == [holds[slot][0] for slot in range(stream.pool.size)]
    return made, uses, entered


@pytest.mark.parametrize("bucket_window", [0, 3])
@pytest.mark.parametrize("source", [samples, seconds])
def test_draws_are_those_of_a_pool_kept_item_by_item(source: Any, bucket_window: int) -> None:
    stream = stream_of(source, bucket_window=bucket_window)
    plain = stream_of(source, bucket_window=bucket_window, cache_steps=0.0)
    pool = stream.pool
    assert plain.pool is None and pool is not None
    # The pool fills with the items of a run without one, in the reference steps that it is long.
    assert abs(pool.full_at - int(plain.position(PL_START + CACHE))) <= 2
    for name in ("source", "index"):
        assert getattr(stream, name)[: pool.full_at].tolist() == getattr(plain, name)[: pool.full_at].tolist()
    if source is samples:
        assert pool.size == 8 * CACHE and pool.full_at == 12 * (PL_START + CACHE)
    made, _, entered = replay(stream)
    # New items come in passes over the data, which those that fill the pool begin.
    fresh = [*stream.index[: pool.full_at][stream.source[: pool.full_at] == UNLABELLED].tolist(), *entered]
    assert len(fresh) > 140
    assert all(len(set(fresh[i : i + 70])) == len(fresh[i : i + 70]) for i in range(0, len(fresh), 70))
    # Every pass over the pool has each slot once, and in an order of its own.
    slots = pool.slot[pool.slot >= 0].tolist()
    passes = [slots[i : i + pool.size] for i in range(0, len(slots) - pool.size, pool.size)]
    assert len(passes) >= 4 and all(sorted(one) == list(range(pool.size)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)
    # What a step must look up, whatever it covers.
    drawn = np.flatnonzero(stream.source == UNLABELLED)
    full = pool.full_at
    for first, last in ((0, len(stream)), (full - 9, full), (full - 5, full + 40), (300, 301), (200, 420)):
        inside = (drawn >= first) & (drawn < last)
        expected = np.where(np.array(made)[inside] >= first, np.array(made)[inside], -1)
        order = np.random.default_rng(0).permutation(int(inside.sum()))
        assert pool.made_at(first, drawn[inside][order]).tolist() == expected[order].tolist()
        events = pool.events(first, last)
        later = events.positions >= pool.full_at
        assert (events.drawn == ~later).all()
        assert events.rows[later].tolist() == pool.entering[events.positions[later]].tolist()
        assert events.rows[~later].tolist() == stream.index[events.positions[~later]].tolist()
        assert set(expected.tolist()) - {-1} <= set(events.positions.tolist())


def test_bucketing_puts_items_of_similar_length_into_a_reference_batch() -> None:
    spread = {}
    for window in (0, 5):
        stream = stream_of(samples, bucket_window=window, reference_steps=200)
        assert stream.pool is not None
        lengths = durations(70, 1)[stream.index[stream.pool.full_at :]].reshape(-1, 12)
        unlabelled = stream.source[stream.pool.full_at :].reshape(-1, 12) == UNLABELLED
        spread[window] = np.mean([np.std(row[kind]) for row, kind in zip(lengths, unlabelled, strict=True)])
    assert spread[5] < 0.5 * spread[0]


def test_items_are_replaced_as_often_as_asked_and_labels_used_so_often() -> None:
    stream = stream_of(samples, reference_steps=3000, cache_refresh=0.1, cache_steps=20)
    made, uses, entered = replay(stream)
    assert stream.pool is not None
    draws = len(made) - stream.pool.size
    # A binomial count, four standard deviations.
    assert abs(len(entered) / draws - 0.1) < 4 * (0.09 / draws) ** 0.5
    # Half-way through the run the age of what is used, and how often it was used before, have settled.
    places = np.flatnonzero(stream.source == UNLABELLED)
    late = slice(len(made) // 2, None)
    ages = (places[late] - np.array(made)[late]) / 12
    assert ages.mean() == pytest.approx(20 / 0.1, rel=0.1)
    assert np.mean(uses[late]) == pytest.approx(1 / 0.1 - 1, rel=0.1)
    assert len(set(made)) / len(made) == pytest.approx(0.1, abs=0.01)


def test_a_pool_of_one_step_that_forgets_everything_gives_labels_one_step_late() -> None:
    stream = stream_of(samples, cache_steps=1.0, cache_refresh=1.0)
    plain = stream_of(samples, cache_steps=0.0)
    made, _, entered = replay(stream)
    assert stream.pool is not None and stream.pool.size == 8
    steps = stream.clock(np.flatnonzero(stream.source == UNLABELLED)).astype(int)
    age = steps - stream.clock(np.array(made)).astype(int)
    # The items that fill the pool are used as they come and once more; all others once, one reference step later.
    assert age.tolist() == [0] * 8 + [1] * (len(age) - 8)
    assert len(set(made[8:])) == len(made) - 8 and made[:8] != made[8:16] and set(made[:8]) == set(made[8:16])
    expected = plain.index[plain.source == UNLABELLED].tolist()
    assert entered[: len(expected) - 8] == expected[8:]
    groups = [sorted(stream.index[stream.source == UNLABELLED][i : i + 8].tolist()) for i in range(8, len(made), 8)]
    assert groups == [sorted(expected[i : i + 8]) for i in range(0, len(groups) * 8, 8)]


@pytest.mark.parametrize("bucket_window", [0, 3])
@pytest.mark.parametrize("source", [samples, seconds])
def test_a_change_of_the_ratio_and_the_length_of_the_run_do_not_reach_back(source: Any, bucket_window: int) -> None:
    base = stream_of(source, bucket_window=bucket_window)
    assert base.pool is not None
    for clock in (8.0, 25.0):
        other = stream_of(source, bucket_window=bucket_window, ratio_changes=[(clock, 0.5)])
        longer = stream_of(source, bucket_window=bucket_window, reference_steps=90)
        assert other.pool is not None and longer.pool is not None
        end = int(base.position(clock))
        for stream in (other, longer):
            for name in ("slot", "entering"):
                assert getattr(stream.pool, name)[:end].tolist() == getattr(base.pool, name)[:end].tolist()
            assert stream.index[:end].tolist() == base.index[:end].tolist()
        replay(other)
        # A pool keeps its size, whatever its share of a step is later.
        assert (other.pool.size == base.pool.size) == (clock > PL_START + CACHE)
    assert longer.pool.slot[: len(base)].tolist() == base.pool.slot.tolist()


def test_other_seeds_give_other_draws_and_evictions() -> None:
    one, two = stream_of(seed=0).pool, stream_of(seed=1).pool
    assert one is not None and two is not None
    assert (one.slot >= 0).tolist() == (two.slot >= 0).tolist() and one.slot.tolist() != two.slot.tolist()
    assert (one.entering >= 0).tolist() != (two.entering >= 0).tolist()


def test_a_pool_costs_eight_bytes_for_each_item_drawn() -> None:
    stream = stream_of(samples, reference_steps=20_000)
    assert stream.pool is not None and len(stream) == 240_000
    arrays = [stream.pool.slot, stream.pool.entering]
    assert sum(array.nbytes for array in arrays) == 8 * len(stream) and stream.pool.index is stream.index


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the run ends before its pool of 448 .* lower cache_steps"):
        stream_of(cache_steps=56.0)
    for changes in ({"cache_refresh": 0.0}, {"cache_refresh": 1.5}, {"cache_steps": -1.0}):
        with pytest.raises(ValueError, match=r"cache_refresh in \(0, 1\]"):
            stream_of(**changes)
