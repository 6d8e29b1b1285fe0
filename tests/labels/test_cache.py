"""The label cache: what is put in comes out, also from a file and from another process."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.cache import CACHE_NAME, LabelCache, LabelCacheError, pack_labels, unpack_labels

LABELS = [
    PseudoLabel((3, 1, 40_000), 1 / 3),
    PseudoLabel((), 0.9, "empty"),
    PseudoLabel((7,), 5e-324, "confidence"),
    PseudoLabel((2, 2), 1.0, values=(0.1, -1e-300, float(np.nextafter(0.7, 1)))),
]
ROWS = [5, 0, 5, 9]


def filled() -> LabelCache:
    cache = LabelCache(6)
    for slot, (row, label) in enumerate(zip(ROWS, LABELS, strict=True)):
        cache.put(slot + 1, row, label, 10.5 + slot)
    return cache


def test_what_was_put_in_last_comes_out() -> None:
    cache = filled()
    assert len(cache) == 4 and cache.rows.tolist() == [-1, *ROWS, -1]
    for slot, (row, label) in enumerate(zip(ROWS, LABELS, strict=True)):
        assert cache.get(slot + 1, row) == label and cache.clock[slot + 1] == 10.5 + slot
    cache.put(2, 3, LABELS[0], 99.0)
    assert cache.get(2, 3) == LABELS[0] and cache.clock[2] == 99.0 and len(cache) == 4


@pytest.mark.parametrize(("slot", "row"), [(1, 4), (0, 5), (5, 0)])
def test_another_item_than_the_one_held_is_an_error(slot: int, row: int) -> None:
    with pytest.raises(LabelCacheError, match=f"slot {slot} of the label cache holds item .* not {row}"):
        filled().get(slot, row)


def test_a_file_restores_every_bit(tmp_path: Path) -> None:
    cache = filled()
    cache.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CACHE_NAME]
    found = LabelCache.load(tmp_path, cache.rows)
    assert [found.get(slot + 1, row) for slot, row in enumerate(ROWS)] == LABELS
    assert found.clock.tobytes() == cache.clock.tobytes() and found.rows.tobytes() == cache.rows.tobytes()
    found.put(0, 1, PseudoLabel((), 0.1, "too_long"), 1.0)
    found.save(tmp_path)
    again = LabelCache.load(tmp_path, found.rows)
    assert again.get(0, 1) == PseudoLabel((), 0.1, "too_long") and again.get(3, 5) == LABELS[2]
    with safe_open(tmp_path / CACHE_NAME, framework="numpy") as file:
        assert file.get_tensor("ids").tolist() == [3, 1, 40_000, 7, 2, 2]
        assert file.get_tensor("lengths").tolist() == [0, 3, 0, 1, 2, 0]
        assert file.get_tensor("values").tolist() == list(LABELS[3].values)
        assert file.get_tensor("value_lengths").tolist() == [0, 0, 0, 0, 3, 0]


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    LabelCache(3).save(tmp_path)
    assert len(LabelCache.load(tmp_path, np.full(3, -1, dtype=np.int32))) == 0


def test_a_failed_save_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled()
    cache.save(tmp_path)
    before = (tmp_path / CACHE_NAME).read_bytes()

    def full(*_: object, **__: object) -> None:
        (tmp_path / f".{CACHE_NAME}.partial").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_ema_scaling.labels.cache.save_file", full)
    with pytest.raises(OSError, match="no space"):
        cache.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CACHE_NAME]
    assert (tmp_path / CACHE_NAME).read_bytes() == before


def test_what_cannot_be_restored_says_why(tmp_path: Path) -> None:
    cache = filled()
    with pytest.raises(LabelCacheError, match="is missing, but at this point of the run 4 labels"):
        LabelCache.load(tmp_path, cache.rows)
    cache.save(tmp_path)
    other = cache.rows.copy()
    other[2] = 8
    with pytest.raises(LabelCacheError, match="differ in 1 slots"):
        LabelCache.load(tmp_path, other)
    with pytest.raises(LabelCacheError, match="differ in size"):
        LabelCache.load(tmp_path, cache.rows[:-1])
    whole = (tmp_path / CACHE_NAME).read_bytes()
    (tmp_path / CACHE_NAME).write_bytes(whole[:-8])
    with pytest.raises(LabelCacheError, match="is damaged"):
        LabelCache.load(tmp_path, cache.rows)
    (tmp_path / CACHE_NAME).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LabelCacheError, match="checksums of"):
        LabelCache.load(tmp_path, cache.rows)


def test_labels_survive_the_exchange_bit_for_bit() -> None:
    labels = {2**40 + position: label for position, label in enumerate(LABELS)}
    packed = pack_labels(labels)
    assert packed.dtype == torch.int64
    wider = torch.nn.functional.pad(packed, (0, 7))
    assert unpack_labels(wider) == labels and list(unpack_labels(wider)) == list(labels)
    assert unpack_labels(pack_labels({})) == {}
    # Python floats that print alike but differ in their last bit would be other labels.
    odd = float(np.nextafter(0.1, 1))
    assert unpack_labels(pack_labels({0: PseudoLabel((1,), odd)}))[0].confidence == odd


def test_memory_is_a_few_bytes_a_token() -> None:
    slots, tokens = 5000, 60
    tracemalloc.start()
    cache = LabelCache(slots)
    for slot in range(slots):
        cache.put(slot, slot, PseudoLabel(tuple(range(1000, 1000 + tokens)), 0.5), 1.0)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 24 bytes of arrays, two pointers, and a bytes object of 33 bytes and the ids.
    assert used / slots < 4 * tokens + 24 + 16 + 33 + 20
