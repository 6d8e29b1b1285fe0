"""Copies of shards (HSDP) give what one process gives: two copies of one shard, and two copies of two shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from apart import close
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
import hsdp_processes
import sharded_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Launched = tuple[Path, int, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2], ids=["2x1", "2x2"])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    shards: int = request.param
    folder = tmp_path_factory.mktemp("hsdp")
    launch.on_processes(2 * shards, hsdp_processes.__file__, str(folder), str(shards), "load")
    return folder, shards, launch.results(folder, 2 * shards)


def test_copies_of_shards_train_as_one_process_does(launched: Launched, tmp_path: Path) -> None:
    _, shards, ranks = launched
    alone = sharded_processes.split(tmp_path, tiny.bert(), "bert", 48)
    alone.train()
    scores = alone.evaluate()
    logs = [log for log in alone.state.log_history if "loss" in log]
    for rank in ranks:
        assert rank["placements"] == {"(Replicate(), Shard(dim=0))"} and rank["shape"] == [(2, shards)]
        close(rank["run"], alone)
        assert len(rank["run"]["logs"]) == len(logs) == 4
        for one, two in zip(logs, rank["run"]["logs"], strict=True):
            assert one["grad_norm"] > 0.5
            for key in ("grad_norm", "ema/distance", "ema/momentum", "clip/rate", "loss"):
                assert two[key] == pytest.approx(one[key], rel=1e-4), key
        for key in ("eval_a_loss", "eval_ema_a_loss"):
            assert rank["evaluated"][key] == pytest.approx(scores[key], rel=1e-4)


def test_all_processes_hold_the_same_bits_and_draw_each_item_once(launched: Launched) -> None:
    _, _, ranks = launched
    for rank in ranks[1:]:
        for key in ("gradients", "weights", "averages", "logs", "noise"):
            assert tiny.same_bits(rank["run"][key], ranks[0]["run"][key]), key
    for step, size in enumerate([16, 16, 16, 48]):
        positions = [position for rank in ranks for _, _, position in rank["run"]["drawn"][step]]
        assert len(positions) == len(set(positions)) == size


def test_an_update_does_not_communicate(launched: Launched) -> None:
    assert {rank["communication"] for rank in launched[2]} == {0}


def test_exports_are_the_gathered_weights_bit_for_bit(launched: Launched) -> None:
    folder, _, ranks = launched
    for place, key, step in (
        ("final", "weights", -1),
        ("final/ema", "averages", -1),
        ("checkpoint-3/ema", "averages", 2),
    ):
        loaded = tiny.parameters(BertForSequenceClassification.from_pretrained(folder / "run" / place))
        expected = ranks[0]["run"][key][step]
        assert tiny.same_bits(loaded, {name: expected[name] for name in loaded}), place


def test_the_teacher_labels_as_that_of_one_process(launched: Launched, tmp_path: Path) -> None:
    _, _, ranks = launched
    alone = sharded_processes.semi_supervised(tmp_path, tiny.wav2vec2(), 8)
    alone.train()
    for rank in ranks:
        close(rank["labels"], alone)
        found = rank["teacher"]
        assert found["sharded_parts"] == 0
        assert tiny.same_bits(found["weights"], {name: found["average"][name] for name in found["weights"]})
        assert float((found["first"] - found["second"]).abs().max()) > 1e-4
    found = [label for rank in ranks for label in rank["labels"]["found"]]
    assert len(found) == 30 and sorted(found) == sorted(alone.found)
    assert torch.equal(ranks[0]["teacher"]["second"], ranks[-1]["teacher"]["second"])


def test_copies_of_shards_by_accelerates_plugin_train_and_resume(tmp_path: Path) -> None:
    """`ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)`, on CPUs that pass for accelerators.

    Copies of one shard each, which `DistributedConfig` makes, accelerate refuses.
    """
    folder, count = tmp_path / "plugin", 4
    folder.mkdir()
    launch.on_processes(count, hsdp_processes.__file__, str(folder), "2", "plugin")
    alone = sharded_processes.split(tmp_path / "one", tiny.bert(), "bert", 48)
    alone.train()
    ranks = launch.results(folder, count)
    for rank in ranks:
        assert rank["placements"] == {"(Replicate(), Shard(dim=0))"}
        close(rank["run"], alone)
        for key in ("gradients", "weights", "averages"):
            assert tiny.same_bits(rank["run"][key], ranks[0]["run"][key]), key
            assert tiny.same_bits(rank["again"][key], rank["run"][key][2:]), key
