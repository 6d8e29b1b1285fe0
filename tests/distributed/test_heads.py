"""Pseudo-labels of heads other than CTC on two gloo processes are those of one, and so is what they teach."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))
import head_processes
from head_processes import FAMILIES, SILENT_STEP

from hf_ema_scaling.training import collapse_watch

pytestmark = pytest.mark.distributed

TOLERANCE = 3e-4
"""Relative, in the norm over all parameters: float32 sums in another order, and what a few steps make of them."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("heads")
    launch.on_two_processes(head_processes.__file__, str(folder))
    return launch.results(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_weights_are_those_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path, family: str) -> None:
    first, second = (rank[family] for rank in ranks)
    # At one step the second process keeps nothing, while the first one does.
    assert second["kept"][SILENT_STEP] == 0 < first["kept"][SILENT_STEP]
    assert len(second["dropped"]) > 2 and not first["dropped"]
    alone = head_processes.trainer(tmp_path, family, dropped=second["dropped"])
    alone.train()
    one = head_processes.seen(alone)
    # Every item is labelled once, on one of the sides, and its label is the same to the last id.
    assert first["found"].keys() & second["found"].keys() == set()
    assert first["found"] | second["found"] == one["found"]
    assert len(one["found"]) > 20 and len(set(one["found"].values())) > 1
    assert [a + b for a, b in zip(first["kept"], second["kept"], strict=True)] == one["kept"]
    assert first["ledger"] == second["ledger"] == one["ledger"]
    for key in ("gradients", "weights", "averages"):
        assert tiny.same_bits(first[key], second[key]), key
        assert len(one[key]) == len(first[key]) > 3
        for step, expected in enumerate(one[key]):
            assert tiny.difference(expected, first[key][step]) < TOLERANCE, (key, step)
    # Labels are part of what is learned: without them the weights are others.
    assert any(tiny.difference(one["weights"][step], first["weights"][0]) > 3 * TOLERANCE for step in range(1, 4))
    for found, wanted in zip(first["logs"], one["logs"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert any(0 < log.get("gradient/unlabelled_share", 0) < 1 for log in one["logs"])
    assert any("student/disagreement" in log for log in one["logs"])


def test_a_teacher_that_labels_nothing_is_one_that_does_so_on_all_processes(
    ranks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse_watch, "LABELLESS_ROWS", collapse_watch.LABELLESS_ROWS)  # put back afterwards
    alone = head_processes.silent(tmp_path, True)
    assert [clock for clock, _ in alone] == [18.0]
    assert [rank["both silent"] for rank in ranks] == [alone, alone]
    assert [rank["one silent"] for rank in ranks] == [[], []]
