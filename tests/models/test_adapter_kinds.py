"""One table of the kinds of adapters that PEFT has: average, teacher, swap and files of each, or why not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import adapted
import pytest
import stock_runs
import tiny
import torch
from adapted import shake_, trained
from torch import Tensor, nn

from hf_ema_scaling.ema import (
    AverageStateError,
    DeadTeacherError,
    EMATeacher,
    WeightAverage,
    check_before_labelling,
    load_average,
    save_average,
)
from hf_ema_scaling.ema.adapter_storage import check_adapters
from hf_ema_scaling.training.callback import EMACallback

peft = pytest.importorskip("peft")
WORDS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
SOUND = {"input_values": torch.sin(torch.arange(256.0).view(2, 128) ** 1.5)}
RHO = 0.7
PROJECTIONS: dict[str, Any] = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True}),
    "rank-stabilised LoRA": ("LoraConfig", {"r": 2, "use_rslora": True}),
    "PiSSA, which changes the base": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
    "OLoRA, which changes the base": ("LoraConfig", {"r": 2, "init_lora_weights": "olora"}),
    "orthogonal": ("LoraConfig", {"r": 2, "init_lora_weights": "orthogonal"}),
    "all biases": ("LoraConfig", {"r": 2, "bias": "all"}),
    "biases of its layers": ("LoraConfig", {"r": 2, "bias": "lora_only"}),
    "biases of its own": ("LoraConfig", {"r": 2, "lora_bias": True}),
    "ranks by layer": ("LoraConfig", {"r": 2, "rank_pattern": {"query": 3}, "alpha_pattern": {"value": 7}}),
    "single tokens": ("LoraConfig", {"r": 2, "trainable_token_indices": [1, 3]}),
    "embeddings": ("LoraConfig", {"r": 2, "target_modules": ["word_embeddings", "query"]}),
    "parameters": ("LoraConfig", {"r": 2, "target_modules": [], "target_parameters": ["query.weight"]}),
    "all linear layers": ("LoraConfig", {"r": 2, "target_modules": "all-linear"}),
    "tokens alone": (
        "TrainableTokensConfig",
        {"token_indices": [1, 3], "target_modules": ["word_embeddings"], "modules_to_save": None},
    ),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 2}),
    "IA3": ("IA3Config", {"feedforward_modules": ["intermediate.dense"]}),
    "LoHa": ("LoHaConfig", {"r": 2}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "VeRA": ("VeraConfig", {"r": 2}),
    "VeRA without its projections": ("VeraConfig", {"r": 2, "save_projection": False}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 5}),
    "HRA": ("HRAConfig", {"r": 2}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2}),
    "RandLoRA": ("RandLoraConfig", {"r": 2}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "C3A": ("C3AConfig", {"block_size": 4}),
}


def make(kind: str, *, seed: int = 1) -> Any:
    """A model with random adapters, which for some kinds change what it computes from the start."""
    name, changes = KINDS[kind]
    targets = {**PROJECTIONS, **changes}
    targets = {key: value for key, value in targets.items() if key != "modules_to_save" or value is not None}
    if kind == "IA3":
        targets["target_modules"] = ["query", "value", "intermediate.dense"]
    base = tiny.bert()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, getattr(peft, name)(**targets)).eval()


def owned(average: WeightAverage) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in average.tensors().items() if name not in average.references}


def logits(model: Any, inputs: dict[str, Tensor] = WORDS) -> Tensor:
    result: Tensor = model(**inputs).logits.detach().clone()
    return result


def follow(
    model: Any, average: WeightAverage, teacher: EMATeacher, inputs: dict[str, Tensor], updates: int = 4
) -> None:
    """Moves student and average, and holds the average to the recursion in float64 and the teacher to the average."""
    mean: dict[str, Tensor] = {}
    gathered = 0.0
    for _ in range(updates):
        before = logits(teacher, inputs)
        shake_(model, 0.3)
        average.update(model, RHO)
        gathered = 1 - RHO * (1 - gathered)
        for name, parameter in trained(model).items():
            value = parameter.detach().double()
            old = mean.get(name, value)
            mean[name] = old + (1 - RHO) / gathered * (value - old)
        assert not torch.allclose(logits(teacher, inputs), before, atol=1e-5)
    assert mean
    for name, value in mean.items():
        torch.testing.assert_close(owned(average)[str(average.resolve(name))].double(), value, rtol=0, atol=1e-6)
    own, bits = logits(model, inputs), tiny.parameters(model)
    with average.swapped(model):
        swapped = logits(model, inputs)
    assert torch.equal(logits(model, inputs), own) and tiny.same_bits(tiny.parameters(model), bits)
    assert not torch.allclose(own, swapped, atol=1e-4)
    torch.testing.assert_close(logits(teacher, inputs), swapped, rtol=1e-5, atol=1e-6)
    check_before_labelling(model, average, teacher, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    average = WeightAverage(model)
    state = torch.get_rng_state()
    teacher = EMATeacher(model, average)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), teacher.module.named_parameters(), strict=True):
        assert (mine.data_ptr() == theirs.data_ptr()) == (not mine.requires_grad), name  # no second copy of the base
    follow(model, average, teacher, WORDS)

    check_adapters(model, average)
    save_average(tmp_path / "ema", model, average, state={"clock": 4})
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter").eval()
    with average.swapped(model):
        assert torch.equal(logits(loaded), logits(model))
    restored = WeightAverage(model)
    assert load_average(tmp_path / "ema", model, restored) == {"clock": 4}
    assert tiny.same_bits(owned(restored), owned(average)) and restored.gathered == average.gathered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["VeRA", "LoRA"])
def test_the_teacher_of_a_base_in_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """The average of adapters is in float32, the base the student's own: of two dtypes, with no autocast around."""
    name, changes = KINDS[kind]
    model = peft.get_peft_model(tiny.bert().to(dtype), getattr(peft, name)(**PROJECTIONS, **changes)).eval()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    before = logits(teacher)
    shake_(model, 0.3)
    average.update(model, RHO)
    assert not torch.allclose(before, logits(teacher), atol=0.1)
    with average.swapped(model):
        expected = logits(model).double()
    torch.testing.assert_close(logits(teacher).double(), expected, rtol=0, atol=0 if dtype == torch.float64 else 0.03)
    check_before_labelling(model, average, teacher, WORDS)
    for name, parameter in teacher.module.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained(model) and dtype == torch.bfloat16 else dtype), (
            name
        )


def test_convolutions(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["conv_layers.1.conv", "q_proj"]}
    model = peft.get_peft_model(tiny.wav2vec2(), peft.LoraConfig(**config)).eval()
    average = WeightAverage(model)
    assert any("conv.lora_A" in name for name in trained(model))
    follow(model, average, EMATeacher(model, average), SOUND)
    save_average(tmp_path / "ema", model, average, state={})
    loaded = peft.PeftModel.from_pretrained(tiny.wav2vec2(), tmp_path / "ema/adapter").eval()
    with average.swapped(model):
        assert torch.equal(logits(loaded, SOUND), logits(model, SOUND))


def test_of_two_adapters_the_active_one_is_taught_and_both_are_saved(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.bert(), peft.VeraConfig(r=2, target_modules=["query", "value"]))
    model.add_adapter("other", peft.VeraConfig(r=2, target_modules=["query", "value"]))
    model.set_adapter("other")
    average = WeightAverage(model.eval())
    assert all(".other" in name for name in trained(model)) and len(trained(model)) == 4
    follow(model, average, EMATeacher(model, average), WORDS)
    save_average(tmp_path / "ema", model, average, state={})
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter/other").eval()
    with average.swapped(model):
        assert torch.equal(logits(loaded), logits(model))


def test_a_model_of_mixed_adapters(tmp_path: Path) -> None:
    def make_mixed() -> Any:
        made = peft.get_peft_model(tiny.bert(), peft.LoraConfig(r=2, target_modules=["query"]), mixed=True)
        made.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["value"]))
        made.set_adapter(["default", "other"])
        return made.eval()

    model = make_mixed()
    average = WeightAverage(model)
    assert {name.split(".")[-1] for name in owned(average)} == {"weight", "other"}  # LoRA's and LoHa's
    follow(model, average, EMATeacher(model, average), WORDS)
    save_average(tmp_path / "ema", model, average, state={})
    loaded = peft.PeftMixedModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter/default")
    loaded.load_adapter(tmp_path / "ema/adapter/other", "other")
    loaded.set_adapter(["default", "other"])
    loaded.eval()
    with average.swapped(model):
        assert torch.equal(logits(loaded), logits(model))


def test_ranks_that_adalora_has_given_up_are_in_the_average_still(tmp_path: Path) -> None:
    """PEFT leaves them out of the student's file, and changes the configuration as it does."""
    model = make("AdaLoRA")
    average = WeightAverage(model)
    for _ in range(3):
        shake_(model, 0.3)
        average.update(model, RHO)
    key = "bert.encoder.layer.0.attention.self.{}.lora_E.default"
    pattern = {key.format("query"): [True, False, True], key.format("value"): [True, True, False]}
    config = model.peft_config["default"]
    config.rank_pattern = dict(pattern)
    given_up = average.tensors()[f"base_model.model.{key.format('query')}"][1].clone()
    assert given_up.abs().item() > 0
    save_average(tmp_path / "ema", model, average, state={})
    assert config.rank_pattern == pattern
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter").eval()
    assert torch.equal(loaded.get_parameter(f"base_model.model.{key.format('query')}")[1], given_up)
    with average.swapped(model):
        assert torch.equal(logits(loaded), logits(model))
    restored = WeightAverage(model)
    load_average(tmp_path / "ema", model, restored)
    assert tiny.same_bits(owned(restored), owned(average))


def test_an_average_for_other_places_in_the_weights_is_refused(tmp_path: Path) -> None:
    model = make("SHiRA")
    average = WeightAverage(model)
    save_average(tmp_path / "ema", model, average, state={})
    other = peft.get_peft_model(tiny.bert(), peft.ShiraConfig(r=2, random_seed=5, **PROJECTIONS))
    with pytest.raises(AverageStateError, match=r"query\.shira_indices in .* is not that of the model's adapter"):
        load_average(tmp_path / "ema", other, WeightAverage(other))


# ---- What is refused


@pytest.mark.parametrize("scheme", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_change_of_the_base_that_loading_does_not_repeat_is_refused_before_training(
    tmp_path: Path, scheme: str
) -> None:
    model = make("LoRA")
    model.peft_config["default"].init_lora_weights = scheme
    average = WeightAverage(model)
    with pytest.raises(NotImplementedError, match=rf"'{scheme}' of adapter 'default' changed the base's weights"):
        check_adapters(model, average)
    args: Any = {"max_steps": 2, "logging_strategy": "no"}
    with pytest.raises(NotImplementedError, match="Use 'pissa' or 'olora'"):
        tiny.trainer(model, tiny.arguments(tmp_path, **args), tiny.sentences(8)).train()
    model.peft_config["default"].init_lora_weights = True  # the way out that the message names
    check_adapters(model, average)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_tokens_are_refused_before_training(tmp_path: Path, config: str) -> None:
    changes = {"encoder_hidden_size": 8} if config == "PromptEncoderConfig" else {}
    made = getattr(peft, config)(task_type="SEQ_CLS", num_virtual_tokens=2, **changes)
    model = peft.get_peft_model(tiny.bert(), made)
    with pytest.raises(NotImplementedError, match="learns tokens and not layers"):
        tiny.trainer(model, tiny.arguments(tmp_path, max_steps=2), tiny.sentences(8)).train()


def test_the_callback_refuses_tokens_where_they_would_be_saved(tmp_path: Path) -> None:
    def run(**changes: Any) -> tuple[EMACallback, stock_runs.Recorder]:
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
        average = stock_runs.callback()
        seen = stock_runs.Recorder(average)
        model = peft.get_peft_model(stock_runs.bert(), config)
        stock_runs.trainer(average, tmp_path, seen, model=model, max_steps=3, **changes).train()
        return average, seen

    with pytest.raises(NotImplementedError, match="learns tokens and not layers"):
        run(save_strategy="steps", save_steps=3)
    average, seen = run()
    name = next(name for name in seen.student[0] if "prompt" in name)
    weights = [step[name].double() for step in seen.student]
    expected = sum(stock_runs.RHO ** (2 - i) * 0.1 * w for i, w in enumerate(weights)) / (1 - stock_runs.RHO**3)
    torch.testing.assert_close(average.average.tensors()[name].double(), expected, rtol=0, atol=1e-6)


def test_an_adapter_that_projects_its_weights_as_it_computes_cannot_teach() -> None:
    """Constrained OFT overwrites its parameters in every forward pass, in eval mode too."""
    config = peft.OFTConfig(r=0, oft_block_size=4, coft=True, **PROJECTIONS)
    model = peft.get_peft_model(tiny.bert(), config).eval()
    average = WeightAverage(model)
    shake_(model)
    average.update(model, RHO)
    before = {name: tensor.clone() for name, tensor in owned(average).items()}
    with pytest.raises(DeadTeacherError, match=r"writes to its own weights \('.*oft_R.*', 2 in all\).*coft=False"):
        check_before_labelling(model, average, EMATeacher(model, average), WORDS)
    assert tiny.same_bits(owned(average), before)


def test_what_peft_cannot_make_without_weights_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("BOFT")
    average = WeightAverage(model)

    def no(*args: Any, **changes: Any) -> nn.Module:
        raise KeyError(4)

    monkeypatch.setattr(peft.PeftModelForSequenceClassification, "__init__", no)
    monkeypatch.setattr(peft.PeftModel, "__init__", no)
    with pytest.raises(NotImplementedError, match=r"kind BOFT for the teacher before it has weights.*`factory=`"):
        EMATeacher(model, average)
    monkeypatch.undo()
    shake_(model)
    average.update(model, RHO)
    teacher = EMATeacher(model, average, factory=functools.partial(make, "BOFT"))
    torch.testing.assert_close(logits(teacher), logits(model), rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_is_refused_until_it_is_taken_out() -> None:
    """What is merged stays in the base that student, average and teacher share."""
    model = make("LoRA")
    average = WeightAverage(model)
    shake_(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"the adapter 'default' is merged into .*unmerge_adapter"):
        EMATeacher(model, average)
    with pytest.raises(RuntimeError, match="Cannot swap weights in"), average.swapped(model):
        pass
    average.update(model, RHO)  # of the adapter's own tensors
    model.unmerge_adapter()
    with average.swapped(model):
        expected = logits(model)
    torch.testing.assert_close(logits(EMATeacher(model, average)), expected, rtol=1e-5, atol=1e-6)


def test_adapters_that_transformers_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model: Any = tiny.bert().eval()
    model.add_adapter(peft.FourierFTConfig(n_frequency=5, **PROJECTIONS), "lora")
    average = WeightAverage(model)
    follow(model, average, EMATeacher(model, average), WORDS)
    assert adapted.trained(model)
