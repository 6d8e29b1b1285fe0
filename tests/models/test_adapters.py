"""Averages of models with PEFT adapters: what is averaged, by which weights, and as what it is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import adapted
import pytest
import tiny
import torch
from adapted import KINDS, delta, lora_bert, shake_, trained
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ema_scaling.ema import (
    AverageStateError,
    EMATeacher,
    WeightAverage,
    check_liveness,
    load_average,
    save_average,
)
from hf_ema_scaling.ema.adapters import debiased, has_adapters

peft = pytest.importorskip("peft")
INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def owned(average: WeightAverage) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in average.tensors().items() if name not in average.references}


# ---- Which weights


@pytest.mark.parametrize("updates", [1, 10, 20, 50])
def test_the_delta_of_a_constant_student_is_the_students_from_the_first_update(updates: int) -> None:
    """Averages that start from zero factors have 0.3, 16, 41 and 85 % of it here."""
    model = lora_bert()
    average = WeightAverage(model)
    shake_(model, 1.0)  # away from B = 0
    target = delta(trained(model))
    for _ in range(updates):
        average.update(model, 0.95)
    torch.testing.assert_close(delta(average.tensors()), target, rtol=1e-5, atol=0)
    uncorrected = (1 - 0.95**updates) ** 2
    assert uncorrected == pytest.approx({1: 0.0025, 10: 0.161, 20: 0.412, 50: 0.852}[updates], rel=3e-3)


def test_the_average_is_the_mean_of_the_students_seen_and_has_nothing_of_the_start() -> None:
    rho, kappas = 0.9, [1.0, 4.0, 0.5, 2.5]
    model = lora_bert()
    average = WeightAverage(model)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    for kappa in kappas:
        shake_(model, 1.0)
        average.update(model, rho, kappa)
        for name, p in trained(model).items():
            total[name] = rho**kappa * total[name] + (1 - rho**kappa) * p.detach().double()
    gathered = 1 - rho ** sum(kappas)
    assert average.gathered == pytest.approx(gathered, rel=1e-12)
    for name in total:
        torch.testing.assert_close(average.tensors()[name].double(), total[name] / gathered, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kappas", [[1.0] * 8, [0.3, 1.2, 2.5, 4.0], [8.0]])
def test_any_partition_of_the_same_data_agrees(kappas: list[float]) -> None:
    """A student that stands at one point for 5 reference steps and at another for `sum(kappas)`."""
    model = lora_bert()
    average = WeightAverage(model)
    shake_(model, 1.0)
    first = {name: p.detach().double().clone() for name, p in trained(model).items()}
    average.update(model, 0.9, 5.0)
    shake_(model, 1.0)
    for kappa in kappas:
        average.update(model, 0.9, kappa)
    share = (0.9**8 - 0.9**13) / (1 - 0.9**13)
    for name, p in trained(model).items():
        expected = share * first[name] + (1 - share) * p.detach().double()
        torch.testing.assert_close(average.tensors()[name].double(), expected, rtol=0, atol=1e-6)


def test_the_correction_has_an_end() -> None:
    weight, gathered = 1.0, 0.0
    for _ in range(1000):
        weight, gathered = debiased(0.05, gathered)
    assert (weight, gathered) == pytest.approx((0.05, 1.0), rel=1e-14)
    assert debiased(1.0, 0.3) == (1.0, 1.0)  # before ema_start: equal to the student, and nothing to correct later
    assert debiased(0.0, 0.0) == (0.0, 0.0)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            debiased(wrong, 0.5)
    weight, gathered = debiased(-math.expm1(1e-9 * math.log(0.9999)), 0.0)
    assert weight == 1.0 and gathered == pytest.approx(1.00005e-13, rel=1e-4)


def test_full_models_keep_their_start() -> None:
    model = tiny.bert()
    average = WeightAverage(model)
    start = model.classifier.weight.detach().clone()
    shake_(model)
    average.update(model, 0.9)
    assert average.gathered is None and not has_adapters(model)
    expected = 0.9 * start + 0.1 * model.classifier.weight.detach()
    torch.testing.assert_close(average.tensors()["classifier.weight"], expected)


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_the_merged_delta_is_that_of_the_mean_factors(scale: float) -> None:
    """mean(B A) - mean(B) mean(A) = mean((B - mean B)(A - mean A)): second order in how far the factors move."""
    rho, steps = 0.9, 30
    model = lora_bert()
    shake_(model, 1.0)
    average = WeightAverage(model)
    seen = []
    for _ in range(steps):
        shake_(model, scale)
        average.update(model, rho)
        seen.append({name: p.detach().double().clone() for name, p in trained(model).items()})
    weights = [(1 - rho) * rho ** (steps - 1 - i) / (1 - rho**steps) for i in range(steps)]
    merged = delta(average.tensors())
    mean_delta = sum(w * delta(tensors) for w, tensors in zip(weights, seen, strict=True))
    apart = [{name: t - average.tensors()[name].double() for name, t in tensors.items()} for tensors in seen]
    covariance = sum(w * delta(tensors) for w, tensors in zip(weights, apart, strict=True))
    torch.testing.assert_close(mean_delta - merged, covariance, rtol=0, atol=1e-4 * scale)
    assert 0.1 * scale**2 < float(covariance.norm()) < 200 * scale**2
    if scale == 0.02:
        assert float(covariance.norm()) < 0.01 * float(merged.norm())


# ---- What is averaged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_the_students_own_and_costs_nothing(kind: str, dtype: torch.dtype) -> None:
    model = adapted.adapt(tiny.bert().to(dtype), kind)
    average = WeightAverage(model)
    for name, parameter in model.named_parameters():
        shadow = average.tensors()[name]
        assert (shadow.data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
        assert shadow.dtype == (torch.float32 if parameter.requires_grad else dtype)
    assert sum(t.numel() for t in owned(average).values()) == sum(p.numel() for p in trained(model).values())
    assert set(owned(average)) == set(trained(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        shake_(model)
        average.update(model, 0.9)
    with average.swapped(model):
        for name, parameter in trained(model).items():
            assert torch.equal(parameter, average.tensors()[name].to(parameter.dtype))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(model))
    # Only what is averaged counts, or a large base would make every distance small.
    parts = [(p.detach().float() - average.tensors()[name], p.detach().float()) for name, p in trained(model).items()]
    sizes = [sum(float(t.square().sum()) for t in side) for side in zip(*parts, strict=True)]
    assert average.distance(model) == pytest.approx((sizes[0] / sizes[1]) ** 0.5, rel=1e-4)
    assert len(average.fingerprint()) == len(trained(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_shares_the_base_and_has_adapters_of_its_own(kind: str) -> None:
    model = lora_bert(kind)
    before, state = tiny.parameters(model), torch.get_rng_state()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    assert torch.equal(torch.get_rng_state(), state) and tiny.same_bits(tiny.parameters(model), before)
    mine, theirs = dict(model.named_parameters()), dict(teacher.module.named_parameters())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name].data_ptr() == theirs[name].data_ptr()) == (not mine[name].requires_grad), name
        assert not theirs[name].requires_grad
    model.eval()
    for momentum in (0.5, 0.5, 0.5):
        shake_(model, 1.0)
        student = model(**INPUTS).logits.detach()
        previous = teacher(**INPUTS).logits
        average.update(model, momentum)
        with average.swapped(model):
            expected = model(**INPUTS).logits.detach().clone()
        labels = teacher(**INPUTS).logits
        torch.testing.assert_close(labels, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(labels, previous)
    assert not torch.allclose(labels, student, atol=1e-3)  # the average, and no longer the student itself
    updates, gathered = average.num_updates, average.gathered
    check_liveness(model, average, teacher, INPUTS)
    assert torch.equal(teacher(**INPUTS).logits, labels)
    assert (average.num_updates, average.gathered) == (updates, gathered)


def test_a_second_adapter_that_is_not_trained_is_left_out() -> None:
    model = lora_bert(modules_to_save=None)
    model.add_adapter("other", adapted.config(modules_to_save=None))
    average = WeightAverage(model)
    assert all(".default" in name for name in owned(average)) and len(owned(average)) == 4
    teacher = EMATeacher(model, average)
    assert teacher.module.active_adapter == model.active_adapter == "default"
    shake_(model)
    average.update(model, 0.9)
    torch.testing.assert_close(teacher(**INPUTS).logits, model.eval()(**INPUTS).logits.detach())


def test_adapters_of_tokens_are_refused_with_the_reason() -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.bert(), config)
    average = WeightAverage(model)
    with pytest.raises(NotImplementedError, match=r"PROMPT_TUNING learns tokens"):
        EMATeacher(model, average)
    with pytest.raises(NotImplementedError, match="path-corrected update"):
        average.lead(model, 0.1)


# ---- Files


def moved(kind: str, **changes: object) -> tuple[nn.Module, WeightAverage]:
    model = lora_bert(kind, **changes)
    average = WeightAverage(model)
    for _ in range(3):
        shake_(model, 0.5)
        average.update(model, 0.9)
    return model.eval(), average


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_saved_as_an_adapter_that_peft_loads_over_the_base(tmp_path: Path, kind: str, dora: bool) -> None:
    model, average = moved(kind, use_dora=dora)
    save_average(tmp_path / "ema", model, average, state={"clock": 3})
    files = sorted(path.name for path in (tmp_path / "ema").rglob("*") if path.is_file())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "ema_state.json"]
    assert sum(path.stat().st_size for path in (tmp_path / "ema").rglob("*.safetensors")) < 4096  # without the base
    # Trainer loads the adapters in folders directly below a checkpoint into the student.
    assert not (tmp_path / "ema/adapter_model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter").eval()
    with average.swapped(model):
        assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)
    assert (
        loaded.peft_config["default"].inference_mode
        and not model.peft_config["default" if kind == "get_peft_model" else "lora"].inference_mode
    )

    fresh = lora_bert(kind, seed=5, use_dora=dora)
    other = WeightAverage(fresh)
    assert load_average(tmp_path / "ema", fresh, other) == {"clock": 3}
    assert tiny.same_bits(owned(other), owned(average))
    assert (other.num_updates, other.gathered) == (3, average.gathered)
    assert tiny.same_bits(
        {n: p.detach() for n, p in fresh.named_parameters() if not p.requires_grad},
        {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad},
    )


def test_biases_that_are_trained_along_belong_to_the_adapter(tmp_path: Path) -> None:
    model, average = moved("get_peft_model", bias="all")
    assert any(name.endswith("LayerNorm.bias") for name in owned(average))
    save_average(tmp_path / "ema", model, average, state={})
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter").eval()
    fresh = lora_bert(seed=5, bias="all")
    other = WeightAverage(fresh)
    load_average(tmp_path / "ema", fresh, other)
    assert tiny.same_bits(owned(other), owned(average))
    expected = EMATeacher(model, average)(**INPUTS).logits
    torch.testing.assert_close(loaded(**INPUTS).logits.detach(), expected)


def test_the_teacher_of_a_causal_model_generates(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_key_value_heads=1,
    )  # fmt: skip
    model = adapted.adapt(
        LlamaForCausalLM(config),
        "get_peft_model",
        target_modules=["q_proj"],
        modules_to_save=None,
        task_type="CAUSAL_LM",
    )
    model.get_base_model().generation_config.max_new_tokens = 3
    model.config.use_cache = False  # as Trainer does
    average = WeightAverage(model)
    shake_(model, 1.0)
    average.update(model, 0.9)
    teacher = EMATeacher(model, average)
    ids = torch.tensor([[1, 2, 3]])
    generated = teacher.module.generate(input_ids=ids, do_sample=False)
    assert generated.shape == (1, 6) and teacher(input_ids=ids).past_key_values is not None
    assert torch.equal(generated, model.eval().generate(input_ids=ids, do_sample=False))


def test_several_adapters_have_folders_of_their_own(tmp_path: Path) -> None:
    model = lora_bert(modules_to_save=None)
    model.add_adapter("other", adapted.config(r=3, modules_to_save=None))
    average = WeightAverage(model)
    shake_(model)
    average.update(model, 0.9)
    save_average(tmp_path / "ema", model, average, state={})
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter/default").eval()
    torch.testing.assert_close(loaded(**INPUTS).logits, model.eval()(**INPUTS).logits)
    assert json.loads((tmp_path / "ema/adapter/other/adapter_config.json").read_text())["r"] == 3
    expected = {name: tensor.detach().clone() for name, tensor in average.tensors().items()}
    load_average(tmp_path / "ema", model, average)
    assert tiny.same_bits(average.tensors(), expected)


def test_running_statistics_beside_the_adapter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return adapted.adapt(
            tiny.parakeet(), "get_peft_model", target_modules=["q_proj", "v_proj"], modules_to_save=None
        )

    model = make()
    average = WeightAverage(model)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(1.0)
    average.update(model, 0.9)  # no correction: running statistics do not start from zero factors
    name = next(name for name in average.tensors() if name.endswith("running_mean"))
    torch.testing.assert_close(average.tensors()[name], torch.full((8,), 0.1))
    save_average(tmp_path / "ema", model, average, state={})
    fresh = make()
    other = WeightAverage(fresh)
    load_average(tmp_path / "ema", fresh, other)
    assert tiny.same_bits(dict(other.tensors()), dict(average.tensors()))


def test_what_no_adapter_holds_is_not_lost_in_silence(tmp_path: Path) -> None:
    model, average = moved("get_peft_model", modules_to_save=None)
    bias = model.get_parameter("base_model.model.classifier.bias")
    bias.requires_grad_(True)
    average.prepare(model)
    with pytest.raises(ValueError, match=r"classifier\.bias .*trained but belong to no adapter.*modules_to_save"):
        save_average(tmp_path / "ema", model, average, state={})


def test_damaged_adapters_say_so(tmp_path: Path) -> None:
    model, average = moved("get_peft_model")
    save_average(tmp_path / "ema", model, average, state={})
    path = tmp_path / "ema/adapter/adapter_model.safetensors"
    whole = path.read_bytes()
    before = {name: tensor.clone() for name, tensor in owned(average).items()}
    broken = bytearray(whole)
    broken[-1] ^= 1
    for content, message in ((bytes(broken), "ema_state.json says"), (whole[:50], "not readable"), (None, "missing")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(AverageStateError, match=message):
            load_average(tmp_path / "ema", model, average)
    assert tiny.same_bits(owned(average), before)
    path.write_bytes(whole)
    full = tiny.bert()
    with pytest.raises(AverageStateError):
        load_average(tmp_path / "ema", full, WeightAverage(full))
