"""Two gloo processes with PEFT adapters give what one gives: under DDP, with shards (FSDP2), by the callback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapted
import apart
import launch
import pytest
import tiny
import torch
from adapted import peft

sys.path.insert(0, str(Path(__file__).parent))
import adapter_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Launched = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("adapters")
    launch.on_two_processes(adapter_processes.__file__, str(folder), "all")
    return folder, launch.results(folder)


def close(found: dict[str, Any], alone: Any) -> None:
    """Of what is trained alone: next to a frozen base any difference in it would look small."""
    apart.close(found, alone, counts=lambda name: "lora" in name or "modules_to_save" in name)
    assert found["gathered"] == alone.average.gathered


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_two_processes_train_as_one_does(launched: Launched, tmp_path: Path, name: str) -> None:
    _, ranks = launched
    alone = adapter_processes.supervised(tmp_path, adapter_processes.lora("bert"), 48)
    alone.train()
    start, end = alone.recorder.initial, alone.recorder.weights[-1]
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    assert len(moved) == 4 and all("lora" in n for n in moved)
    for rank in ranks:
        close(rank[name], alone)
    for key in ("gradients", "weights", "averages"):
        assert tiny.same_bits(ranks[0][name][key], ranks[1][name][key]), key


def test_with_a_sharded_base_the_adapters_are_whole(launched: Launched) -> None:
    for rank in launched[1]:
        assert len(rank["whole"]) == 4 and all("lora" in name for name in rank["whole"])
        assert len(rank["sharded"]) > 20


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_the_labels_are_those_of_the_averaged_adapters_of_one_process(
    launched: Launched, tmp_path: Path, name: str
) -> None:
    _, ranks = launched
    alone = adapter_processes.semi_supervised(tmp_path, adapter_processes.lora("wav2vec2"), 8)
    alone.train()
    assert len(alone.found) == 30 and len({tuple(ids) for _, ids in alone.found}) > 10
    found = [label for rank in ranks for label in rank[f"{name}-labels"]["found"]]
    assert sorted(found) == sorted(alone.found)
    close(ranks[0][f"{name}-labels"], alone)


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_both_adapters_are_saved_as_peft_loads_them(launched: Launched, name: str) -> None:
    folder, ranks = launched
    final = folder / name / "final"
    said = []
    for place in (final, final / "ema" / "adapter"):
        loaded = peft.PeftModel.from_pretrained(tiny.bert(), place).eval()
        with torch.no_grad():
            said.append(loaded(input_ids=adapter_processes.SENTENCE).logits)
    assert float((said[0] - said[1]).abs().max()) > 1e-3
    for rank in ranks:
        for one, two in zip(said, rank[name]["said"], strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(launched: Launched) -> None:
    for rank in launched[1]:
        assert len(rank["again"]["weights"]) == 2
        for key in ("gradients", "weights", "averages"):
            assert tiny.same_bits(rank["again"][key], rank["ddp"][key][2:]), key
        assert rank["again"]["gathered"] == rank["ddp"]["gathered"]


@pytest.mark.parametrize("kind", ["stock", "sft"])
def test_the_callback_averages_adapters_over_processes(launched: Launched, kind: str) -> None:
    """In a stock Trainer, and in TRL's with a `peft_config`: the mean of the students, and nothing of the start."""
    folder, ranks = launched
    assert tiny.same_bits(ranks[0][kind], ranks[1][kind])
    found, rho = ranks[0][kind], 0.9**2
    assert found["kappa"] == 2.0 and found["gathered"] == pytest.approx(1 - rho**4, rel=1e-12)
    assert found["references"] > 0
    for done in range(1, 5):
        weights = [(1 - rho) * rho ** (done - 1 - i) / (1 - rho**done) for i in range(done)]
        for name, value in found["averages"][done - 1].items():
            students = [student[name].double() for student in found["students"][:done]]
            expected = sum(weight * student for weight, student in zip(weights, students, strict=True))
            assert (value - expected).abs().max() < 1e-6, name
    assert float(max(value.abs().max() for name, value in found["averages"][-1].items() if "lora_B" in name)) > 1e-3
    again = ranks[0][f"{kind}-again"]
    assert tiny.same_bits(again["averages"], found["averages"][2:]) and again["gathered"] == found["gathered"]
    base = tiny.bert() if kind == "stock" else adapter_processes.llama()
    loaded = tiny.parameters(peft.PeftModel.from_pretrained(base, folder / kind / "export" / "adapter"))
    assert tiny.same_bits({n: v for n, v in loaded.items() if "lora" in n}, found["averages"][-1])


def test_adapters_that_transformers_adds_train_save_and_resume(tmp_path: Path) -> None:
    """`model.add_adapter`, under DDP and over a base in shards."""
    folder = tmp_path / "two"
    folder.mkdir()
    launch.on_two_processes(adapter_processes.__file__, str(folder), "added")
    ranks = launch.results(folder)
    alone = adapter_processes.supervised(tmp_path / "one", adapter_processes.lora("bert", kind="add_adapter"), 48)
    alone.train()
    for rank in ranks:
        assert len(rank["whole"]["names"]) == 4 and all("lora" in name for name in rank["whole"]["names"])
        for name in ("ddp", "shards"):
            close(rank[name], alone)
            for key in ("gradients", "weights", "averages"):
                assert tiny.same_bits(rank[name][key], ranks[0][name][key]), key
        for key in ("gradients", "weights", "averages"):
            assert tiny.same_bits(rank["again"][key], rank["ddp"][key][2:]), key
    for name in ("ddp", "shards"):
        final = folder / name / "final"
        for place, said in zip((final, final / "ema" / "adapter"), ranks[0][name]["said"], strict=True):
            loaded = peft.PeftModel.from_pretrained(tiny.bert(), place).eval()
            with torch.no_grad():
                logits = loaded(input_ids=adapter_processes.SENTENCE).logits
            torch.testing.assert_close(logits, said, rtol=0, atol=1e-6)


def test_accelerates_plugin_trains_saves_and_resumes_sharded_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    launch.on_two_processes(adapter_processes.__file__, str(folder), "plugin")
    ranks = launch.results(folder)
    alone = adapter_processes.supervised(tmp_path / "one", adapted.lora_bert(), 48)
    alone.train()
    for rank in ranks:
        assert {n for n in rank["sharded"] if "lora" in n} == {n for n in alone.recorder.initial if "lora" in n}
        close(rank["plugin"], alone)
        for key in ("gradients", "weights", "averages"):
            assert tiny.same_bits(rank["again"][key], rank["plugin"][key][2:]), key
    loaded = tiny.parameters(peft.PeftModel.from_pretrained(tiny.bert(), folder / "checkpoint-2" / "ema" / "adapter"))
    average = ranks[0]["plugin"]["averages"][1]
    trained = {name for name in average if "lora" in name or "modules_to_save" in name}
    assert len(trained) == 6
    assert tiny.same_bits({name: loaded[name] for name in trained}, {name: average[name] for name in trained})
