from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ParakeetCTCConfig,
    ParakeetForCTC,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_ema_scaling.ema import (
    DeadTeacherError,
    EMATeacher,
    WeightAverage,
    check_liveness,
    check_moved,
)


def wav2vec2() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = Wav2Vec2Config(
        vocab_size=7, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(4, 4), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_length=2,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 400)}


def parakeet() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    encoder = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_mel_bins=8,
        subsampling_conv_channels=4, conv_kernel_size=3, subsampling_factor=4,
    )  # fmt: skip
    config = ParakeetCTCConfig(vocab_size=7, encoder_config=encoder, pad_token_id=6)
    return ParakeetForCTC(config), {"input_features": torch.randn(2, 32, 8)}


def bert() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )  # fmt: skip
    return BertForMaskedLM(config), {"input_ids": torch.tensor([[1, 2, 3]])}


def llama() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.tensor([[1, 2, 3]])}


MODELS = [wav2vec2, parakeet, bert, llama]
Maker = Callable[[], tuple[PreTrainedModel, dict[str, Tensor]]]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def step_(model: nn.Module) -> None:
    """Stands for an optimizer step: every trainable parameter and floating running statistic moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))


@pytest.mark.parametrize("make", MODELS)
def test_teacher_shares_the_storage_and_follows(make: Maker) -> None:
    model, inputs = make()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    pointers = {average.resolve(n): t.data_ptr() for n, t in teacher.module.state_dict().items()}
    assert pointers == {name: tensor.data_ptr() for name, tensor in average.tensors().items()}
    for _ in range(2):
        previous = teacher(**inputs).logits
        step_(model)
        average.update(model, 0.5)
        assert not torch.equal(teacher(**inputs).logits, previous)
        with average.swapped(model):
            model.eval()
            expected = model(**inputs).logits.detach().clone()
            model.train()
        # Parameters that do not require gradients may take another kernel for the same product.
        torch.testing.assert_close(teacher(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(teacher(**inputs).logits, teacher(**inputs).logits)
    assert not teacher(**inputs).logits.requires_grad and not teacher(**inputs).logits.is_inference()
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert teacher.device == torch.device("cpu")


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_creating_a_teacher_touches_nothing(make: Maker, dtype: torch.dtype) -> None:
    model = make()[0].to(dtype).train()
    model.config.use_cache = False
    average = WeightAverage(model)
    before, state, config = bits(model), torch.get_rng_state(), copy.deepcopy(model.config)
    objects = [id(parameter) for parameter in model.parameters()]
    teacher = EMATeacher(model, average)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == model.config.to_dict() and model.training
    assert [id(parameter) for parameter in model.parameters()] == objects
    for name, tensor in bits(model).items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name
    held = bits(teacher.module)
    assert held.keys() == before.keys()
    for name, tensor in held.items():
        assert tensor.dtype == (torch.float32 if before[name].is_floating_point() else before[name].dtype)
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert teacher.config.dtype == torch.float32 and teacher.config is not model.config


def test_generation_keeps_its_cache() -> None:
    model, inputs = llama()
    model.config.use_cache = False  # as Trainer does
    model.generation_config.max_new_tokens = 2
    teacher = EMATeacher(model, WeightAverage(model))
    assert teacher.config.use_cache is True and model.config.use_cache is False
    assert teacher.module.generation_config.max_new_tokens == 2
    assert teacher.module.generation_config is not model.generation_config
    assert teacher(**inputs).past_key_values is not None
    assert teacher.module.generate(**inputs, do_sample=False).shape == (1, 5)


def test_tied_weights_stay_one_object() -> None:
    model, _ = bert()
    teacher = EMATeacher(model, WeightAverage(model))
    assert teacher.module.cls.predictions.decoder.weight is teacher.module.bert.embeddings.word_embeddings.weight


def test_training_mode_is_refused() -> None:
    model, inputs = bert()
    teacher = EMATeacher(model, WeightAverage(model))
    teacher.module.bert.encoder.train()
    with pytest.raises(DeadTeacherError, match=r"'bert\.encoder' is in training mode"):
        teacher(**inputs)


def test_plain_modules_need_a_factory() -> None:
    model = nn.LSTM(3, 4)
    average = WeightAverage(model)
    with pytest.raises(TypeError, match=r"LSTM is not a transformers model.*factory="):
        EMATeacher(model, average)
    with pytest.raises(ValueError, match="shares no tensors"):
        EMATeacher(model, average, factory=lambda: model)
    with pytest.raises(ValueError, match=r"does not fit the average.*\(16, 2\)"):
        EMATeacher(model, average, factory=lambda: nn.LSTM(2, 4))
    state = torch.get_rng_state()
    teacher = EMATeacher(model, average, factory=lambda: nn.LSTM(3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(teacher(x)[0], model(x)[0].detach())
    step_(model)
    average.update(model, 0.0)
    # Recurrent layers keep a second list of their weights: it must be shared too.
    torch.testing.assert_close(teacher(x)[0], model(x)[0].detach())


def test_reallocated_shadow_is_shared_again() -> None:
    model, inputs = wav2vec2()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    first = teacher(**inputs).logits
    average._shadow["lm_head.bias"] = average._shadow["lm_head.bias"] + 1.0  # what a change of device does
    average.storage_version += 1
    torch.testing.assert_close(teacher(**inputs).logits, first + 1.0)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liveness_passes_and_restores_every_bit(make: Maker, dtype: torch.dtype) -> None:
    model, inputs = make()
    model.to(dtype)
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    step_(model)
    average.update(model, 0.9)
    before, shadow, state = bits(model), bits(teacher.module), torch.get_rng_state()
    check_liveness(model, average, teacher, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert all(torch.equal(tensor, shadow[name]) for name, tensor in bits(teacher.module).items())
    assert torch.equal(torch.get_rng_state(), state) and average.num_updates == 1


class NoOpAverage(WeightAverage):
    """The mutant: an average that never moves, as several published teachers do not."""

    def blend(self, model: nn.Module, weight: float) -> None:
        self.num_updates += 1


@pytest.mark.parametrize("make", MODELS)
def test_liveness_catches_an_average_that_does_nothing(make: Maker) -> None:
    model, inputs = make()
    average = NoOpAverage(model)
    teacher = EMATeacher(model, average)
    before = bits(model)
    with pytest.raises(DeadTeacherError, match="did not change"):
        check_liveness(model, average, teacher, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert average.num_updates == 0


def test_liveness_catches_a_teacher_of_another_average() -> None:
    model, inputs = bert()
    average = WeightAverage(model)
    with pytest.raises(DeadTeacherError, match="did not change"):
        check_liveness(model, average, EMATeacher(model, WeightAverage(model)), inputs)
    teacher = EMATeacher(model, average)
    model.requires_grad_(False)
    with pytest.raises(DeadTeacherError, match="no trainable"):
        check_liveness(model, average, teacher, inputs)


def test_nan_outputs_do_not_count_as_change() -> None:
    model, inputs = bert()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(float("nan"))
    average = NoOpAverage(model)
    with pytest.raises(DeadTeacherError, match="did not change"):
        check_liveness(model, average, EMATeacher(model, average), inputs)


def test_average_must_move_and_differ_from_the_student() -> None:
    model, _ = bert()
    average, mutant = WeightAverage(model), NoOpAverage(model)
    first = average.fingerprint()
    for _ in range(3):
        step_(model)
        average.update(model, 0.999)
        mutant.update(model, 0.999)
    check_moved(model, average, first)
    with pytest.raises(DeadTeacherError, match="not moved by one bit after 3 updates"):
        check_moved(model, mutant, first)
    average.update(model, 0.0)
    with pytest.raises(DeadTeacherError, match="equals the student"):
        check_moved(model, average, first)
