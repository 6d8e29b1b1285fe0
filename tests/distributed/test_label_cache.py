"""The label cache on two gloo processes is the one of one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
from apart import agree

from hf_ema_scaling.labels.cache import CACHE_NAME

sys.path.insert(0, str(Path(__file__).parent))
import cached_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cached")
    launch.on_two_processes(cached_processes.__file__, str(folder))
    return folder, launch.results(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("alone")
    made = cached_processes.cached(folder)
    made.train()
    return made, folder


def test_two_processes_train_on_the_labels_of_one(
    launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Any, Path]
) -> None:
    folder, ranks = launched
    made, alone_in = alone
    expected = cached_processes.seen(made)
    for rank in ranks:
        found = rank["whole"]
        assert len(found["gradients"]) == len(expected["gradients"]) == 8
        for step in range(8):
            agree("gradients", expected["gradients"][step], found["gradients"][step])
            agree("averages", expected["averages"][step], found["averages"][step])
        assert found["cache"] == expected["cache"] and len(found["cache"]) == 12
        assert found["history"] == expected["history"] and any("cache/age" in entry for entry in found["history"])
    # The files hold the same bits, at every step.
    for step in range(1, 9):
        files = [path / f"checkpoint-{step}" / CACHE_NAME for path in (folder / "whole", alone_in)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_each_process_labels_its_share_and_no_row_is_labelled_twice(
    launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Any, Path]
) -> None:
    _, ranks = launched
    sampler = alone[0].sampler
    for step in range(sampler.num_steps):
        events = sampler.stream.pool.events(int(sampler.positions[step]), int(sampler.positions[step + 1]))
        shares = [sum(count for at, count in rank["whole"]["rows"] if at == step) for rank in ranks]
        assert sum(shares) == len(events.positions) and abs(shares[0] - shares[1]) <= 1
    # Both label what enters the full pool, and what is drawn later is theirs or the other's.
    assert all(sum(count for at, count in rank["whole"]["rows"] if at > 3) >= 4 for rank in ranks)


def test_both_processes_and_one_continue_from_the_cache(
    launched: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, ranks = launched
    for rank in ranks:
        for key in ("gradients", "averages", "drawn"):
            assert tiny.same_bits(rank["resumed"][key], rank["whole"][key][5:]), key
        assert rank["resumed"]["cache"] == rank["whole"]["cache"]
    one = cached_processes.cached(tmp_path)
    one.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    assert len(one.recorder.gradients) == 3
    for step in range(3):
        agree("gradients", ranks[0]["whole"]["gradients"][5 + step], one.recorder.gradients[step])
    assert (tmp_path / "checkpoint-8" / CACHE_NAME).read_bytes() == (
        folder / "whole" / "checkpoint-8" / CACHE_NAME
    ).read_bytes()
