"""The configurations in `recipes/accelerate`: each launches a recipe, or is read as it will be on GPUs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dry_runs
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
SCRIPT = ROOT / "recipes" / "asr_ctc.py"
AS_ACCELERATORS = Path(__file__).with_name("as_accelerators.py")
NAMES = ("one_process", "ddp", "ddp_cpu", "fsdp2")


def file(name: str) -> str:
    return str(FOLDER / f"{name}.yaml")


def started(name: str, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file FILE words`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file(name)]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *words], env=os.environ | own, cwd=folder, capture_output=True, text=True, timeout=600
    )


def launch(name: str, config: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The average that a launched recipe leaves."""
    done = started(name, *options, str(SCRIPT), "--config", str(config), "--output_dir", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output / "ema" / "model.safetensors")


def read(name: str, *options: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file and options."""
    words = ["--config_file", file(name), *options, str(SCRIPT)]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NAMES)
    for name in NAMES:
        assert load_config_from_file(file(name)).mixed_precision == "no"
        header = Path(file(name)).read_text(encoding="utf-8")
        assert f"#   accelerate launch --config_file recipes/accelerate/{name}.yaml " in header


@pytest.mark.parametrize(
    ("name", "processes", "multi_gpu", "fsdp"),
    [
        ("one_process", 1, False, False),
        ("ddp", 8, True, False),
        ("ddp_cpu", 2, True, False),
        ("fsdp2", 8, False, True),
    ],
)
def test_the_launcher_reads_them(name: str, processes: int, multi_gpu: bool, fsdp: bool) -> None:
    found = read(name)
    assert (found.num_processes, bool(found.multi_gpu), bool(found.use_fsdp)) == (processes, multi_gpu, fsdp)
    assert read(name, "--num_processes", "4").num_processes == 4


def test_the_plugin_of_fsdp2_is_the_one_that_can_be_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, Any] = prepare_multi_gpu_env(read("fsdp2"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    assert "transformer_auto_wrap_policy" in str(plugin.auto_wrap_policy)


@pytest.mark.slow
@pytest.mark.distributed
def test_launched_recipes_take_the_same_steps(config: Path, tmp_path: Path) -> None:
    one = launch("one_process", config, tmp_path / "one")
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["processes"] == 1
    # On CPUs accelerate trains by DDP whatever the last of the files says.
    others = {"ddp_cpu": (), "ddp": ("--num_processes", "2"), "fsdp2": ("--num_processes", "2")}
    for name, options in others.items():
        two = launch(name, config, tmp_path / name, *options)
        assert json.loads((tmp_path / name / "run.json").read_text())["processes"] == 2
        assert two.keys() == one.keys()
        for key, value in one.items():
            # Each process sees micro-batches of its own: batch statistics are not what is claimed.
            if "running_" not in key and "num_batches" not in key:
                torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_recipe_in_shards_leaves_whole_models(tmp_path: Path) -> None:
    """With the plugin and the file's values, on CPUs that accelerate takes for accelerators; also resumed."""
    world = dry_runs.build_world(tmp_path)
    config = dry_runs.CONFIGS["minilm_vader"]
    recipe = [str(dry_runs.script_of(config)), "--config", str(config), *dry_runs.small("minilm_vader")]
    recipe += ["--max_steps", "4", "--evaluation", "null", "--save_total_limit", "null"]
    saves = ["--save_strategy", "steps", "--save_steps", "2"]
    sharded = ["--num_processes", "2", "--fsdp_transformer_layer_cls_to_wrap", "BertLayer", str(AS_ACCELERATORS)]
    through = [*sharded, *recipe, *saves, "--output_dir", "through"]
    resumed = [*sharded, *recipe, "--output_dir", "resumed", "--resume_from_checkpoint", "through/checkpoint-2"]
    alone = [*recipe, "--output_dir", "alone"]
    for name, words in (("one_process", alone), ("fsdp2", through), ("fsdp2", resumed)):
        done = started(name, *words, folder=world)
        assert done.returncode == 0, done.stderr[-3000:]
    for part in ("model.safetensors", "ema/model.safetensors"):
        one, two, again = (load_file(world / run / part) for run in ("alone", "through", "resumed"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
            assert torch.equal(two[key], again[key]), key


@pytest.mark.slow
@pytest.mark.distributed
def test_what_cannot_be_sharded_is_said(config: Path, tmp_path: Path) -> None:
    words = ["--num_processes", "2", str(AS_ACCELERATORS), str(SCRIPT), "--config", str(config)]
    done = started("fsdp2", *words, "--output_dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "ParakeetForCTC has no input embeddings, which accelerate's FSDP2 wants: train it by DDP" in done.stderr
