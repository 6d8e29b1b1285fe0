"""Adaptive thresholds: closed forms, and that they are a function of the data seen."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.filter_base import Row
from hf_ema_scaling.labels.filters import FilterChain, build_filters
from hf_ema_scaling.labels.thresholds import EDGES, AdaptiveConfidence, ConfidenceQuantile, LogProbabilityQuantile

CHUNK = 8
"""Rows in a reference step."""


def run(
    chain: FilterChain, confidences: Any, classes: Any, kappa: int, *, processes: int = 1, seed: int | None = None
) -> list[str | None]:
    """Feeds labels in steps of `kappa` reference steps, dealt to processes, in another order for each seed."""
    reasons: list[str | None] = [None] * len(confidences)
    rng = np.random.default_rng(seed)
    for low in range(0, len(confidences), CHUNK * kappa):
        numbers = np.arange(low, min(low + CHUNK * kappa, len(confidences)))
        ages = (numbers[-1] + 1 - np.arange(len(confidences))) / CHUNK
        order = numbers if seed is None else rng.permutation(numbers)
        measured = []
        for part in np.array_split(order, processes):
            labels = [PseudoLabel((int(classes[i]),), float(confidences[i])) for i in part]
            rows = [Row(label, age=ages[i]) for label, i in zip(labels, part, strict=True)]
            judged = chain.judge(labels, rows.__getitem__)
            for number, label in zip(part, judged, strict=True):
                reasons[number] = label.reason
            # What this process measured, as if it were alone; the chain then sums over all of them.
            measured.append(np.concatenate([one.measured() for one in chain.adaptive.values()]))
            for one in chain.adaptive.values():
                one.history.measured = np.zeros_like(one.history.measured)
        chain.end_step(lambda _, measured=measured: np.sum(measured, axis=0), len(numbers) / CHUNK)
    return reasons


def data(count: int = 640, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.beta(4, 2, count), rng.choice(3, count, p=[0.7, 0.2, 0.1])


SPEC = {"confidence_quantile": {"share": 0.3, "momentum": 0.9}, "confidence_adaptive": {"classes": 3, "momentum": 0.9}}


def test_thresholds_after_the_same_labels_are_those_of_kappa_1() -> None:
    for name in SPEC:
        states = {}
        for kappa in (1, 4, 8):
            chain = FilterChain(build_filters({name: SPEC[name]}))
            run(chain, *data(), kappa)
            ((_, states[kappa]),) = chain.state_dict().items()
        for kappa in (4, 8):
            # The tolerance that the docstring states: float64 rounding, and 2**-32 for each row measured.
            assert np.allclose(states[kappa]["sums"], states[1]["sums"], rtol=1e-8, atol=640 * 2**-32)
            assert states[kappa]["steps"] == pytest.approx(80.0)


def test_order_split_and_processes_change_no_bit() -> None:
    results = []
    for processes, seed in ((1, None), (3, None), (1, 5), (2, 6)):
        chain = FilterChain(build_filters(SPEC))
        results.append((run(chain, *data(), 4, processes=processes, seed=seed), json.dumps(chain.state_dict())))
    assert all(result == results[0] for result in results[1:])
    assert 100 < sum(reason == "confidence" for reason in results[0][0]) < 500


def test_a_resumed_filter_goes_on_bit_for_bit() -> None:
    whole = FilterChain(build_filters(SPEC))
    confidences, classes = data()
    run(whole, confidences, classes, 2)
    first, second = FilterChain(build_filters(SPEC)), FilterChain(build_filters(SPEC))
    run(first, confidences[:320], classes[:320], 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    reasons = run(second, confidences[320:], classes[320:], 2)
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())
    # Without the state other labels would be dropped.
    fresh = FilterChain(build_filters(SPEC))
    assert run(fresh, confidences[320:], classes[320:], 2) != reasons
    second.load_state_dict({})
    assert run(second, confidences, classes, 2) == run(FilterChain(build_filters(SPEC)), confidences, classes, 2)


def test_the_quantile_drops_its_share_and_nothing_of_the_first_step() -> None:
    confidences, classes = data(4000)
    chain = FilterChain([ConfidenceQuantile(0.25, 0.99)])
    reasons = run(chain, confidences, classes, 1)
    assert reasons[:CHUNK] == [None] * CHUNK
    assert sum(reason is not None for reason in reasons[1000:]) / 3000 == pytest.approx(0.25, abs=0.025)
    (one,) = chain.adaptive.values()
    # Between the quantile and the lower edge of its bin.
    exact = np.quantile(confidences, 0.25)
    assert one.threshold == pytest.approx(exact, abs=0.03) and one.threshold in EDGES  # type: ignore[attr-defined]


def test_equal_confidences_are_never_dropped() -> None:
    chain = FilterChain([ConfidenceQuantile(0.5)])
    assert set(run(chain, np.full(80, 0.97), np.zeros(80), 1)) == {None}
    chain = FilterChain([ConfidenceQuantile(0.5)])
    assert set(run(chain, np.ones(80), np.zeros(80), 1)) == {None}


def test_log_probabilities_have_quantiles_too() -> None:
    one = LogProbabilityQuantile(0.5)
    for score in (-3.0, -2.0, -0.1, -0.05):
        one.observe(Row(PseudoLabel((1,), 0.5, scores={"log_probability": score})))
    one.end_step(one.measured(), 1.0)
    assert math.exp(-2.0) < one.threshold <= math.exp(-0.1)
    dropped = [one.drops(Row(PseudoLabel((1,), 0.9, scores={"log_probability": s}))) for s in (-2.5, math.nan, -0.04)]
    assert dropped == [True, True, False]


def test_freematch_by_hand() -> None:
    """Two steps of one reference step each, against equations 5 to 8 with batch means."""
    momentum, batches = 0.75, [[(0, 0.9), (0, 0.7), (1, 0.5)], [(1, 0.8), (1, 0.6), (0, 1.0)]]
    one = AdaptiveConfidence(2, momentum)
    assert one.thresholds() == [0.5, 0.5]
    tau, p = 0.5, np.array([0.5, 0.5])
    for batch in batches:
        for chosen, confidence in batch:
            one.observe(Row(PseudoLabel((chosen,), confidence)))
        one.end_step(one.measured(), 1.0)
        tau = momentum * tau + (1 - momentum) * np.mean([confidence for _, confidence in batch])
        rows = [[c, 1 - c] if chosen == 0 else [1 - c, c] for chosen, c in batch]
        p = momentum * p + (1 - momentum) * np.mean(rows, axis=0)
        assert one.thresholds() == pytest.approx((tau * p / p.max()).tolist(), rel=1e-8)
    low, high = sorted(one.thresholds())
    assert low < high
    rare = int(np.argmin(one.thresholds()))
    between = (low + high) / 2
    assert not one.drops(Row(PseudoLabel((rare,), between))) and one.drops(Row(PseudoLabel((1 - rare,), between)))


def test_soft_values_are_the_probabilities() -> None:
    soft, hard = AdaptiveConfidence(3, 0.0), AdaptiveConfidence(3, 0.0)
    soft.observe(Row(PseudoLabel((0,), 0.5, None, (0.5, 0.4, 0.1))))
    hard.observe(Row(PseudoLabel((0,), 0.5)))
    for one in (soft, hard):
        one.end_step(one.measured(), 1.0)
    assert soft.thresholds() == pytest.approx([0.5, 0.4, 0.1], rel=1e-8)
    assert hard.thresholds() == pytest.approx([0.5, 0.25, 0.25], rel=1e-8)


def test_labels_of_several_tokens_have_no_class() -> None:
    with pytest.raises(ValueError, match=r"labels of one class out of 3, got the label ids \[1, 2\]"):
        AdaptiveConfidence(3).observe(Row(PseudoLabel((1, 2), 0.5)))


def test_the_same_adaptive_filter_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        FilterChain([ConfidenceQuantile(0.5), ConfidenceQuantile(0.5)])
