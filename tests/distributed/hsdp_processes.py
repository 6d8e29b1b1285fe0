"""What `test_hsdp.py` runs on two or four gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sharded_processes
import tiny
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from sharded_processes import PLANS, seen
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers.distributed import DistributedConfig


def model_of(family: str, saved: Path, shards: int) -> Any:
    """A tiny model, twice over the processes, each time in so many shards."""
    model = getattr(tiny, family)()
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    dist.barrier()
    config = DistributedConfig(fsdp_size=shards, dp_replicate_size=2, fsdp_plan=PLANS[family])
    return type(model).from_pretrained(saved, distributed_config=config)


def main(folder: Path, shards: int) -> dict[str, Any]:
    micro = 12 // dist.get_world_size()
    save = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    model = model_of("bert", folder / "bert", shards)
    made = sharded_processes.split(folder / "run", model, "bert", micro, noise_scale_every=1, **save)
    made.train()
    results: dict[str, Any] = {"run": seen(made)}
    results["evaluated"] = made.evaluate()
    made.save_model(str(folder / "run" / "final"))
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    results["placements"] = {str(p.placements) for p in parameters}
    results["shape"] = [tuple(p.device_mesh.shape) for p in parameters][:1]
    with CommDebugMode() as communication:
        made.average.update(model, 0.9)
    results["communication"] = communication.get_total_counts()
    results["teacher"] = sharded_processes.teacher_of(model, made.average)
    ctc = model_of("wav2vec2", folder / "wav2vec2", shards)
    labelled = sharded_processes.semi_supervised(folder / "labels", ctc, 2)
    labelled.train()
    return results | {"labels": seen(labelled) | {"found": labelled.found}}


def main_plugin(folder: Path, shards: int) -> dict[str, Any]:
    """The same by accelerate's plugin and a `ParallelismConfig`; and once more, from a checkpoint."""
    more = {
        "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=shards),
        "save_strategy": "steps",
        "save_steps": 1,
    }
    micro = 12 // dist.get_world_size()
    made = sharded_processes.split(folder / "run", tiny.bert(), "bert", micro, **more)
    made.train()
    parameters = [p for p in made.model.parameters() if isinstance(p, DTensor)]
    again = sharded_processes.split(folder / "again", tiny.bert(seed=5), "bert", micro, **more)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    return {"run": seen(made), "again": seen(again), "placements": {str(p.placements) for p in parameters}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT, SHARDS, PART = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if PART == "plugin":
        sharded_processes.force_plugin()
    RANK = PartialState(cpu=True).process_index
    torch.save({"load": main, "plugin": main_plugin}[PART](OUT, SHARDS), OUT / f"{RANK}.pt")
    dist.destroy_process_group()
