"""`EMACallback` in the stock Trainer on two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from stock_runs import RHO
from transformers import BertForSequenceClassification

from hf_ema_scaling.training.callback_files import files_faults

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "callback_processes.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("callback")
    launch.on_two_processes(str(SCRIPT), str(folder))
    return folder, launch.results(folder)


def test_both_processes_hold_the_same_averages(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = launched
    assert tiny.same_bits(first, second)
    assert first["batch_norm"]["norm.running_mean"].abs().max() > 0.1


def test_kappa_counts_both_processes(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (seen, _) = launched
    whole = seen["whole"]
    assert whole["kappa"] == 2.0
    expected = {name: p.double() for name, p in whole["start"].items()}
    for student, shadow in zip(whole["students"], whole["averages"], strict=True):
        for name in expected:
            expected[name] = RHO**2 * expected[name] + (1 - RHO**2) * student[name].double()
            assert (shadow[name] - expected[name]).abs().max() < 1e-6
    exported = BertForSequenceClassification.from_pretrained(folder / "export")
    assert all(torch.equal(p, whole["slow"][name]) for name, p in exported.named_parameters())


def test_resumes_just_in_time_or_not_end_with_the_same_bits(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (seen, _) = launched
    for name in ("slow", "fast"):
        assert tiny.same_bits(seen["resumed"][name], seen["whole"][name])
    assert seen["jit"]["stopped_at"] == 5
    assert tiny.same_bits(seen["jit"]["slow"], seen["whole"]["slow"])


def test_random_states_of_both_processes_are_verified_where_both_have_written_them(
    launched: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = launched
    shared = {"model.safetensors", "scheduler.pt", "trainer_state.json", "rng_state_0.pth"}
    for name, own in (("whole/checkpoint-6", {"rng_state_1.pth"}), ("jit/checkpoint-5", set[str]())):
        assert (folder / name / "rng_state_1.pth").is_file()
        record = json.loads((folder / name / "checksums.json").read_text())
        assert record["crc32"].keys() == shared | own
        assert files_faults(folder / name) == []


def test_a_missing_average_is_rebuilt_on_every_process(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (seen, _) = launched
    assert seen["rebuilt"]["said"] == 1
    whole = seen["whole"]
    expected = {name: p.double() for name, p in whole["students"][2].items()}
    for student in whole["students"][3:]:
        expected = {n: RHO**2 * expected[n] + (1 - RHO**2) * student[n].double() for n in expected}
    assert all((seen["rebuilt"]["slow"][name] - expected[name]).abs().max() < 1e-6 for name in expected)
