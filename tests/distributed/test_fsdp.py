"""Two gloo processes with a model in shards (FSDP2) give what one process gives with the whole of it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from apart import agree, close
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Wav2Vec2ForCTC

from hf_ema_scaling.training.checkpoints import what_is_missing

sys.path.insert(0, str(Path(__file__).parent))
import sharded_processes

pytestmark = pytest.mark.distributed

CLASSES: dict[str, Any] = {"bert": BertForSequenceClassification, "wav2vec2": Wav2Vec2ForCTC}

Launched = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("fsdp")
    launch.on_two_processes(sharded_processes.__file__, str(folder), "core")
    return folder, launch.results(folder)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("more")
    launch.by_accelerate(sharded_processes.__file__, str(folder), "more")
    return folder, launch.results(folder)


def same_on_both(ranks: list[dict[str, Any]], *names: str) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for name in names:
        for key in ("gradients", "weights", "averages", "logs", "noise"):
            assert tiny.same_bits(first[name][key], second[name][key]), (name, key)


def test_both_processes_gather_the_same_bits(launched: Launched) -> None:
    same_on_both(launched[1], "split-bert")


@pytest.mark.slow
def test_so_they_do_of_other_runs(more: Launched) -> None:
    same_on_both(more[1], "split-wav2vec2", "deferred", "each", "labels", "one_side")


# ---- The average itself


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_uneven_and_empty_shards_move_as_the_whole_does(launched: Launched, name: str) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    expected = sharded_processes.update_all(sharded_processes.Uneven().to(dtype), dtype)
    for rank, results in enumerate(launched[1]):
        found = results[f"uneven-{name}"]
        assert tiny.same_bits(found["state"], expected["state"])
        assert all(value.dtype == torch.float32 for value in found["state"].values())
        assert found["fingerprints"] == expected["fingerprints"]
        assert found["distances"] == pytest.approx(expected["distances"], rel=1e-6)
        assert found["empty"] == ([] if rank == 0 else ["last.weight", "last.bias"])
        assert tiny.same_bits(found["loaded"], found["state"])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_updates_and_swaps_do_not_communicate(launched: Launched, name: str) -> None:
    assert [results[f"uneven-{name}"]["communication"] for results in launched[1]] == [0, 0]


def test_processes_agree_about_a_change_that_one_of_them_sees(launched: Launched) -> None:
    for results in launched[1]:
        found = results["uneven-fp32"]
        assert found["equals"] == [True, False]
        # The second: `second.weight`, of which only process 0 holds the changed row; what is frozen is not averaged.
        assert found["moved"] == [False, True, False, False, False]


def test_who_does_not_write_keeps_no_gathered_tensor(launched: Launched) -> None:
    writer, other = (results["uneven-fp32"]["dropped"] for results in launched[1])
    assert len(writer) == 7 and other == ["running"]


# ---- Training


# Of the second, whose heads and weight norm make shards uneven and empty, more runs on the same processes.
FAMILIES = [pytest.param("bert", "launched"), pytest.param("wav2vec2", "more", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "where"), FAMILIES)
def test_shards_train_as_one_process_does(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, where: str
) -> None:
    _, ranks = request.getfixturevalue(where)
    alone = sharded_processes.split(tmp_path, sharded_processes.model_of(family), family, 48)
    alone.train()
    found = ranks[0][f"split-{family}"]
    close(found, alone)
    for step in range(4):
        drawn = [rank[f"split-{family}"]["drawn"][step] for rank in ranks]
        assert sorted(item for side in drawn for item in side) == sorted(alone.drawn[step])
    logs = [log for log in alone.state.log_history if "loss" in log]
    assert len(logs) == len(found["logs"]) == 4
    for one, two in zip(logs, found["logs"], strict=True):
        # The norm of the whole gradient, which clipping took effect on, and the distance of the whole average.
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4) and one["grad_norm"] > 0.5
        for key in ("ema/distance", "ema/momentum", "clip/rate", "loss"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    scores = alone.evaluate()
    for key in ("eval_a_loss", "eval_ema_a_loss"):
        assert found["evaluated"][key] == pytest.approx(scores[key], rel=1e-4)


@pytest.mark.slow
def test_gradients_reduced_in_every_pass_are_the_same(more: Launched) -> None:
    deferred, each = (more[1][0][name] for name in ("deferred", "each"))
    for key in ("gradients", "weights", "averages"):
        for one, two in zip(deferred[key], each[key], strict=True):
            assert tiny.difference(one, two) < 1e-5


def test_the_noise_scale_is_measured_at_the_first_part_of_all_processes(launched: Launched) -> None:
    """At the last step: the first twelve items of each process together, and all forty-eight."""
    _, ranks = launched
    model, data = tiny.bert(), tiny.sentences(40)
    model.load_state_dict(ranks[0]["split-bert"]["weights"][2])

    def square(drawn: list[tuple[int, int, int]]) -> float:
        model.zero_grad()
        rows = data[[index for _, index, _ in drawn]]
        F.cross_entropy(model(input_ids=rows["input_ids"]).logits, rows["labels"]).backward()
        return sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)

    drawn = [rank["split-bert"]["drawn"][3] for rank in ranks]
    assert [len(side) for side in drawn] == [24, 24]
    expected = square(drawn[0][:12] + drawn[1][:12]), square(drawn[0] + drawn[1])
    for rank in ranks:
        assert rank["split-bert"]["noise"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_teacher_gives_the_labels_of_one_process(more: Launched, tmp_path: Path) -> None:
    _, ranks = more
    alone = sharded_processes.semi_supervised(tmp_path, sharded_processes.model_of("wav2vec2"), 8)
    alone.train()
    close(ranks[0]["labels"], alone)
    sides = [rank["labels"]["found"] for rank in ranks]
    # Five rows a step on two processes: one of them has nothing to do while the other labels its last.
    assert len(alone.found) == 30 and [len(side) for side in sides] == [18, 12]
    assert sorted(sides[0] + sides[1]) == sorted(alone.found)
    assert len({tuple(ids) for _, ids in alone.found}) > 10


@pytest.mark.slow
def test_nothing_kept_on_one_process(more: Launched) -> None:
    both = more[1][0]["one_side"]
    assert all(bool(value.isfinite().all()) for step in both["gradients"] for value in step.values())
    assert len(both["weights"]) == 8


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_both(more: Launched, tmp_path: Path) -> None:
    alone = sharded_processes.meets_nan(tmp_path, tiny.bert(), 4, "skip")
    alone.train()
    bad = [any(not value.isfinite().all() for value in step.values()) for step in alone.recorder.gradients]
    taken = alone.average.num_updates
    assert 0 < taken < 5
    for rank in more[1]:
        assert rank["skip"]["updates"] == taken
    assert not any(bad)  # dropped before the step
    close(more[1][0]["skip"], alone, ("weights", "averages"))


@pytest.mark.slow
def test_or_stops_both(more: Launched, tmp_path: Path) -> None:
    alone = sharded_processes.meets_nan(tmp_path, tiny.bert(), 4, "raise")
    with pytest.raises(FloatingPointError) as raised:
        alone.train()
    for rank in more[1]:
        assert rank["raise"]["error"] == f"FloatingPointError: {raised.value}"
        agree("weights", tiny.parameters(alone.model), rank["raise"]["weights"])


@pytest.mark.slow
def test_an_average_that_stands_still_stops_both(more: Launched) -> None:
    for rank in more[1]:
        assert rank["dead"].startswith("DeadTeacherError: The average has not moved by one bit after 3 updates")


# ---- Evaluate, save, teach


def test_swapped_weights_are_what_the_model_computes_with(launched: Launched) -> None:
    folder, ranks = launched
    final = folder / "split-bert" / "final"
    with torch.no_grad():
        student, average = (
            BertForSequenceClassification.from_pretrained(place).eval()(input_ids=sharded_processes.SENTENCE).logits
            for place in (final, final / "ema")
        )
    assert float((student - average).abs().max()) > 0.01
    for rank in ranks:
        found = rank["after_evaluation"]
        assert found["gathered"] > 0
        for key, expected in (("student", student), ("back", student), ("back_from_error", student)):
            assert torch.equal(found[key], found["student"]) and torch.allclose(found[key], expected, atol=1e-6), key
        for key in ("swapped", "swapped_again", "copied"):
            assert torch.equal(found[key], found["swapped"]) and torch.allclose(found[key], average, atol=1e-6), key
        assert found["refused"].startswith("RuntimeError: Cannot update the average from this model now")
        assert found["distance"] == rank["split-bert"]["logs"][-1]["ema/distance"]


@pytest.mark.parametrize(("family", "where"), FAMILIES)
def test_exports_are_the_gathered_weights_bit_for_bit(request: pytest.FixtureRequest, family: str, where: str) -> None:
    folder, ranks = request.getfixturevalue(where)
    final = folder / f"split-{family}" / "final"
    student, average = ranks[0][f"split-{family}"]["final"]
    for place, expected in ((final, student), (final / "ema", average)):
        loaded = CLASSES[family].from_pretrained(place)
        assert type(loaded) is CLASSES[family]
        assert tiny.same_bits(tiny.parameters(loaded), {name: expected[name] for name in student})
    assert tiny.same_bits(student, ranks[0][f"split-{family}"]["weights"][-1])
    assert tiny.same_bits(ranks[0][f"split-{family}"]["averages"][-1], average)
    checkpoint = CLASSES[family].from_pretrained(folder / f"split-{family}" / "checkpoint-3" / "ema")
    third = ranks[0][f"split-{family}"]["averages"][2]
    assert tiny.same_bits(tiny.parameters(checkpoint), {name: third[name] for name in student})


def test_an_export_is_loaded_into_shards(launched: Launched) -> None:
    for rank in launched[1]:
        assert tiny.same_bits(rank["loaded"], rank["split-bert"]["final"][1])


def test_the_teacher_computes_with_the_gathered_average(launched: Launched) -> None:
    for rank in launched[1]:
        found = rank["teacher"]
        assert found["sharded_parts"] == 0
        assert tiny.same_bits(found["weights"], {name: found["average"][name] for name in found["weights"]})
        assert float((found["first"] - found["second"]).abs().max()) > 1e-3
        whole = tiny.bert().eval()
        whole.load_state_dict(found["weights"])
        with torch.no_grad():
            expected = whole(input_ids=sharded_processes.SENTENCE).logits
        assert torch.allclose(found["second"], expected, atol=1e-6)
        assert found["stale"].startswith("DeadTeacherError: The teacher's weights were gathered at update 4")
        # FSDP2's own hooks are no difference, one that changes outputs is; sharded weights are put back.
        assert found["gap"] < 1e-5 and found["put_back"]
        assert "part first in what classifier (Linear) returns" in found["hooked"]
        assert "lacks: forward hook 'tripled' on classifier. " in found["hooked"]


@pytest.mark.slow
def test_the_callback_averages_shards_in_the_stock_trainer(more: Launched) -> None:
    folder, ranks = more
    for rank in ranks:
        found = rank["callback"]
        assert found["kappa"] == 2.0 and len(found["weights"]) == 4
        expected = {name: value.double() for name, value in found["initial"].items()}
        for step in found["weights"]:
            for name, value in step.items():
                expected[name] += -math.expm1(2 * math.log(0.9)) * (value.double() - expected[name])
        average = {name: found["average"][name] for name in expected}
        assert tiny.difference(expected, average) < 1e-6
        for place in ("exported", "checkpoint-4/ema"):
            loaded = BertForSequenceClassification.from_pretrained(folder / "callback" / place)
            assert tiny.same_bits(tiny.parameters(loaded), average)
        assert torch.allclose(found["labels"], found["averaged"], atol=1e-6)
        student = BertForSequenceClassification.from_pretrained(folder / "callback" / "checkpoint-4")
        assert tiny.same_bits(tiny.parameters(student), found["weights"][-1])


@pytest.mark.slow
def test_the_callback_stops_both_for_a_weight_that_is_not_finite_on_one(more: Launched) -> None:
    for rank in more[1]:
        assert rank["callback"]["spoilt"].startswith(
            "FloatingPointError: 'bert.pooler.dense.bias' is not finite after optimizer step 1"
        )


@pytest.mark.slow
def test_the_collator_labels_on_processes_that_meet_unlabelled_rows_at_other_batches(more: Launched) -> None:
    counts = []
    for rank in more[1]:
        found = rank["collator"]
        assert found["finite"]
        assert tiny.same_bits(found["teacher"], {name: found["average"][name] for name in found["teacher"]})
        counts.append(sum(number for reason, number in found["counts"].items() if reason != "stand_in"))
    assert tiny.same_bits(more[1][0]["collator"]["average"], more[1][1]["collator"]["average"])
    assert sum(counts) > 0 and counts[0] != counts[1]


@pytest.mark.slow
def test_accelerates_plugin_trains_saves_and_resumes_shards(tmp_path: Path) -> None:
    """The way of GPUs, on this CPU: DCP checkpoints of model and optimizer beside the gathered average."""
    folder = tmp_path / "two"
    folder.mkdir()
    launch.on_two_processes(sharded_processes.__file__, str(folder), "plugin")
    ranks = launch.results(folder)
    alone = sharded_processes.split(tmp_path / "one", tiny.bert(), "bert", 48)
    alone.train()
    for rank in ranks:
        assert rank["fsdp2"] and rank["shards"] == len(list(alone.model.parameters()))
        close(rank["whole"], alone)
        assert len(rank["resumed"]["weights"]) == 2
        for key in ("gradients", "weights", "averages"):
            assert tiny.same_bits(rank["resumed"][key], rank["whole"][key][2:]), key
    shards = [path for path in (folder / "checkpoint-2").glob("*_0/*") if path.is_file()]
    assert {path.parent.name for path in shards} == {"pytorch_model_fsdp_0", "optimizer_0"} and len(shards) >= 6
    assert what_is_missing(folder / "checkpoint-2") == []
    for path in shards:
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        (found,) = what_is_missing(folder / "checkpoint-2")
        assert found.startswith(f"{path.parent.name}/{path.name} is damaged")
        path.write_bytes(data)
    loaded = BertForSequenceClassification.from_pretrained(folder / "checkpoint-2" / "ema")
    average = ranks[0]["whole"]["averages"][1]
    assert tiny.same_bits(tiny.parameters(loaded), {name: average[name] for name in tiny.parameters(loaded)})


@pytest.mark.slow
def test_weights_cast_as_they_are_gathered_are_averaged_as_they_are_kept(more: Launched) -> None:
    """`DistributedConfig(fsdp_mixed_precision=True)`: bfloat16 in the student's forward pass, float32 elsewhere."""
    labels: list[Any] = []
    for rank in more[1]:
        found = rank["cast"]
        assert found["output"] == "torch.bfloat16" and found["updates"] == 8
        mean = {name: value.double() for name, value in found["initial"].items()}
        for weights, average in zip(found["weights"], found["averages"], strict=True):
            for name, value in average.items():
                mean[name] = 0.5 * mean[name] + 0.5 * weights[name].double()
                assert value.dtype == weights[name].dtype == torch.float32
                assert (value - mean[name]).abs().max() < 1e-6, name
        assert tiny.difference(found["initial"], found["averages"][-1]) > 1e-3
        labels += found["found"]
    assert len(labels) == 30 and len({tuple(ids) for _, ids in labels}) > 10


def test_weights_tied_over_even_shards_are_averaged_once(launched: Launched) -> None:
    whole = sharded_processes.tied(22)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.25)  # halfway from 1 to 1.5
        expected = whole(input_ids=sharded_processes.LAST_TOKENS).logits
    for rank in launched[1]:
        assert rank["tied"]["names"] == ["transformer.wte.weight"]
        torch.testing.assert_close(rank["tied"]["said"], expected, rtol=0, atol=1e-5)


# ---- Refusals


@pytest.mark.parametrize("door", ["callback", "trainer"])
def test_weights_tied_over_uneven_shards_are_refused(launched: Launched, door: str) -> None:
    """Sharded at load time, one of their places would go on with the rows of the checkpoint on one process."""
    for rank in launched[1]:
        said = rank["tied"][door]
        assert said.startswith(
            "ValueError: transformer.wte.weight and lm_head.weight are one weight of 21 rows in 2 shards"
        )
        assert "pad_to_multiple_of=2" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resume", "NotImplementedError: a run whose model was sharded at load time (DistributedConfig) cannot be"),
        ("best", "NotImplementedError: load_best_model_at_end with a model sharded at load time"),
        ("tensor_parallel", "NotImplementedError: tp_size=2: only data parallelism is supported"),
        ("fp16", "NotImplementedError: fp16 with FSDP2"),
    ],
)
def test_what_does_not_work_in_shards_is_refused(launched: Launched, name: str, message: str) -> None:
    for rank in launched[1]:
        assert rank[name].startswith(message)


@pytest.mark.slow
def test_layer_drop_is_refused(more: Launched) -> None:
    for rank in more[1]:
        assert rank["layerdrop"].startswith("ValueError: layerdrop=0.1 (the model's configuration) under FSDP2")
