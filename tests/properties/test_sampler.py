"""What a run draws, whatever its schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import recipe_of, runs, stream_of

from hf_ema_scaling.data import ScheduledBatchSampler
from hf_ema_scaling.scaling import ScalingPlan, StepBorders


def sampler_of(run: dict[str, Any], which: int, done: StepBorders | None = None, **more: Any) -> ScheduledBatchSampler:
    plan = ScalingPlan(recipe_of(run), run["schedules"][which], done=done)
    return ScheduledBatchSampler(stream_of(run), plan.step_borders, **({"micro_batch_size": 3} | more))


def drawn(sampler: ScheduledBatchSampler) -> list[list[tuple[int, int, int]]]:
    """(position, source, row) of every step, in stream order, over all processes."""
    world = sampler.world_size
    lists = list(sampler)
    return [
        sorted((d.position, d.source, d.index) for draws in lists[i : i + world] for d in draws if d.weight)
        for i in range(0, len(lists), world)
    ]


@settings(max_examples=30)
@given(runs(), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_every_schedule_draws_the_same_items_in_the_same_order(
    run: Any, world: int, statistics: bool, halve_every: int
) -> None:
    first = sampler_of(run, 0)
    second = sampler_of(run, 1, world_size=world, batch_statistics=statistics, halve_every=halve_every)
    items = [sum(drawn(sampler), []) for sampler in (first, second)]  # noqa: RUF017
    assert items[0] == items[1]
    assert [position for position, _, _ in items[0]] == list(range(len(first.stream)))
    stream = first.stream
    assert [row for _, _, row in items[0]] == stream.index.tolist()


@given(runs())
def test_counts_are_within_one_item_of_their_targets(run: Any) -> None:
    sampler = sampler_of(run, 0)
    stream, borders = sampler.stream, sampler.borders.borders
    sizes = np.diff(stream.cumulative_units)
    reached = stream.cumulative_units[stream.position(borders)]
    over = reached - run["batch"] * borders
    assert over.min() > -1e-6 * run["batch"] and over.max() < sizes.max()
    assert set(sampler.positions.tolist()) == set(stream.position(borders).tolist())
    if run["pl_start"] is None:
        assert not stream.source.any()
        return
    start = int(stream.position(run["pl_start"]))
    assert (stream.source[:start] == 0).all() and start in sampler.positions
    later = np.cumsum(sizes[start:] * (stream.source[start:] == 1))
    share = run["ratio"] / (1 + run["ratio"])
    assert np.abs(later - share * np.cumsum(sizes[start:])).max(initial=0.0) < sizes.max() + 1e-6


@settings(max_examples=30)
@given(runs(), st.data(), st.integers(1, 2))
def test_a_resumed_run_has_the_same_tail(run: Any, data: Any, world: int) -> None:
    whole = sampler_of(run, 0, world_size=world)
    steps = data.draw(st.integers(0, whole.num_steps))
    done = StepBorders.from_json(whole.done(steps).to_json())
    resumed = sampler_of(run, 0, done, world_size=world)
    assert resumed.positions.tolist() == whole.positions.tolist()
    assert [resumed.step(n) for n in range(resumed.num_steps)] == [whole.step(n) for n in range(whole.num_steps)]
    assert list(resumed)[steps * world :] == list(whole)[steps * world :]
    # With another schedule the steps done stay and the same items follow.
    other = sampler_of(run, 1, done, world_size=world)
    assert other.positions[: steps + 1].tolist() == whole.positions[: steps + 1].tolist()
    assert sum(drawn(other), []) == sum(drawn(whole), [])  # noqa: RUF017
