"""Views of texts: by row, by seed, and never of what is no text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_ema_scaling.data.text_views import TokenMasking, WordDropout

PAD, BEGIN, END, MASK = 0, 1, 2, 3


def batch(rows: int = 3, width: int = 12) -> dict[str, torch.Tensor]:
    """Rows of `width`, `width - 1`, ... tokens: begin, words of growing ids, end, padding."""
    ids = torch.full((rows, width), PAD)
    for row in range(rows):
        size = width - row
        ids[row, :size] = torch.tensor([BEGIN, *range(10, 8 + size), END])
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}


def test_masks_depend_on_seed_and_content_only_and_spare_the_rest() -> None:
    inputs = batch()
    before = inputs["input_ids"].clone()
    view = TokenMasking(0.5, MASK, [PAD, BEGIN, END])
    state = torch.get_rng_state()
    (ids,) = view(inputs, [7, 8, 9]).values()
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(inputs["input_ids"], before)
    changed = ids != before
    assert changed.any(1).all() and (ids[changed] == MASK).all()
    assert not changed[torch.isin(before, torch.tensor([PAD, BEGIN, END]))].any()
    for row in range(3):
        size = 12 - row
        alone = view({name: value[row : row + 1, :size] for name, value in inputs.items()}, [7 + row])
        assert torch.equal(alone["input_ids"][0], ids[row, :size])
    # Padding on the left, or none marked: the same tokens.
    left = {name: value.roll(2, dims=1) for name, value in inputs.items()}
    assert torch.equal(view(left, [7, 8, 9])["input_ids"][2].roll(-2), ids[2])
    assert not torch.equal(view(inputs, [1, 2, 3])["input_ids"], ids)


def test_padding_is_known_by_the_attention_mask_too() -> None:
    inputs = {"input_ids": torch.full((50, 8), 9), "attention_mask": torch.tensor([[1] * 3 + [0] * 5] * 50)}
    assert (TokenMasking(0.5, MASK)(inputs, range(50))["input_ids"][:, 3:] == 9).all()
    kept = WordDropout(0.5, PAD)(inputs, range(50))
    assert kept["attention_mask"].sum(1).unique().tolist() == [1, 2, 3]
    assert torch.equal(kept["input_ids"] == 9, kept["attention_mask"] == 1)


def test_as_many_tokens_are_masked_as_asked_for() -> None:
    inputs = {"input_ids": torch.full((400, 50), 9), "attention_mask": torch.ones(400, 50).long()}
    masked = TokenMasking(0.3, MASK)(inputs, range(400))["input_ids"] == MASK
    assert masked.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not (TokenMasking(0.0, MASK)(inputs, range(400))["input_ids"] == MASK).any()


def test_words_are_left_out_whole_and_the_rest_moves_together() -> None:
    inputs = {
        "input_ids": torch.tensor([[BEGIN, 10, 90, 11, 91, 92, 12, END, PAD], [BEGIN, 90, 13, END, *[PAD] * 5]]),
        "attention_mask": torch.tensor([[1] * 8 + [0], [1] * 4 + [0] * 5]),
    }
    view = WordDropout(0.5, PAD, [PAD, BEGIN, END], continuation_ids=[90, 91, 92])
    words = ([10, 90], [11, 91, 92], [12])
    seen = set()
    for seed in range(60):
        changed = view(inputs, [seed, seed])
        for row in range(2):
            size = int(changed["attention_mask"][row].sum())
            assert changed["attention_mask"][row].tolist() == [1] * size + [0] * (9 - size)
            assert changed["input_ids"][row, size:].eq(PAD).all()
        kept = changed["input_ids"][0, : int(changed["attention_mask"][0].sum())].tolist()
        stays = tuple(word[0] in kept for word in words)
        assert kept == [BEGIN, *[i for word, stay in zip(words, stays, strict=True) if stay for i in word], END]
        seen.add(stays)
        assert changed["input_ids"][1].tolist()[:2] in ([BEGIN, 90], [BEGIN, 13])
    # Every way to keep at least one of three words.
    assert len(seen) == 7 and (False, False, False) not in seen


def test_word_dropout_keeps_its_share_and_depends_on_the_row_alone() -> None:
    inputs = batch(4, 30)
    view = WordDropout(0.2, PAD, [PAD, BEGIN, END])
    together = view(inputs, [1, 2, 3, 4])
    assert set(together) == set(inputs)
    for row in range(4):
        size = 30 - row
        alone = view({name: value[row : row + 1, :size] for name, value in inputs.items()}, [1 + row])
        for name in inputs:
            assert torch.equal(alone[name][0], together[name][row, :size])
    long = {"input_ids": torch.full((200, 50), 9), "attention_mask": torch.ones(200, 50).long()}
    assert view(long, range(200))["attention_mask"].float().mean().item() == pytest.approx(0.8, abs=0.01)
    nothing = {"input_ids": torch.tensor([[BEGIN, END]]), "attention_mask": torch.ones(1, 2).long()}
    assert view(nothing, [0])["input_ids"].tolist() == [[BEGIN, END]]
    assert WordDropout.changes_length and not TokenMasking.changes_length


def test_the_ids_of_a_tokenizer() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "a": 3, "##b": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    ids = torch.tensor([[0, 1, 3, 4, 3, 4, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {tuple(WordDropout.from_tokenizer(tokenizer, 0.5)(inputs, [seed])["input_ids"][0]) for seed in range(30)}
    assert {tuple(map(int, row)) for row in found} == {(0, 1, 3, 4, 3, 4, 2), (0, 1, 3, 4, 2, 0, 0)}
    masked = {
        tuple(TokenMasking.from_tokenizer(tokenizer, 0.9)(inputs, [s])["input_ids"][0].tolist()) for s in (0, 1, 2)
    }
    assert (0, 1, 2, 2, 2, 2, 2) in masked
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="has no mask token"):
        TokenMasking.from_tokenizer(tokenizer, 0.1)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        WordDropout.from_tokenizer(tokenizer, 0.1)


def test_what_does_not_fit_is_refused() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\)"):
            TokenMasking(share, MASK)
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\)"):
            WordDropout(share, PAD)
    with pytest.raises(ValueError, match="needs 'attention_mask'"):
        WordDropout(0.1, PAD)({"input_ids": torch.ones(1, 2).long()}, [0])
