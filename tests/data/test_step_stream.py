"""Steps over streams: at every kappa and on any number of processes the same rows in the same order."""

from __future__ import annotations

import json
from typing import Any

import pytest
import streamed

from hf_ema_scaling.data.collator import TwoSourceDataset
from hf_ema_scaling.data.sampler import LABELLED, ScheduledBatchSampler
from hf_ema_scaling.data.step_stream import StepStream
from hf_ema_scaling.data.stream import UNLABELLED, DataSource, ReferenceStream
from hf_ema_scaling.data.streaming import StreamReader
from hf_ema_scaling.scaling.borders import StepBorders

B, STEPS, START, RATIO = 6, 12, 4, 2.0
"""From reference step 4 on two of six rows are labelled."""
LABELLED_ROWS, UNLABELLED_ROWS = streamed.rows(10), streamed.rows(7, "u")


def sampler(kappa: int, world_size: int = 1, micro: int = 2, stored: int = -1, **more: Any) -> ScheduledBatchSampler:
    """Over two streams, or one and a data set with a length, that of the source `stored`."""
    total = int(B * STEPS) + 2
    labelled, unlabelled = DataSource.of_stream(total), DataSource.of_stream(total)
    if stored == LABELLED:
        labelled = DataSource.of_samples(len(LABELLED_ROWS))
    if stored == UNLABELLED:
        unlabelled = DataSource.of_samples(len(UNLABELLED_ROWS))
    stream = ReferenceStream(
        labelled,
        reference_batch_size=B,
        reference_steps=STEPS,
        unlabelled=unlabelled,
        pl_start=START,
        unlabelled_ratio=RATIO,
    )
    borders = StepBorders.from_json([{"start": 0.0, "kappa": kappa, "count": STEPS // kappa, "end": float(STEPS)}])
    return ScheduledBatchSampler(stream, borders, micro_batch_size=micro, world_size=world_size, **more)


Steps = list[list[tuple[Any, streamed.Row]]]


def steps(
    cut: ScheduledBatchSampler,
    labelled: Any,
    unlabelled: Any,
    *,
    rank: int = 0,
    first: int = 0,
    places: dict[str, Any] | None = None,
    said: list[dict[str, Any]] | None = None,
    **more: Any,
) -> Steps:
    """The steps of one process; `said` receives the places that come with them."""
    sources = {
        kind: data for kind, data in ((LABELLED, labelled), (UNLABELLED, unlabelled)) if not isinstance(data, list)
    }

    def readers() -> dict[int, StreamReader]:
        made = {}
        for kind, data in sources.items():
            made[kind] = StreamReader(data, f"source {kind}", (rank, cut.world_size) if kind in cut.by_rank else None)
            if places is not None:
                made[kind].resume(places["sources"][str(kind)])
        return made

    rows = TwoSourceDataset(labelled, unlabelled, keep=more.pop("keep", None))
    found = []
    for drawn, place in StepStream(cut, rows, readers, rank=rank, first_step=first, **more):
        found.append([(draw, dict(row)) for draw, row in drawn])
        if said is not None:
            said.append({} if place is None else json.loads(place))
    return found


def in_order(found: Steps) -> list[tuple[int, str]]:
    """Position and name of what counts, by position."""
    return sorted((draw.position, row["name"]) for step in found for draw, row in step if draw.weight)


def reference_batches() -> list[list[str]]:
    """What each reference step draws, written down independently: six labelled rows, then two and four unlabelled."""
    found, a, u = [], 0, 0
    for step in range(STEPS):
        labelled, unlabelled = (6, 0) if step < START else (2, 4)
        found.append([f"a{i % 10}" for i in range(a, a + labelled)] + [f"u{i % 7}" for i in range(u, u + unlabelled)])
        a, u = a + labelled, u + unlabelled
    return found


@pytest.mark.parametrize("kappa", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_kappa_on_any_number_of_processes_sees_the_same_rows(kappa: int, world_size: int) -> None:
    cut = sampler(kappa, world_size)
    alone = steps(sampler(1), streamed.Plain(LABELLED_ROWS), streamed.Plain(UNLABELLED_ROWS))
    ranks = [
        steps(cut, streamed.stream(LABELLED_ROWS), streamed.Plain(UNLABELLED_ROWS), rank=rank)
        for rank in range(world_size)
    ]
    together = [[row for rank in ranks for row in rank[number]] for number in range(cut.num_steps)]
    assert in_order(together) == in_order(alone)
    expected = reference_batches()
    for number, step in enumerate(together):
        wanted = [name for batch in expected[number * kappa : (number + 1) * kappa] for name in batch]
        assert sorted(row["name"] for draw, row in step if draw.weight) == sorted(wanted)
    # All processes take part in as many micro-batches of each source.
    for number in range(cut.num_steps):
        shapes = [sorted({(draw.micro_batch, draw.source) for draw, _ in rank[number]}) for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes)


SHARDS = [streamed.rows(5, "x"), streamed.rows(3, "y"), streamed.rows(5, "z"), streamed.rows(3, "w")]


@pytest.mark.parametrize("kappa", [1, 2, 4])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
def test_processes_read_shards_of_their_own(kappa: int, statistics: bool, micro: int) -> None:
    """Item i is the next row of process i mod 2; a process whose shards are short begins them again sooner."""
    cut = sampler(kappa, 2, micro, LABELLED, by_rank=[UNLABELLED], batch_statistics=statistics)
    found = [steps(cut, LABELLED_ROWS, streamed.of_shards(SHARDS), rank=rank) for rank in range(2)]
    drawn: list[list[tuple[int, str]]] = []
    for rank in range(2):
        drawn.append([(p, n) for p, n in in_order(found[rank]) if n[0] in "xyzw"])
        reader = StreamReader(streamed.of_shards(SHARDS), "u", (rank, 2))
        assert [name for _, name in drawn[rank]] == [reader.read()[1]["name"] for _ in range(16)]
    # The first pass; `datasets` deals shards anew for each.
    assert sorted(name for _, name in drawn[0][:10]) == sorted(row["name"] for row in SHARDS[0] + SHARDS[2])
    assert sorted(name for _, name in drawn[1][:6]) == sorted(row["name"] for row in SHARDS[1] + SHARDS[3])
    # In turns: the unlabelled items of the run, in order, alternate between the processes.
    assert [rank for _, rank in sorted((p, r) for r in range(2) for p, _ in drawn[r])] == [0, 1] * 16
    for number in range(cut.num_steps):
        shapes = [sorted({(draw.micro_batch, draw.source) for draw, _ in rank[number]}) for rank in found]
        assert shapes[0] == shapes[1]
        for rank in found:
            numbers = [draw.micro_batch for draw, _ in rank[number]]
            assert numbers == sorted(numbers) and max(map(numbers.count, numbers)) <= micro


@pytest.mark.parametrize("statistics", [False, True])
def test_a_process_without_a_row_pads_with_the_one_it_reads_next(statistics: bool) -> None:
    """Three processes and two labelled rows of their own in a reference batch from step 4 on."""
    cut = sampler(1, 3, 1, UNLABELLED, by_rank=[LABELLED], batch_statistics=statistics)
    data = streamed.of_shards([streamed.rows(4, "x"), streamed.rows(4, "y"), streamed.rows(4, "z")])
    found = [steps(cut, data, UNLABELLED_ROWS, rank=rank) for rank in range(3)]
    padding = 0
    for rank, letter in enumerate("xyz"):
        mine = [(draw, row) for step in found[rank] for draw, row in step if draw.source == LABELLED]
        real = [row["name"] for draw, row in mine if draw.weight]
        assert len(real) in (13, 14) and real[:5] == [f"{letter}{i}" for i in (0, 1, 2, 3)] + [real[4]]
        for place, (draw, row) in enumerate(mine):
            if draw.weight == 0:
                padding += 1
                following = [other["name"] for later, other in mine[place:] if later.weight]
                assert not following or row["name"] == following[0]
    assert padding == 8


@pytest.mark.parametrize("shards", [1, 2])
def test_no_more_is_read_than_the_step_and_a_row(shards: int) -> None:
    labelled, unlabelled = streamed.Plain(LABELLED_ROWS * 9), streamed.Plain(UNLABELLED_ROWS * 9)
    cut = sampler(2)
    stream = StepStream(
        cut,
        TwoSourceDataset(labelled, unlabelled),
        lambda: {0: StreamReader(labelled, "a"), 1: StreamReader(unlabelled, "u")},
    )
    for number, _ in enumerate(stream):
        drawn = [cut.drawn_of(kind, number)[1] for kind in (0, 1)]
        last = number + 1 == cut.num_steps
        assert labelled.given == drawn[0] + (not last)
        assert unlabelled.given == (drawn[1] + (not last) if drawn[1] else 0)  # not opened before it is needed


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["rows", "shards", "torch", "buffer"])
def test_every_step_resumes_with_the_same_rows(world_size: int, kind: str) -> None:
    """Over several ends of passes; the places are those of their step."""
    by_rank = [UNLABELLED] if kind == "shards" and world_size > 1 else []
    cut = sampler(2, world_size, by_rank=by_rank)

    def data() -> tuple[Any, Any]:
        made = {
            "rows": lambda: streamed.stream(UNLABELLED_ROWS, 3),
            "shards": lambda: streamed.of_shards(SHARDS),
            "torch": lambda: streamed.Plain(UNLABELLED_ROWS),
            "buffer": lambda: streamed.stream(UNLABELLED_ROWS, 3).shuffle(seed=2, buffer_size=3),
        }[kind]()
        return streamed.stream(LABELLED_ROWS, 3), made

    for rank in range(world_size):
        said: list[dict[str, Any]] = []
        whole = steps(cut, *data(), rank=rank, said=said)
        assert [place["steps"] for place in said] == [1, 2, 3, 4, 5, 6]
        for done in range(1, cut.num_steps):
            resumed = steps(cut, *data(), rank=rank, first=done, places=said[done - 1])
            assert resumed[:done] == [[]] * done and resumed[done:] == whole[done:]


def test_hidden_columns_and_labels_of_unlabelled_rows_stay_behind() -> None:
    found = steps(
        sampler(2), streamed.stream(LABELLED_ROWS), streamed.stream(UNLABELLED_ROWS), keep=["name", "labels"]
    )
    for draw, row in (item for step in found for item in step):
        assert row.keys() == ({"name", "labels"} if draw.source == LABELLED else {"name"})


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_are_sorted_inside_a_step(world_size: int) -> None:
    """By the first column they have; the teacher's batches too, and positions go with their rows."""
    cut = sampler(4, world_size, label_batch_size=3)
    for rank in range(world_size):
        data = streamed.Plain(LABELLED_ROWS), streamed.Plain(UNLABELLED_ROWS)
        plain = steps(cut, *data, rank=rank)
        found = steps(cut, *data, rank=rank, length_columns=("absent", "size"))
        assert in_order(found) == in_order(plain) and found != plain
        for step in found:
            for kind in (LABELLED, UNLABELLED):
                mine = [(draw, row["size"]) for draw, row in step if draw.source == kind and draw.weight]
                assert [size for _, size in mine] == sorted(size for _, size in mine)
                if kind == UNLABELLED and mine:
                    batches = [draw.label_batch for draw, _ in mine]
                    assert batches == sorted(batches) and max(map(batches.count, batches)) <= 3


def test_rows_are_not_sorted_where_the_order_is_needed() -> None:
    """Steps that are halved for the noise scale, and reference batches of BatchNorm."""
    for more, changed in (({"halve_every": 2}, [0, 2]), ({"batch_statistics": True}, [])):
        cut, data = sampler(4, **more), (streamed.Plain(LABELLED_ROWS), streamed.Plain(UNLABELLED_ROWS))
        plain, found = steps(cut, *data), steps(cut, *data, length_columns=("size",))
        assert [number for number in range(3) if plain[number] != found[number]] == changed
