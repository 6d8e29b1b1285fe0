from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ParakeetCTCConfig,
    ParakeetForCTC,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_ema_scaling.ema import AverageStateError, EMATeacher, WeightAverage, load_average, save_average, storage
from hf_ema_scaling.ema.durable import sealed_json
from hf_ema_scaling.ema.storage import check_average


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


MODELS = [wav2vec2, parakeet, bert]
Maker = Callable[[], tuple[PreTrainedModel, dict[str, Tensor]]]
STATE = {"clock": 12.5, "momentum": 0.999, "name": "run"}


def moved(model: nn.Module) -> WeightAverage:
    average = WeightAverage(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    average.update(model, 0.7)
    return average


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_from_pretrained(make: Maker, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = make()
    model.to(dtype)
    average = moved(model)
    teacher = EMATeacher(model, average)
    config, student = copy.deepcopy(model.config), {k: v.clone() for k, v in model.state_dict().items()}
    save_average(tmp_path / "run" / "ema", model, average, state=STATE)
    assert model.config.to_dict() == config.to_dict()
    assert_same_bits(dict(model.state_dict()), student)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ema"]
    record = json.loads((tmp_path / "run" / "ema" / "ema_state.json").read_text())
    assert (record["format_version"], record["num_updates"], record["buffers"]) == (1, 1, "average")
    assert record["state"] == STATE

    other = make()[0].to(dtype)
    restored = WeightAverage(other)
    rng = torch.get_rng_state()
    assert load_average(tmp_path / "run" / "ema", other, restored) == STATE
    assert torch.equal(torch.get_rng_state(), rng) and restored.num_updates == 1
    assert_same_bits(restored.tensors(), average.tensors())

    published = type(model).from_pretrained(tmp_path / "run" / "ema").eval().requires_grad_(False)
    assert {parameter.dtype for parameter in published.parameters()} == {torch.float32}
    if dtype == torch.float32:
        assert torch.equal(published(**inputs).logits, teacher(**inputs).logits)


def test_renamed_weights_are_found(tmp_path: Path) -> None:
    model, _ = wav2vec2()
    average = moved(model)
    save_average(tmp_path / "ema", model, average, state={})
    path = tmp_path / "ema" / "model.safetensors"
    tensors = load_file(path)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        renamed[name] = tensor
    assert any(name.endswith("weight_g") for name in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    restored = WeightAverage(wav2vec2()[0])
    load_average(tmp_path / "ema", model, restored)
    assert_same_bits(restored.tensors(), average.tensors())


def test_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = bert()
    average = moved(model)
    whole = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, *a, **k: whole(self, *a, max_shard_size=400, **k))
    save_average(tmp_path / "ema", model, average, state={})
    assert len(list((tmp_path / "ema").glob("model-*.safetensors"))) > 1
    restored = WeightAverage(bert()[0])
    load_average(tmp_path / "ema", model, restored)
    assert_same_bits(restored.tensors(), average.tensors())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.precise = nn.Parameter(torch.rand(2, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.rand(3), persistent=False)


def test_plain_module_round_trip(tmp_path: Path) -> None:
    model = Plain()
    average = moved(model)
    save_average(tmp_path / "ema", model, average, state=STATE)
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == ["ema_state.json", "model.safetensors"]
    assert_same_bits(load_file(tmp_path / "ema" / "model.safetensors"), average.tensors())
    other = Plain()
    restored = WeightAverage(other)
    other.table = torch.ones(3)
    assert load_average(tmp_path / "ema", other, restored) == STATE
    assert_same_bits(restored.tensors(), average.tensors())
    assert torch.equal(restored._shadow["table"], torch.ones(3))


def test_a_second_save_replaces_the_first_and_a_failed_one_does_not(tmp_path: Path) -> None:
    model = Plain()
    average = moved(model)
    save_average(tmp_path / "ema", model, average, state={"n": 1})
    average.update(model, 0.5)
    with pytest.raises(ValueError, match="JSON compliant"):
        save_average(tmp_path / "ema", model, average, state={"n": float("nan")})

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_average(tmp_path / "ema", model, average, state={"n": 2}, processing_class=Broken())
    restored = WeightAverage(Plain())
    assert load_average(tmp_path / "ema", model, restored) == {"n": 1}
    (tmp_path / ".ema.partial").mkdir()  # what a killed process leaves behind
    save_average(tmp_path / "ema", model, average, state={"n": 3})
    assert load_average(tmp_path / "ema", model, restored) == {"n": 3} and restored.num_updates == 2
    assert_same_bits(restored.tensors(), average.tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_a_replacement_that_ends_between_its_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Plain()
    average = moved(model)
    save_average(tmp_path / "ema", model, average, state={"n": 1})
    expected = {name: tensor.clone() for name, tensor in average.tensors().items()}
    average.update(model, 0.5)
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".ema.partial":
            raise OSError("no second rename")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no second rename"):
            save_average(tmp_path / "ema", model, average, state={"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]
    # Where the process was killed there, nobody has put the folder back yet.
    for read in (check_average, lambda folder: load_average(folder, model, WeightAverage(model))):
        (tmp_path / "ema").rename(tmp_path / ".ema.old")
        assert read(tmp_path / "ema") == {"n": 1}
    (tmp_path / "ema").rename(tmp_path / ".ema.old")

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_average(tmp_path / "ema", model, average, state={"n": 2}, processing_class=Broken())
    restored = WeightAverage(Plain())
    assert load_average(tmp_path / "ema", model, restored) == {"n": 1}
    assert_same_bits(restored.tensors(), expected)


def break_flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def break_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def break_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    # For BERT a LayerNorm weight of ones, exactly what a fresh initialisation would put in its place.
    tensors.pop(next(name for name in sorted(tensors) if name.lower().endswith("norm.weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def break_json(folder: Path) -> None:
    (folder / "ema_state.json").write_text("{")


def break_version(folder: Path) -> None:
    record = json.loads((folder / "ema_state.json").read_text())
    (folder / "ema_state.json").write_text(json.dumps({**record, "format_version": 99}))


def break_values(folder: Path) -> None:
    record = json.loads((folder / "ema_state.json").read_text())
    (folder / "ema_state.json").write_text(json.dumps({**record, "num_updates": "many"}))


def break_digit(folder: Path) -> None:
    path = folder / "ema_state.json"
    path.write_text(path.read_text().replace('"num_updates": 0', '"num_updates": 4'))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_json(folder: Path) -> None:
    (folder / "ema_state.json").unlink()


def replace_json(folder: Path) -> None:
    remove_json(folder)
    (folder / "ema_state.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_flip, "crc32"),
        (break_truncate, r"model\.safetensors is not readable"),
        (break_tensor, r"(?i)lacks? .*norm\.weight"),
        (break_json, r"ema_state\.json is not readable"),
        (break_version, "format version 99"),
        (break_digit, r"ema_state\.json is not as it was written \(its CRC-32 is"),
        (replace_json, r"ema_state\.json is not readable \(IsADirectoryError"),
        (break_values, "wrong values for num_updates"),
        (remove_weights, r"model\.safetensors is missing"),
        (remove_json, r"ema_state\.json is missing"),
    ],
)
@pytest.mark.parametrize("make", [lambda: bert()[0], Plain])
def test_damage_is_refused(
    make: Callable[[], nn.Module], damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    model = make()
    save_average(tmp_path / "ema", model, WeightAverage(model), state={})
    damage(tmp_path / "ema")
    restored = WeightAverage(model)
    before = {name: tensor.clone() for name, tensor in restored.tensors().items()}
    with pytest.raises(AverageStateError, match=message) as caught:
        load_average(tmp_path / "ema", model, restored)
    assert str(tmp_path / "ema") in str(caught.value)
    assert_same_bits(restored.tensors(), before)
    assert restored.num_updates == 0
    if damage is not break_tensor:  # a tensor may be stored by another name
        with pytest.raises(AverageStateError, match=message):
            check_average(tmp_path / "ema")


def test_no_flipped_bit_of_the_record_is_believed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_average(tmp_path / "ema", model, moved(model), state={"clock": 12.5, "units_seen": 800, "name": "a\u00e9"})
    path = tmp_path / "ema" / "ema_state.json"
    whole = path.read_bytes()
    written = json.loads(whole)
    believed = []
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                check_average(tmp_path / "ema")
            except AverageStateError:
                continue
            record = json.loads(flipped)
            if any(record.get(name) != value for name, value in written.items() if name != "own_crc32"):
                believed.append(bytes(flipped[max(0, place - 20) : place + 20]))
    assert believed == []


def test_a_record_of_an_older_version_has_no_checksum(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = moved(model)
    save_average(tmp_path / "ema", model, average, state=STATE)
    path = tmp_path / "ema" / "ema_state.json"
    record = json.loads(path.read_text())
    assert len(record.pop("own_crc32")) == 8
    path.write_text(json.dumps(record))
    restored = WeightAverage(nn.Linear(2, 2))
    assert load_average(tmp_path / "ema", model, restored) == STATE and restored.num_updates == 1
    # Written anew by hand, as what is meant to be changed, it is believed again.
    path.write_text(sealed_json(record | {"num_updates": 7}))
    load_average(tmp_path / "ema", model, restored)
    assert restored.num_updates == 7


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    save_average(tmp_path / "ema", model, moved(model), state={})

    def refused(path: Path) -> dict[str, Tensor]:
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors says of a file without rights

    monkeypatch.setattr(storage, "load_file", refused)
    with pytest.raises(AverageStateError, match=r"model\.safetensors is not readable: permission denied\?"):
        load_average(tmp_path / "ema", model, WeightAverage(model))


def test_wrong_folder_policy_or_model_is_refused(tmp_path: Path) -> None:
    model = Plain()
    save_average(tmp_path / "ema", model, moved(model), state={})
    with pytest.raises(AverageStateError, match="no saved average at"):
        load_average(tmp_path / "nothing", model, WeightAverage(model))
    with pytest.raises(AverageStateError, match="buffers='average', this run has 'copy'"):
        load_average(tmp_path / "ema", model, WeightAverage(model, buffers="copy"))
    other = nn.Linear(2, 2)
    with pytest.raises(AverageStateError):
        load_average(tmp_path / "ema", other, WeightAverage(other))


def test_processing_class_is_saved_along(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    model, _ = wav2vec2()
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    save_average(tmp_path / "ema", model, moved(model), state={}, processing_class=extractor)
    assert Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "ema").sampling_rate == 8000
