from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from hf_ema_scaling.data.collator import MicroBatchCollator, TwoSourceDataset
from hf_ema_scaling.data.sampler import Draw, ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream
from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan, Stage, StepBorders, step_borders

B = 8
STEPS = 50
PL_START = 11
LABELLED_ITEMS, UNLABELLED_ITEMS = 57, 83
# Multiples of B, and the reference step at which each stage but the last ends.
SCHEDULES: dict[str, tuple[tuple[float, float | None], ...]] = {
    "1-2-4": ((1, 10), (2, 26), (4, None)),
    "3, ends it does not divide": ((1, 7), (3, 23), (1, 25), (3, None)),
    "half": ((0.5, None),),
    "1.3": ((1.3, 20.5), (2.6, None)),
    "7 at once": ((7, None),),
}


def durations(items: int, seed: int) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(1.5, 0.7, items), 0.3, 30.0)


def source(unit: str, items: int, seed: int) -> DataSource:
    sizes = durations(items, seed)
    # In seconds a reference batch of 8 units holds 8 items on average, as in samples.
    return DataSource.of_samples(items, sizes) if unit == "samples" else DataSource(sizes / sizes.mean(), sizes)


def stream_of(
    unit: str = "samples",
    *,
    bucket_window: int = 0,
    steps: float = STEPS,
    batch: float = B,
    pl: float | None = PL_START,
) -> ReferenceStream:
    return ReferenceStream(
        source(unit, LABELLED_ITEMS, 0),
        unlabelled=None if pl is None else source(unit, UNLABELLED_ITEMS, 1),
        reference_batch_size=batch,
        reference_steps=steps,
        pl_start=pl or 0.0,
        unlabelled_ratio=2,
        bucket_window=bucket_window,
    )


def borders_of(
    *stages: tuple[float, float | None],
    steps: float = STEPS,
    pl: float | None = PL_START,
    done: StepBorders | None = None,
) -> StepBorders:
    schedule = BatchSchedule(tuple(Stage(kappa * B, until) for kappa, until in stages))
    return step_borders(schedule.resolve(steps), B, () if pl is None else (pl,), done)


def sampler_of(*stages: tuple[float, float | None], unit: str = "samples", **options: Any) -> ScheduledBatchSampler:
    layout = {name: options.pop(name) for name in ("bucket_window", "steps", "batch", "pl") if name in options}
    stream = stream_of(unit, **layout)
    cuts = {name: layout[name] for name in ("steps", "pl") if name in layout}
    return ScheduledBatchSampler(stream, borders_of(*stages, **cuts), **({"micro_batch_size": 4} | options))


def drawn(sampler: ScheduledBatchSampler, number: int) -> list[Draw]:
    """What a step draws, in stream order, over all processes and without padding."""
    draws = [draw for rank in range(sampler.world_size) for draw in sampler.draws(number, rank) if draw.weight]
    return sorted(draws, key=lambda draw: draw.position)


def visited(sampler: ScheduledBatchSampler) -> list[tuple[int, int, int]]:
    """(position, source, row) of the whole run."""
    steps = (drawn(sampler, number) for number in range(sampler.num_steps))
    return [(draw.position, draw.source, draw.index) for step in steps for draw in step]


@pytest.mark.parametrize("bucket_window", [0, 5])
@pytest.mark.parametrize("unit", ["samples", "seconds"])
def test_every_schedule_visits_the_same_items_in_the_same_order(unit: str, bucket_window: int) -> None:
    expected = visited(sampler_of((1, None), unit=unit, bucket_window=bucket_window))
    assert [position for position, _, _ in expected] == list(range(len(expected)))
    assert len(expected) == 400 or unit == "seconds"
    for name, stages in SCHEDULES.items():
        assert visited(sampler_of(*stages, unit=unit, bucket_window=bucket_window)) == expected, name


@pytest.mark.parametrize("unit", ["samples", "seconds"])
@pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES)
def test_steps_cover_the_run_and_stop_at_every_cut(stages: tuple[tuple[float, float | None], ...], unit: str) -> None:
    sampler = sampler_of(*stages, unit=unit)
    steps = [sampler.step(number) for number in range(sampler.num_steps)]
    item = 1 / B if unit == "samples" else 30 / durations(UNLABELLED_ITEMS, 1).mean() / B
    assert steps[0].start == 0
    assert all(one.end == two.start for one, two in pairwise(steps))
    for cut in (PL_START, STEPS, *(until for _, until in stages if until is not None)):
        assert min(abs(step.end - cut) for step in steps) <= item
        assert any(sampler.positions == sampler.stream.position(cut)), cut
    for step in steps:
        assert abs(step.kappa - step.units / B) < 1e-12
        assert step.kappa <= step.stage_kappa + item
    assert abs(sum(step.kappa for step in steps) - STEPS) < (1e-12 if unit == "samples" else item)
    # A step before pl_start has labelled items only, one after it begins there.
    first_unlabelled = min(
        n for n in range(sampler.num_steps) if any(d.source == UNLABELLED for d in drawn(sampler, n))
    )
    assert steps[first_unlabelled].start == sampler.stream.clock(int(sampler.stream.position(PL_START)))


def test_kappa_of_steps_that_are_cut_short() -> None:
    sampler = sampler_of(*SCHEDULES["3, ends it does not divide"])
    kappas = [sampler.step(number).kappa for number in range(sampler.num_steps)]
    # 7 of 1; 7 -> 10 and 1 left to pl_start; 11 -> 23; 2 of 1; 25 -> 49 and 1 left.
    assert kappas == [1] * 7 + [3, 1] + [3] * 4 + [1] * 2 + [3] * 8 + [1]
    # A step that is cut short is a stage of its own.
    assert [sampler.step(n).stage_kappa for n in (6, 7, 8, 13, 23)] == [1, 3, 1, 1, 1]
    assert [sampler.step(n).items for n in (6, 7, 8, 13, 23)] == [8, 24, 8, 8, 8]
    with pytest.raises(IndexError, match="step 24 of a run of 24"):
        sampler.step(24)
    with pytest.raises(IndexError, match="step -1"):
        sampler.step(-1)


def test_half_a_reference_batch_and_a_batch_that_is_no_whole_number() -> None:
    half = sampler_of((0.5, None))
    assert {half.step(n).items for n in range(half.num_steps)} == {4} and half.num_steps == 100
    odd = sampler_of((1.3, None), pl=None)
    # 10.4 samples a step: targets are cumulative, so the count is never more than one above them.
    ends = np.minimum(np.ceil(10.4 * np.arange(1, 40) - 1e-6), 400)
    assert odd.positions.tolist() == [0, *ends]


def test_a_run_that_ends_inside_a_reference_step() -> None:
    sampler = sampler_of((3, None), steps=20.25)
    assert len(sampler.stream) == 162 and sampler.stream.examples_per_reference_batch == 8
    last = sampler.step(sampler.num_steps - 1)
    assert (last.end, last.kappa, last.items) == (20.25, 0.25, 2)


@pytest.mark.parametrize("unit", ["samples", "seconds"])
def test_units_of_a_step_are_the_sum_of_its_items(unit: str) -> None:
    sampler = sampler_of(*SCHEDULES["1-2-4"], unit=unit, bucket_window=3)
    sizes = (source(unit, LABELLED_ITEMS, 0).units, source(unit, UNLABELLED_ITEMS, 1).units)
    for number in range(sampler.num_steps):
        draws = drawn(sampler, number)
        step = sampler.step(number)
        assert step.items == len(draws)
        assert step.units == pytest.approx(sum(sizes[draw.source][draw.index] for draw in draws), rel=1e-12)


def test_passes_over_the_labelled_set() -> None:
    sampler = sampler_of((1, 20), (4, None))
    assert sampler.labelled_passes(0) == 0
    assert sampler.labelled_passes(5) == 40 / 57
    assert sampler.labelled_passes(11) == 88 / 57
    # Ratio 2: 88 before pl_start, then a third of 312.
    assert sampler.labelled_passes(sampler.num_steps) == (88 + 104) / 57


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("unit", ["samples", "seconds"])
def test_processes_share_every_step(unit: str, world_size: int, micro_batch_size: int, batch_statistics: bool) -> None:
    sampler = sampler_of(
        *SCHEDULES["3, ends it does not divide"],
        unit=unit,
        bucket_window=4,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        batch_statistics=batch_statistics,
    )
    lists = list(sampler)
    assert len(lists) == len(sampler) == sampler.num_steps * world_size
    for number in range(sampler.num_steps):
        ranks = lists[number * world_size : (number + 1) * world_size]
        assert ranks == [sampler.draws(number, rank) for rank in range(world_size)]
        real = sorted(draw.position for draws in ranks for draw in draws if draw.weight)
        assert real == list(range(sampler.positions[number], sampler.positions[number + 1]))
        shapes = []
        for draws in ranks:
            groups = [[d for d in draws if d.micro_batch == m] for m in range(draws[-1].micro_batch + 1)]
            # The collator groups neighbours: micro-batches must come one after the other.
            assert [draw for group in groups for draw in group] == draws
            for group in groups:
                assert 1 <= len(group) <= micro_batch_size
                assert len({draw.source for draw in group}) == len({draw.weight for draw in group}) == 1
                assert group[0].weight == 1 or len(group) == 1
            shapes.append(Counter(group[0].source for group in groups))
            assert all(
                (draw.source, draw.index)
                == (sampler.stream.source[draw.position], sampler.stream.index[draw.position])
                for draw in draws
            )
        # As many labelled, and as many unlabelled (teacher) micro-batches everywhere.
        assert all(shape == shapes[0] for shape in shapes)


def test_padding_is_of_the_source_it_stands_in_for() -> None:
    # Three items a step, one labelled and two unlabelled, over three processes.
    sampler = sampler_of((3 / 8, None), world_size=3)
    number = sampler.num_steps - 1
    assert [sampler.draws(number, rank)[0].source for rank in range(3)] == [LABELLED] * 3
    assert [sampler.draws(number, rank)[1].source for rank in range(3)] == [UNLABELLED] * 3
    assert [[d.weight for d in sampler.draws(number, rank)] for rank in range(3)] == [[1, 1], [0, 1], [0, 0]]
    assert sampler.draws(number, 2)[1].index == sampler.draws(number, 0)[1].index


def test_no_more_micro_batches_than_memory_asks_for() -> None:
    # 4 * 8 items, 11 labelled and 21 unlabelled or the like, in micro-batches of 4.
    for world_size, each in ((1, 3 + 6), (2, 2 + 3), (3, 1 + 2)):
        sampler = sampler_of((4, None), pl=0, steps=48, world_size=world_size)
        for number in range(sampler.num_steps):
            assert sampler.draws(number, 0)[-1].micro_batch + 1 == each


def test_items_are_sorted_by_length_inside_a_step_only() -> None:
    sampler = sampler_of((4, None), bucket_window=0)
    lengths = (durations(LABELLED_ITEMS, 0), durations(UNLABELLED_ITEMS, 1))
    for number in range(sampler.num_steps):
        for kind in (LABELLED, UNLABELLED):
            row = [lengths[kind][d.index] for d in sampler.draws(number, 0) if d.source == kind]
            assert row == sorted(row)


def micro_batches(sampler: ScheduledBatchSampler, number: int) -> list[list[int]]:
    return [group.tolist() for group in sampler.micro_batches(number) if len(group)]


@pytest.mark.parametrize("bucket_window", [0, 3])
@pytest.mark.parametrize("unit", ["samples", "seconds"])
@pytest.mark.parametrize("kappa", [2, 4, 7])
def test_with_batch_statistics_a_step_has_the_micro_batches_of_its_reference_steps(
    kappa: float, unit: str, bucket_window: int
) -> None:
    reference, scaled = (
        sampler_of((k, None), unit=unit, bucket_window=bucket_window, batch_statistics=True, micro_batch_size=3)
        for k in (1, kappa)
    )
    # In this order, since running averages depend on it.
    expected = [group for number in range(reference.num_steps) for group in micro_batches(reference, number)]
    assert [group for number in range(scaled.num_steps) for group in micro_batches(scaled, number)] == expected
    assert scaled.num_steps < reference.num_steps / kappa + 2
    borders = set(reference.positions.tolist())
    for group in expected:
        assert not borders & set(range(min(group) + 1, max(group) + 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_with_batch_statistics_processes_share_the_same_micro_batches_out(world_size: int) -> None:
    alone, many = (
        sampler_of((4, None), batch_statistics=True, micro_batch_size=2, world_size=world) for world in (1, world_size)
    )
    for number in range(alone.num_steps):
        assert sorted(micro_batches(many, number)) == sorted(micro_batches(alone, number))


def test_without_batch_statistics_micro_batches_cross_reference_batches() -> None:
    sampler = sampler_of((4, None), micro_batch_size=16, steps=8, pl=None)
    assert [len(group) for group in micro_batches(sampler, 0)] == [16, 16]


def test_steps_that_draw_nothing_are_no_steps() -> None:
    # Utterances of 2 and 4 s, a twentieth of a second per step.
    stream = ReferenceStream(DataSource(np.array([2.0, 4.0])), reference_batch_size=1, reference_steps=12, seed=1)
    borders = step_borders(BatchSchedule.constant(0.05).resolve(12), 1)
    sampler = ScheduledBatchSampler(stream, borders, micro_batch_size=1)
    assert len(borders) == 240 and sampler.num_steps == len(sampler) == 4
    steps = [sampler.step(number) for number in range(4)]
    assert [step.items for step in steps] == [1, 1, 1, 1]
    assert sorted(step.kappa for step in steps) == [2, 2, 4, 4] and steps[-1].end == 12
    assert all(step.stage_kappa == 0.05 for step in steps)


def test_stage_kappa_of_kept_steps_stays_theirs() -> None:
    stream = ReferenceStream(DataSource(np.full(3, 4.0)), reference_batch_size=1, reference_steps=24)
    borders = step_borders(BatchSchedule((Stage(1, 12), Stage(2))).resolve(24), 1)
    sampler = ScheduledBatchSampler(stream, borders, micro_batch_size=1)
    assert [sampler.step(n).stage_kappa for n in range(sampler.num_steps)] == [1, 1, 1, 2, 2, 2]


def plan_of(unit: Any, *stages: tuple[float, float | None], done: StepBorders | None = None) -> ScalingPlan:
    recipe = Recipe(B, unit, STEPS, 1e-3, 0.999, pl_start=PL_START)
    return ScalingPlan(recipe, BatchSchedule(tuple(Stage(k * B, until) for k, until in stages)), done=done)


@pytest.mark.parametrize("unit", ["samples", "seconds"])
@pytest.mark.parametrize("stages", [((0.13, None),), ((0.13, 20), (1.3, None)), SCHEDULES["1-2-4"]])
def test_a_resumed_run_lays_out_the_same_steps(unit: str, stages: tuple[tuple[float, float | None], ...]) -> None:
    stream = stream_of(unit)
    whole = ScheduledBatchSampler(stream, plan_of(unit, *stages).step_borders, micro_batch_size=4)
    for steps in {0, 1, 2, 7, whole.num_steps // 2, whole.num_steps - 1, whole.num_steps}:
        done = StepBorders.from_json(whole.done(steps).to_json())
        assert stream.position(done.position) == whole.positions[steps]
        resumed = ScheduledBatchSampler(stream, plan_of(unit, *stages, done=done).step_borders, micro_batch_size=4)
        assert resumed.positions.tolist() == whole.positions.tolist()
        assert all(resumed.step(n) == whole.step(n) for n in range(whole.num_steps))


@pytest.mark.parametrize("unit", ["samples", "seconds"])
@pytest.mark.parametrize("kappa", [0.5, 1.3, 3, 8])
@pytest.mark.parametrize("steps", [3, 9, 17])
def test_resuming_with_another_kappa_replaces_the_tail_only(unit: str, kappa: float, steps: int) -> None:
    stream = stream_of(unit, bucket_window=4)
    before = ScheduledBatchSampler(stream, plan_of(unit, (2, None)).step_borders, micro_batch_size=4)
    tail = plan_of(unit, (kappa, None), done=before.done(steps)).step_borders
    after = ScheduledBatchSampler(stream, tail, micro_batch_size=4, world_size=2)
    assert all(after.step(n) == before.step(n) for n in range(steps))
    assert after.positions[: steps + 1].tolist() == before.positions[: steps + 1].tolist()
    assert visited(after) == visited(before)
    first = after.step(steps)
    assert first.stage_kappa == (first.kappa if after.borders.cut[steps] else kappa)
    assert any(after.positions == stream.position(PL_START))
    if unit == "samples":
        assert abs(after.step(after.num_steps - 2).kappa - kappa) <= 1 / B


@pytest.mark.parametrize(("option", "value"), [("micro_batch_size", 0), ("world_size", 0), ("micro_batch_size", -2)])
def test_sizes_below_one_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got {value}"):
        sampler_of((1, None), **{option: value})


def test_borders_of_another_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the end of the run, reference step 50 of the stream .*reach 40"):
        ScheduledBatchSampler(stream_of(), borders_of((1, None), steps=40), micro_batch_size=4)
    with pytest.raises(ValueError, match="pl_start, reference step 11"):
        ScheduledBatchSampler(stream_of(), borders_of((2, None), pl=None), micro_batch_size=4)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def loader_of(sampler: ScheduledBatchSampler) -> DataLoader:
    rows = [{"x": row} for row in range(max(LABELLED_ITEMS, UNLABELLED_ITEMS))]
    dataset = TwoSourceDataset(rows[:LABELLED_ITEMS], rows)
    collate = MicroBatchCollator(lambda examples: {"x": [example["x"] for example in examples]})
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


def test_accelerate_yields_every_step_and_skips_exactly(accelerator: Accelerator) -> None:
    sampler = sampler_of(*SCHEDULES["1-2-4"], bucket_window=3)
    loader = accelerator.prepare_data_loader(loader_of(sampler), device_placement=False)
    assert len(loader) == sampler.num_steps
    batches = [batch["micro_batches"] for batch in loader]
    positions = [sorted(p for micro in batch for p in micro["positions"]) for batch in batches]
    assert positions == [list(range(sampler.positions[n], sampler.positions[n + 1])) for n in range(sampler.num_steps)]
    assert all(micro["inputs"]["x"] == micro["indices"] for batch in batches for micro in batch)
    for skipped in (0, 1, 13, sampler.num_steps - 1, sampler.num_steps):
        rest = skip_first_batches(loader, skipped)
        assert [batch["micro_batches"] for batch in rest] == batches[skipped:]
    assert not hasattr(sampler, "batch_size")


@pytest.mark.parametrize("even_batches", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_accelerate_deals_each_process_its_own_list_of_every_step(world_size: int, even_batches: bool) -> None:
    sampler = sampler_of(*SCHEDULES["3, ends it does not divide"], world_size=world_size)
    for rank in range(world_size):
        shard = BatchSamplerShard(
            sampler, num_processes=world_size, process_index=rank, split_batches=False, even_batches=even_batches
        )
        assert len(shard) == sampler.num_steps
        assert list(shard) == [sampler.draws(number, rank) for number in range(sampler.num_steps)]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_label_batches_hold_each_unlabelled_item_once_sorted_by_length(
    size: int, world_size: int, batch_statistics: bool
) -> None:
    sampler = sampler_of((3, None), world_size=world_size, label_batch_size=size, batch_statistics=batch_statistics)
    plain = sampler_of((3, None), world_size=world_size, batch_statistics=batch_statistics)
    lengths = durations(UNLABELLED_ITEMS, 1)
    for number in range(sampler.num_steps):
        for rank in range(world_size):
            draws = sampler.draws(number, rank)
            # Nothing else about the step knows of them.
            assert [draw._replace(label_batch=None) for draw in draws] == plain.draws(number, rank)
            labelled = [draw for draw in draws if draw.label_batch is not None]
            assert labelled == [draw for draw in draws if draw.source == UNLABELLED and draw.weight]
            batches: dict[int, list[float]] = {}
            for draw in labelled:
                batches.setdefault(draw.label_batch or 0, []).append(lengths[draw.index])
            assert sorted(batches) == list(range(-(-len(labelled) // size)))
            assert all(len(batch) <= size for batch in batches.values())
            assert all(max(batches[i]) <= min(batches[i + 1]) for i in range(len(batches) - 1))


def test_label_batches_need_room_for_an_item() -> None:
    with pytest.raises(ValueError, match="label_batch_size must be at least 1, got 0"):
        sampler_of((1, None), label_batch_size=0)
