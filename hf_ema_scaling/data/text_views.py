"""Views of texts for the student: masked tokens, dropped words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.data.seeding import spread_seed


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")


def _places(ids: Tensor, inputs: Mapping[str, Tensor], special: Tensor) -> list[Tensor]:
    """For each row of CPU ids, the places that are neither padding nor special tokens."""
    mask = inputs.get("attention_mask")
    content = ~torch.isin(ids, special)
    if mask is not None:
        content &= mask.cpu().bool()
    return [row.nonzero().flatten() for row in content]


def _draws(count: int, seed: int) -> Tensor:
    """Float32 `(count,)` in [0, 1)."""
    return torch.rand(count, generator=torch.Generator().manual_seed(spread_seed(seed)))


class TokenMasking:
    """Replaces tokens by the mask token, each with probability `share`; every token keeps its place.

    Special tokens and padding are left alone.

    Args:
        share: in [0, 1).
        mask_id: the tokenizer's mask token.
        special_ids: tokens that are never masked.

    Raises:
        ValueError: for a share outside [0, 1).
    """

    changes_length = False

    def __init__(self, share: float, mask_id: int, special_ids: Collection[int] = ()) -> None:
        _check_share(share)
        self.share = share
        self.mask_id = mask_id
        self._special = torch.tensor(sorted(special_ids), dtype=torch.long)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, share: float) -> TokenMasking:
        """With the mask token and the special ids of a tokenizer.

        Raises:
            ValueError: when it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token: set mask_share to 0, or give TokenMasking the id of a "
                "token that says nothing"
            )
        return cls(share, int(tokenizer.mask_token_id), tokenizer.all_special_ids)

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The `input_ids` `(rows, tokens)` with masks in them."""
        ids = inputs["input_ids"].cpu()
        masked = torch.zeros_like(ids, dtype=torch.bool)
        for row, places, seed in zip(masked, _places(ids, inputs, self._special), seeds, strict=True):
            row[places] = _draws(len(places), seed) < self.share
        return {"input_ids": inputs["input_ids"].masked_fill(masked.to(inputs["input_ids"].device), self.mask_id)}


class WordDropout:
    """Leaves words out, each with probability `share`; one word at least remains of a text that has some.

    What remains moves to the left and is filled up with padding, so the batch is as wide as before. Not for labels by
    token. Inputs of the shape of `input_ids` move with it (`attention_mask`, `token_type_ids`).

    Args:
        share: in [0, 1).
        pad_id: the tokenizer's padding.
        special_ids: tokens that always remain.
        continuation_ids: tokens that belong to the word of the token before; all others begin one.

    Raises:
        ValueError: for a share outside [0, 1).
    """

    changes_length = True

    def __init__(
        self, share: float, pad_id: int, special_ids: Collection[int] = (), continuation_ids: Collection[int] = ()
    ) -> None:
        _check_share(share)
        self.share = share
        self.pad_id = pad_id
        self._special = torch.tensor(sorted(special_ids), dtype=torch.long)
        self._continuations = torch.tensor(sorted(continuation_ids), dtype=torch.long)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, share: float) -> WordDropout:
        """With the ids of a tokenizer; where it is no WordPiece, every token is taken for a word.

        Raises:
            ValueError: when it has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token, which takes the place of what is left out"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        prefix = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
        continuations = (
            [index for token, index in tokenizer.get_vocab().items() if token.startswith(prefix)] if prefix else []
        )
        return cls(share, int(tokenizer.pad_token_id), tokenizer.all_special_ids, continuations)

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """All inputs of the shape of `input_ids` `(rows, tokens)`, without the words left out.

        Raises:
            ValueError: without `attention_mask`: nothing would tell padding from text.
        """
        if "attention_mask" not in inputs:
            raise ValueError(f"WordDropout needs 'attention_mask' to mark what it leaves out, got {sorted(inputs)}")
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
        begins = ~torch.isin(ids, self._continuations)
        kept = mask.clone()
        for row, places, seed in zip(range(len(ids)), _places(ids, inputs, self._special), seeds, strict=True):
            words = begins[row, places].long().cumsum(0)
            if not len(places):
                continue
            words -= words[0].clone()
            draws = _draws(int(words[-1]) + 1, seed)
            stays = draws >= self.share
            stays[draws.argmax()] = True
            kept[row, places] = stays[words]
        # Stable: what is kept stays in order and comes first.
        order = (~kept).long().argsort(dim=1, stable=True)
        filled = kept.gather(1, order)
        changed = {}
        for name, value in inputs.items():
            if value.shape == inputs["input_ids"].shape:
                fill = self.pad_id if name == "input_ids" else 0
                moved = value.gather(1, order.to(value.device))
                changed[name] = moved.masked_fill(~filled.to(value.device), fill)
        return changed
