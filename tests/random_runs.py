"""Random batch schedules, streams of items and recipes, as strategies."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from hf_ema_scaling.data import DataSource, ReferenceStream
from hf_ema_scaling.scaling import BatchSchedule, Recipe, Stage


@st.composite
def schedules(draw: st.DrawFn, *, batch: float, steps: float, whole: bool = False) -> BatchSchedule:
    """One to four stages of 1/4 to 12 reference batches, with ends in reference steps or fractions of the run.

    `whole`: batches are whole numbers of samples and ends whole reference steps.
    """
    ends = draw(st.lists(st.integers(1, int(steps) - 1), max_size=3, unique=True).map(sorted)) if steps > 1 else []
    smallest, largest = max(1.0, batch / 4), 12 * batch
    sizes = st.integers(int(np.ceil(smallest)), int(largest)) if whole else st.floats(smallest, largest)
    stages = []
    for end in ends:
        size = draw(sizes)
        if not whole and draw(st.booleans()):
            stages.append(Stage(size, (end + draw(st.floats(-0.45, 0.45))) / steps, "fraction"))
        else:
            stages.append(Stage(size, end if whole else end + draw(st.floats(-0.45, 0.45))))
    return BatchSchedule((*stages, Stage(draw(sizes))))


@st.composite
def runs(draw: st.DrawFn, *, whole: bool = False, unit: str | None = None) -> dict[str, Any]:
    """A reference batch, a length, two schedules and, perhaps, a start of pseudo-labelling."""
    batch = draw(st.integers(2, 16))
    steps = draw(st.integers(4, 40))
    starts = st.integers(0, steps - 1) if whole else st.floats(0, steps - 0.5)
    return {
        "unit": unit or draw(st.sampled_from(["samples", "seconds", "tokens"])),
        "batch": batch,
        "steps": steps,
        "schedules": [draw(schedules(batch=batch, steps=steps, whole=whole)) for _ in range(2)],
        "pl_start": draw(st.none() | starts),
        "ratio": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "items": (draw(st.integers(1, 60)), draw(st.integers(1, 60))),
        "bucket_window": draw(st.sampled_from([0, 0, 3])),
        "seed": draw(st.integers(0, 1000)),
    }


def source_of(unit: str, items: int, seed: int) -> DataSource:
    rng = np.random.default_rng(seed)
    if unit == "samples":
        return DataSource.of_samples(items, rng.uniform(1, 9, items))
    sizes = rng.integers(1, 9, items).astype(np.float64) if unit == "tokens" else rng.uniform(0.2, 6, items)
    return DataSource(sizes, sizes)


def stream_of(run: dict[str, Any]) -> ReferenceStream:
    return ReferenceStream(
        source_of(run["unit"], run["items"][0], 0),
        reference_batch_size=run["batch"],
        reference_steps=run["steps"],
        unlabelled=None if run["pl_start"] is None else source_of(run["unit"], run["items"][1], 1),
        pl_start=run["pl_start"] or 0.0,
        unlabelled_ratio=run["ratio"],
        seed=run["seed"],
        bucket_window=run["bucket_window"],
    )


def recipe_of(run: dict[str, Any], **more: Any) -> Recipe:
    values = {"learning_rate": 1e-3, "ema_momentum": 0.99, "pl_start": run["pl_start"]} | more
    return Recipe(run["batch"], run["unit"], run["steps"], **values)
