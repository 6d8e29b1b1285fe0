"""Limits of filters from labelled data."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ema_scaling.labels.fitting import fit_filters


def test_limits_are_quantiles_with_a_margin() -> None:
    rates = np.arange(10, 111)
    texts = ["ab " * (rate * 2 // 3) for rate in rates]
    seconds = [2.0] * len(rates)
    limits = fit_filters(texts, seconds=seconds, tail=0.1, margin=2.0)
    counts = np.array([len(text.strip()) for text in texts])
    low, high = np.quantile(counts / 2.0, [0.1, 0.9])
    assert limits.keys() == {"rate"}
    assert limits["rate"]["min_characters"] == pytest.approx(low / 2) and limits["rate"][
        "max_characters"
    ] == pytest.approx(high * 2)
    words = np.quantile([rate * 2 // 3 / 2 for rate in rates], [0.1, 0.9])
    assert [limits["rate"]["min_words"], limits["rate"]["max_words"]] == pytest.approx([words[0] / 2, words[1] * 2])


def test_length_ratios_leave_empty_inputs_out() -> None:
    limits = fit_filters(
        None, tokens=[5] + [2 * n for n in range(1, 31)], source_tokens=[0, *range(1, 31)], margin=1.5
    )
    assert limits == {"length_ratio": {"minimum": pytest.approx(2 / 1.5), "maximum": pytest.approx(3.0)}}


def test_what_cannot_be_fitted() -> None:
    assert fit_filters(["a"] * 30) == {}
    with pytest.raises(ValueError, match="19 labelled rows are too few"):
        fit_filters(["a"] * 20, seconds=[1.0] * 19 + [0.0])
    with pytest.raises(ValueError, match="3 labels, but 2 durations"):
        fit_filters(["a"] * 3, seconds=[1.0] * 2)
    with pytest.raises(ValueError, match=r"margin must be at least 1, got 0\.5"):
        fit_filters(["a"], seconds=[1.0], margin=0.5)
