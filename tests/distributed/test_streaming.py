"""Streams on two gloo processes: rows of one process where all read all, shards of their own where they can."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
from apart import agree

sys.path.insert(0, str(Path(__file__).parent))
import streamed_processes

pytestmark = pytest.mark.distributed

Launched = tuple[list[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("streamed")
    alone = streamed_processes.run(folder / "one", "rows")
    alone.train()
    streamed_processes.run(folder / "bound", "shards").train()
    launch.on_two_processes(streamed_processes.__file__, str(folder))
    return launch.results(folder), alone


def close(found: dict[str, Any], alone: Any, since: int = 0) -> None:
    assert len(found["gradients"]) == len(alone.recorder.gradients) - since > 0
    for step, (gradients, averages) in enumerate(zip(found["gradients"], found["averages"], strict=True), since):
        agree("gradients", alone.recorder.gradients[step], gradients)
        agree("averages", alone.recorder.averages[step], averages)


def together(ranks: list[dict[str, Any]], name: str) -> list[list[tuple[int, int, int]]]:
    """Source, row and stream position of what both processes drew in each step, without padding."""
    steps = zip(*(rank[name]["drawn"] for rank in ranks), strict=True)
    return [sorted({tuple(item) for side in step for item in side}, key=lambda item: item[2]) for step in steps]


def test_both_processes_hold_the_same_bits(launched: Launched) -> None:
    (first, second), _ = launched
    assert first.keys() == second.keys()
    for name in set(first) - {"refused", "unlike"}:
        for key in ("gradients", "weights", "averages", "buffers", "optimizer"):
            assert tiny.same_bits(first[name][key], second[name][key]), (name, key)
        assert first[name]["rounds"] and [[source for source, _ in step] for step in first[name]["rounds"]] == [
            [source for source, _ in step] for step in second[name]["rounds"]
        ]


def test_where_all_read_every_row_two_processes_are_one(launched: Launched) -> None:
    ranks, alone = launched
    close(ranks[0]["rows"], alone)
    assert [sorted(step) for step in together(ranks, "rows")] == [sorted(step) for step in alone.drawn]
    assert len(alone.drawn) == 7
    # Without overlap.
    for step in range(7):
        sides = [{tuple(item) for item in rank["rows"]["drawn"][step]} for rank in ranks]
        assert abs(len(sides[0]) - len(sides[1])) <= 2


def test_a_run_moves_from_one_process_to_two(launched: Launched) -> None:
    ranks, alone = launched
    close(ranks[0]["moved"], alone, streamed_processes.MOVED)


def test_where_processes_have_shards_every_kappa_sees_the_same_rows(launched: Launched) -> None:
    ranks, _ = launched
    one, two = together(ranks, "shards-1"), together(ranks, "shards-2")
    assert [len(step) for step in one] == [5] * 12 and [len(step) for step in two] == [5] * 2 + [10] * 5
    assert one[:2] == two[:2]
    for number in range(5):
        first = 2 + 2 * number
        assert sorted(one[first] + one[first + 1]) == sorted(two[2 + number])
    # The shares: rank 0 has 7 labelled rows, rank 1 has 4, and both give every other one.
    for rank, rows in ((0, 7), (1, 4)):
        numbers = [
            item[1]
            for step, rounds in zip(ranks[rank]["shards-1"]["drawn"], ranks[rank]["shards-1"]["rounds"], strict=True)
            for item in sorted({tuple(item) for item in step}, key=lambda item: item[2])
            if item[0] == 0 and any(weight for _, weight in rounds)
        ]
        assert max(numbers) == rows - 1 and set(numbers) == set(range(rows))


@pytest.mark.parametrize("split", ["rows", "shards"])
@pytest.mark.parametrize("stop", streamed_processes.STOPS)
def test_resume_is_bit_identical(launched: Launched, split: str, stop: int) -> None:
    for rank in launched[0]:
        whole, found = rank[f"whole-{split}"], rank[f"resumed-{split}-{stop}"]
        for key in ("gradients", "weights", "averages", "optimizer", "drawn", "rounds"):
            assert tiny.same_bits(found[key], whole[key][stop:]), key
        later = [entry for entry in whole["history"] if entry["step"] > stop]
        assert [entry for entry in found["history"] if entry["step"] > stop] == later and later


def test_shares_of_other_processes_are_not_continued(launched: Launched) -> None:
    for rank in launched[0]:
        assert (
            "was written by 1 processes (with shards of their own of: nothing), and this run has 2" in rank["refused"]
        )
        assert "train_dataset, unlabeled_dataset" in rank["refused"]


def test_streams_must_be_the_same_on_all_processes(launched: Launched) -> None:
    for rank in launched[0]:
        assert "train_dataset begins with other rows on each process" in rank["unlike"]
        assert "fixed seed" in rank["unlike"]


def test_batch_norm_gets_as_many_micro_batches_on_each_process(launched: Launched) -> None:
    ranks, _ = launched
    assert [len(step) for step in ranks[0]["batch_norm"]["rounds"]] == [
        len(s) for s in ranks[1]["batch_norm"]["rounds"]
    ]
    weights = [weight for rank in ranks for step in rank["batch_norm"]["rounds"] for _, weight in step]
    assert weights.count(1.0) == 12 and weights.count(0.0) > 0
