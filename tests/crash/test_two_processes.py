"""SIGTERM to one process of two stops both after the same step; both resume from what the first of them chooses."""

from __future__ import annotations

from pathlib import Path

import launch
import pytest
import tiny

from hf_ema_scaling.training.checkpoints import what_is_missing


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(tmp_path: Path) -> None:
    outputs = launch.on_two_processes(str(Path(__file__).with_name("two_processes.py")), str(tmp_path))
    first, second = launch.results(tmp_path)
    for results in (first, second):
        assert (results["code"], results["stopped"]) == (143, 3)
        assert "trainer_state.json is missing" in results["refused"]
        whole, resumed = results["whole"], results["resumed"]
        assert tiny.same_bits(resumed["weights"], whole["weights"])
        assert tiny.same_bits(resumed["average"], whole["average"])
        assert resumed["drawn"] == whole["drawn"][3:] and resumed["losses"] == whole["losses"]
    assert tiny.same_bits(first["resumed"]["average"], second["resumed"]["average"])
    # One checkpoint is kept; what was half-written is gone, though its number was higher when 4 was saved.
    assert [path.name for path in (tmp_path / "told").iterdir()] == ["checkpoint-6"]
    assert what_is_missing(tmp_path / "told" / "checkpoint-6") == []
    assert {path.name for path in (tmp_path / "told" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    for output in outputs:
        assert output.count("SIGTERM: training saves a checkpoint and stops.") == 1
