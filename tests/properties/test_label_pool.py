"""The label pool is the same at every schedule and on any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import recipe_of, runs, source_of

from hf_ema_scaling.data import ReferenceStream, ScheduledBatchSampler
from hf_ema_scaling.data.sampler import LABELLED_ONLY
from hf_ema_scaling.scaling import BatchSchedule, ScalingPlan


def sampler_of(run: dict[str, Any], schedule: BatchSchedule, cache: tuple[float, float], **more: Any) -> Any:
    plan = ScalingPlan(recipe_of(run), schedule)
    stream = ReferenceStream(
        source_of(run["unit"], run["items"][0], 0),
        reference_batch_size=run["batch"],
        reference_steps=run["steps"],
        unlabelled=source_of(run["unit"], run["items"][1], 1),
        pl_start=run["pl_start"],
        unlabelled_ratio=run["ratio"],
        seed=run["seed"],
        bucket_window=run["bucket_window"],
        cache_steps=cache[0],
        cache_refresh=cache[1],
    )
    return ScheduledBatchSampler(stream, plan.step_borders, **({"micro_batch_size": 3} | more))


def labels_used(sampler: Any) -> tuple[dict[int, tuple[int, int]], dict[int, list[int]]]:
    """Runs a schedule: (row, where its label was made) of every unlabelled draw, and what the pool holds after steps.

    Asserts that every label is made once, on one process, in the step that draws or takes in its item.
    """
    pool = sampler.stream.pool
    used: dict[int, tuple[int, int]] = {}
    cache: dict[int, tuple[int, int]] = {}
    held: dict[int, list[int]] = {}
    for number in range(sampler.num_steps):
        first, last = int(sampler.positions[number]), int(sampler.positions[number + 1])
        found: dict[int, int] = {}
        drawn = []
        for rank in range(sampler.world_size):
            draws = sampler.draws(number, rank)
            own = [draw for draw in draws if draw.source == 1 and draw.weight]
            micro = own if sampler.labels_micro_batches(number) else []
            for draw in [draw for draw in draws if draw.label_batch is not None] + micro:
                assert draw.position not in found
                found[draw.position] = draw.index
            sizes = np.bincount([draw.label_batch for draw in draws if draw.label_batch is not None])
            assert sizes.max(initial=0) <= (sampler.label_batch_size or sampler.micro_batch_size)
            assert all(draw.label_batch is not None for draw in draws if draw.micro_batch == LABELLED_ONLY)
            drawn += own
        events = pool.events(first, last)
        assert found == dict(zip(events.positions.tolist(), events.rows.tolist(), strict=True))
        positions = np.array([draw.position for draw in drawn], dtype=np.int64)
        for draw, made in zip(drawn, pool.made_at(first, positions).tolist(), strict=True):
            used[draw.position] = (found[made], made) if made >= 0 else cache[int(pool.slot[draw.position])]
            assert used[draw.position][0] == draw.index
        for position, row in sorted(found.items()):
            cache[int(pool.slot[position])] = (row, position)
        held[last] = [cache[slot][0] if slot in cache else -1 for slot in range(pool.size)]
        assert held[last] == pool.held(last).tolist()
    return used, held


@settings(max_examples=10)
@given(
    runs(),
    st.floats(1, 8),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([None, 2, 100]),
    st.booleans(),
)
def test_every_schedule_uses_the_same_labels(
    run: Any, length: float, refresh: float, label_batch_size: int | None, statistics: bool
) -> None:
    # Room for the pool to fill.
    run = run | {"pl_start": min(run["pl_start"] or 0.0, run["steps"] / 4), "steps": run["steps"] + 20}
    cache = (length, refresh)
    batch = float(run["batch"])
    schedules = [BatchSchedule.two_stage(batch, kappa, run["pl_start"]) for kappa in (2.0, 8.0)]
    expected, after = labels_used(sampler_of(run, BatchSchedule.constant(batch), cache))
    assert len(expected) > len(after[max(after)])
    for schedule in (*schedules, BatchSchedule.constant(1.7 * batch)):
        for world in (1, 2):
            more = {"world_size": world, "label_batch_size": label_batch_size, "batch_statistics": statistics}
            used, held = labels_used(sampler_of(run, schedule, cache, **more))
            assert used == expected
            common = held.keys() & after.keys()
            assert max(after) in common and all(held[position] == after[position] for position in common)
