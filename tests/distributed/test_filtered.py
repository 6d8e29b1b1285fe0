"""Filters, ledger, diagnostics and collapse guard on two gloo processes are those of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))
import filtered_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("filtered")
    launch.on_two_processes(filtered_processes.__file__, str(folder))
    return folder, launch.results(folder)


def test_two_processes_count_what_one_does_to_the_last_bit(
    launched: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = filtered_processes.run(tmp_path)
    made.train()
    alone = filtered_processes.seen(made)
    for rank in launched[1]:
        for key in ("ledger", "thresholds"):
            assert rank["whole"][key] == alone[key], key
        assert len(rank["whole"]["history"]) == len(alone["history"])
        for found, wanted in zip(rank["whole"]["history"], alone["history"], strict=True):
            # Sums of calibration are float64 in another order.
            assert found == pytest.approx(wanted, rel=1e-12)
            exact = {key for key in wanted if not key.startswith("calibration/")}
            assert {key: found[key] for key in exact} == {key: wanted[key] for key in exact}
    assert any("calibration/ece" in entry for entry in alone["history"])
    assert any(cell.get("confidence") for cell in alone["ledger"]["used"].values())


def test_a_resumed_run_on_two_processes_goes_on(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in launched[1]:
        for key in ("ledger", "thresholds", "history"):
            assert rank["resumed"][key] == rank["whole"][key], key
        assert tiny.same_bits(rank["resumed"]["weights"], rank["whole"]["weights"])


def test_both_processes_stop_and_roll_back_together(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = launched
    for rank in ranks:
        assert rank["stop"] == ([30.0], [], 30)
        assert rank["rollback"][1][0] == [20.0, 30.0] and rank["rollback"] == ranks[0]["rollback"]
        assert rank["rollback"][2] == 40
    assert (folder / "rollback" / "collapsed-checkpoint-25").is_dir()
