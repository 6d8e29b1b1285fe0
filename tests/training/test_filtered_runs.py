"""Filters, ledger and diagnostics in a run: what enters the loss, what is counted, and what is the same everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import labelled_runs
import numpy as np
import pytest
import tiny
import torch
from labelled_runs import Content, drawn_rows, history
from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels import CTCLabeler, PseudoLabel
from hf_ema_scaling.labels.filter_base import Row
from hf_ema_scaling.recipe.config import parse
from hf_ema_scaling.training import PseudoLabelArguments


class Short:
    """Drops labels of one token."""

    reason = "short"

    def drops(self, row: Row) -> bool:
        return len(row.label.ids) == 1


def test_filters_drop_from_the_loss_what_a_labeler_that_drops_it_would(tmp_path: Path) -> None:
    by_filter = labelled_runs.trainer(tmp_path, more={"filters": [Short()]}, pl={"min_confidence": 0.3})
    by_filter.train()

    def drop(label: PseudoLabel) -> str | None:
        return "short" if len(label.ids) == 1 else "confidence" if label.confidence < 0.3 else None

    by_labeler = labelled_runs.trainer(tmp_path, Content(drop))
    by_labeler.train()
    assert tiny.same_bits(tiny.parameters(by_filter.model), tiny.parameters(by_labeler.model))
    assert by_filter.ledger.to_dict() == by_labeler.ledger.to_dict()
    counts = by_filter.ledger.to_dict()["used"]["unlabelled"]
    assert all(counts[name]["items"] > 0 for name in ("kept", "short", "confidence"))
    plain = labelled_runs.trainer(tmp_path)
    plain.train()
    assert not tiny.same_bits(tiny.parameters(by_filter.model), tiny.parameters(plain.model))
    # A reason of one's own is told of like all others.
    assert all("pseudo/dropped_short" in entry for entry in history(by_filter) if "pseudo/kept" in entry)


def test_text_filters_see_text_and_seconds_of_their_row(tmp_path: Path) -> None:
    processor = labelled_runs.processor(tmp_path / "processor")
    spec = {"rate": {"max_characters": 0.4}, "too_long": {"maximum": 2}}
    made = labelled_runs.trainer(tmp_path, pl={"filters": spec}, more={"processing_class": processor})
    made.train()
    expected: Counter[str] = Counter()
    data = labelled_runs.unlabelled()
    for row in drawn_rows(made).tolist():
        ids = Content().of(float(data[row]["input_values"][0])).ids
        text = processor.tokenizer.decode(list(ids), group_tokens=False).strip()
        fast = len(text) / data[row]["duration"] > 0.4
        expected["rate" if fast else "too_long" if len(ids) > 2 else "kept"] += 1
    assert min(expected.values()) > 2 and len(expected) == 3
    found = made.ledger.to_dict()["used"]["unlabelled"]
    assert {reason: cell["items"] for reason, cell in found.items()} == expected


def test_recipes_write_filters_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("pl_start: 3\nfilters:\n  repeat:\n  rate: fit\n  compression: {maximum: 2.4}\n")
    (found,) = parse((PseudoLabelArguments,), ["--config", str(path), "--on_collapse", "stop"])
    assert json.loads(found.filters) == {"repeat": None, "rate": "fit", "compression": {"maximum": 2.4}}
    assert found.on_collapse == "stop" and found.calibration_rows == 0
    (found,) = parse((PseudoLabelArguments,), ["--filters", '{"long_word": {}}'])
    assert found == PseudoLabelArguments(filters={"long_word": {}})  # type: ignore[arg-type]
    path.write_text("filters: {repeats: {}}\n")
    with pytest.raises(ValueError, match="no filter is called 'repeats'; did you mean repeat"):
        parse((PseudoLabelArguments,), ["--config", str(path)])


ADAPTIVE = {"filters": {"confidence_quantile": {"share": 0.3, "momentum": 0.8}}}


def test_adaptive_thresholds_do_not_see_micro_batches_or_the_teachers_own(tmp_path: Path) -> None:
    results = []
    for micro, label_batch_size in ((3, None), (16, None), (2, 5)):
        made = labelled_runs.trainer(
            tmp_path, pl={**ADAPTIVE, "label_batch_size": label_batch_size}, per_device_train_batch_size=micro
        )
        made.train()
        chain = made.judge.chain
        results.append((json.dumps(chain.state_dict()), json.dumps(made.ledger.to_dict())))
    assert results[0] == results[1] == results[2]
    assert made.ledger.to_dict()["used"]["unlabelled"]["confidence"]["items"] > 3


def test_the_threshold_after_the_same_data_is_that_of_kappa_1(tmp_path: Path) -> None:
    """Labels depend on content alone here; what is left is rounding."""
    thresholds = {}
    for kappa in (1.0, 4.0):
        made = labelled_runs.trainer(tmp_path, pl=ADAPTIVE, kappa=kappa, max_steps=22)
        made.train()
        ((_, state),) = made.judge.chain.state_dict().items()
        assert state["steps"] == pytest.approx(20.0) and sum(state["sums"]) == pytest.approx(
            3 * sum(0.8 ** (20 - s - r / 4) for s in range(20) for r in range(4)) / 4, rel=0.1
        )
        (one,) = made.judge.chain.adaptive.values()
        thresholds[kappa] = (np.array(state["sums"]), one.threshold)
    assert np.allclose(thresholds[1.0][0], thresholds[4.0][0], atol=1e-7) and thresholds[1.0][1] == thresholds[4.0][1]


CACHED = {**ADAPTIVE, "cache_steps": 3.0, "cache_refresh": 0.4, "hidden_reference_column": "truth"}


@pytest.mark.parametrize("pl", [{**ADAPTIVE, "source_column": "origin"}, CACHED], ids=["fresh", "cached"])
def test_a_resumed_run_has_the_same_thresholds_ledger_and_logs(tmp_path: Path, pl: dict[str, Any]) -> None:
    whole = labelled_runs.trainer(tmp_path / "whole", pl=pl, save_strategy="steps", save_steps=1)
    whole.train()
    for stop in (1, 8):
        made = labelled_runs.trainer(tmp_path / str(stop), pl=pl, save_strategy="steps", save_steps=1)
        made.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert history(made) == history(whole)
        assert made.ledger.to_dict() == whole.ledger.to_dict()
        assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(whole.model))
        states = [
            json.loads((tmp_path / name / "checkpoint-12" / "ema" / "ema_state.json").read_text())["state"]["counters"]
            for name in ("whole", str(stop))
        ]
        for key in ("thresholds", "ledger", "labels"):
            assert states[0][key] == states[1][key]
    written = json.loads((tmp_path / "whole" / "ledger.json").read_text())
    assert written == whole.ledger.to_dict()


def test_the_ledger_counts_every_row_drawn_by_source_and_units(tmp_path: Path) -> None:
    made = labelled_runs.trainer(
        tmp_path,
        pl={**ADAPTIVE, "source_column": "origin"},
        batch_unit="seconds",
        reference_batch_size=50.0,
        max_steps=6,
    )
    made.train()
    data, ledger = labelled_runs.unlabelled(), made.ledger.to_dict()
    rows = drawn_rows(made).tolist()
    for name in ("web", "books"):
        mine = [row for row in rows if data[row]["origin"] == name]
        cells = ledger["used"][name].values()
        assert sum(cell["items"] for cell in cells) == len(mine) > 0
        assert sum(cell["seconds"] for cell in cells) == pytest.approx(
            sum(float(data[row]["duration"]) for row in mine), abs=2e-3
        )
    # Every label was made once and used once.
    assert ledger["made"] == ledger["used"] and ledger["unit"] == "seconds"
    logged = [log for log in made.state.log_history if any(name.startswith("ledger/") for name in log)][-1]
    assert {name: value for name, value in logged.items() if name.startswith("ledger/")} == {
        f"ledger/{source}/{reason}": cell["items"]
        for source, reasons in ledger["used"].items()
        for reason, cell in reasons.items()
    }


def test_seconds_and_tokens_are_counted_whatever_the_unit_of_batches(tmp_path: Path) -> None:
    made = labelled_runs.trainer(tmp_path, pl=dict(ADAPTIVE), max_steps=6)
    tokens = list(range(3, 23))
    lengths = labelled_runs.unlabelled().add_column("length", tokens)
    both = labelled_runs.trainer(tmp_path, data=lengths, pl=dict(ADAPTIVE), max_steps=6)
    for one in (made, both):
        one.train()
        ledger, rows = one.ledger.to_dict(), drawn_rows(one).tolist()
        (cells,) = ([*book.values()] for book in ledger["used"].values())
        assert len(cells) > 1 and ledger["unit"] == "samples"
        assert sum(cell["samples"] for cell in cells) == sum(cell["items"] for cell in cells) == len(rows)
        durations = labelled_runs.unlabelled()["duration"][:]
        assert sum(cell["seconds"] for cell in cells) == pytest.approx(sum(durations[row] for row in rows), abs=5e-3)
        if one is both:
            assert sum(cell["tokens"] for cell in cells) == sum(tokens[row] for row in rows)
            assert "tokens" in one.ledger.table().splitlines()[0]


def test_with_a_cache_uses_and_makings_are_counted_apart(tmp_path: Path) -> None:
    made = labelled_runs.trainer(tmp_path, pl=CACHED, max_steps=20)
    made.train()
    ledger, pool = made.ledger.to_dict(), made.sampler.stream.pool
    items = {book: sum(cell["items"] for cell in ledger[book]["unlabelled"].values()) for book in ("used", "made")}
    assert items == {"used": len(drawn_rows(made)), "made": pool.size + int((pool.entering >= 0).sum())}
    assert items["made"] < items["used"]
    # A label is judged once, when it is made, and keeps its reason in the cache.
    assert ledger["made"]["unlabelled"]["confidence"]["items"] > 0
    assert ledger["used"]["unlabelled"]["confidence"]["items"] > ledger["made"]["unlabelled"]["confidence"]["items"]


def test_the_hidden_truth_changes_its_own_diagnostic_and_nothing_else(tmp_path: Path) -> None:
    data = labelled_runs.unlabelled()
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = data.remove_columns("truth").add_column("truth", [data["truth"][int(i)] for i in order])
    runs = []
    for one in (data, shuffled):
        made = labelled_runs.trainer(
            tmp_path,
            data=one,
            pl={"hidden_reference_column": "truth", **ADAPTIVE},
            # Columns that the model does not take reach the collator here.
            remove_unused_columns=False,
        )
        seen: set[str] = set()
        inner = made.data_collator
        made.data_collator = lambda rows, inner=inner, seen=seen: seen.update(*rows) or inner(rows)
        made.train()
        assert "origin" in seen and "truth" not in seen
        runs.append(made)
    first, second = runs
    assert tiny.same_bits(first.recorder.weights, second.recorder.weights)
    assert tiny.same_bits(first.recorder.averages, second.recorder.averages)
    logs = [history(made) for made in runs]
    assert logs[0] != logs[1]
    visible = [[{k: v for k, v in e.items() if not k.startswith("hidden/")} for e in log] for log in logs]
    assert visible[0] == visible[1]
    # By hand: every second row has one token more than its label.
    edits = length = 0
    kept = {"edits": 0, "length": 0}
    hidden = [entry for entry in logs[0] if "hidden/error_all" in entry]
    rows = drawn_rows(first)
    for row in rows[-9:].tolist():
        edits, length = edits + row % 2, length + len(data[row]["truth"])
    assert hidden[-1]["hidden/error_all"] == pytest.approx(edits / length) and kept["edits"] == 0
    assert hidden[-1]["hidden/error"] != hidden[-1]["hidden/error_all"]


def test_a_hidden_text_is_compared_in_words_and_characters(tmp_path: Path) -> None:
    processor = labelled_runs.processor(tmp_path / "processor")
    data = labelled_runs.unlabelled()
    data = data.add_column("text", ["b c"] * len(data))

    class Said(Content):
        def of(self, first: float) -> PseudoLabel:
            return PseudoLabel((2, 2, 1, 3), 0.5)  # "bb c"

    made = labelled_runs.trainer(
        tmp_path,
        Said(),
        data=data,
        pl={"hidden_reference_column": "text"},
        more={"processing_class": processor},
    )
    made.train()
    last = history(made, ("hidden/",))[-2]
    assert last == {
        "hidden/cer": pytest.approx(1 / 3),
        "hidden/cer_all": pytest.approx(1 / 3),
        "hidden/wer": 0.5,
        "hidden/wer_all": 0.5,
    }


def test_diagnostics_of_a_run(tmp_path: Path) -> None:
    made = labelled_runs.trainer(tmp_path, max_steps=12, logging_steps=12)
    made.train()
    (entry,) = [entry for entry in history(made) if "loss" in entry]
    data = labelled_runs.unlabelled()
    labels = [Content().of(float(data[int(row)]["input_values"][0])) for row in drawn_rows(made)]
    assert entry["score/blank"] == pytest.approx(np.mean([label.scores["blank"] for label in labels]), rel=1e-9)
    for place in range(10):
        share = np.mean([int(label.confidence * 10) == place for label in labels])
        assert entry[f"confidence/0.{place}"] == share
    assert entry["pseudo/distinct"] == pytest.approx(len({label.ids for label in labels}) / len(labels), rel=0.01)
    stream, gold = made.sampler.stream, tiny.speech(20)
    labelled = stream.index[stream.source == 0].tolist()
    rates = [
        sum(len(label.ids) for label in labels) / sum(float(data[int(row)]["duration"]) for row in drawn_rows(made)),
        sum(len(gold[row]["labels"]) for row in labelled) / sum(float(gold[row]["duration"]) for row in labelled),
    ]
    assert entry["pseudo/length_ratio"] == pytest.approx(rates[0] / rates[1], rel=1e-4)
    p = np.bincount([i for label in labels for i in label.ids], minlength=9)
    q = np.bincount([i for row in labelled for i in gold[row]["labels"].tolist()], minlength=9) + 1
    p, q = p / p.sum(), q / q.sum()
    assert entry["pseudo/kl"] == pytest.approx(float(sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))), rel=1e-9)
    assert 0 < entry["loss/unlabelled_share"] < 1 and entry["loss/labelled"] > 0


def test_weights_by_confidence(tmp_path: Path) -> None:
    """At fixed weights the gradient is affine in each row's weight: halving all confidences halves its part."""

    class Sure(Content):
        def __init__(self, confidence: float) -> None:
            super().__init__()
            self.confidence = confidence

        def of(self, first: float) -> PseudoLabel:
            return PseudoLabel(super().of(first).ids, self.confidence)

    def gradient(confidence: float, **pl: Any) -> tiny.Tensors:
        made = tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, max_steps=2),
            tiny.speech(12),
            unlabeled_dataset=tiny.speech(12, 1, labels=False),
            pseudo_label_args=tiny.pseudo(**({"pl_start": 1.0, "weight_by_confidence": True} | pl)),
            labeler=Sure(confidence),
        )
        return made.recorder.gradients[1]

    none, half, full = gradient(0.0), gradient(0.5), gradient(1.0)
    assert tiny.difference(tiny.mean([none, full]), half) < 1e-6 and tiny.difference(none, full) > 0.05
    assert tiny.same_bits(full, gradient(0.5, weight_by_confidence=False))
    assert tiny.difference(half, gradient(0.25, pl_ramp=0.0, unlabeled_weight=2.0)) < 1e-6


class Absurd:
    """Nothing that the student could mean; or the empty label, as if it were one; or a usual one."""

    def __init__(self, ids: tuple[int, ...], reason: str | None = None) -> None:
        self.made = PseudoLabel(ids, 0.9, reason)

    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        return [self.made] * len(batch["input_values"])


def student() -> Any:
    """Sure that nobody says 8."""
    model = tiny.wav2vec2()
    with torch.no_grad():
        model.lm_head.bias[8] = -30.0
    return model


def fixed(folder: Path, labeler: Any, cap: float | None, **changes: Any) -> Any:
    return tiny.at_fixed_weights(
        student(),
        tiny.arguments(
            folder, max_steps=2, max_example_loss=None, logging_strategy="steps", logging_steps=1, **changes
        ),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(1, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=1.0, max_unlabeled_loss=cap),
        labeler=labeler,
    )


def test_one_empty_or_absurd_label_cannot_dominate_a_batch(tmp_path: Path) -> None:
    """In transformers' own loss an empty label weighs far more than all others: it is not divided by its length."""
    model, sizes = student(), []
    batch = tiny.CTCCollator()([tiny.speech(1, 1, labels=False)[0]])
    ((greedy,),) = [[label.ids for label in CTCLabeler(0).label(model.eval(), batch)]]
    model.config.ctc_loss_reduction = "mean"
    for ids in (greedy, (-100,)):
        model.zero_grad()
        model(**batch, labels=torch.tensor([ids])).loss.backward()
        sizes.append(float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)) ** 0.5)
    assert sizes[1] > 60 * sizes[0]
    dropped = fixed(tmp_path, Absurd((), "empty"), None).recorder.gradients[1]
    # A labeler that takes an empty label for one: it is dropped all the same.
    rogue = fixed(tmp_path, Absurd(()), None)
    assert tiny.same_bits(rogue.recorder.gradients[1], dropped)
    assert rogue.ledger.to_dict()["used"]["unlabelled"]["empty"]["items"] == 2
    absurd, cap = (8, 8, 8), 2.0
    free = fixed(tmp_path, Absurd(absurd), None)
    loss = next(entry["loss/unlabelled"] for entry in free.state.log_history if "loss/unlabelled" in entry)
    assert loss > 20
    capped = fixed(tmp_path, Absurd(absurd), cap)

    def part(made: Any) -> tiny.Tensors:
        gradient = made.recorder.gradients[1]
        return {name: gradient[name].double() - value.double() for name, value in dropped.items()}

    # Its part is scaled down to that of the cap, in every parameter.
    scaled = {name: value * (cap / loss) for name, value in part(free).items()}
    assert tiny.difference(scaled, part(capped)) < 1e-4
    usual = fixed(tmp_path, Absurd(greedy), None)
    sizes = [float(sum(v.square().sum() for v in part(made).values())) ** 0.5 for made in (usual, free, capped)]
    assert sizes[1] > 15 * sizes[0] and sizes[2] < sizes[0]
    # What is below the cap, and labelled rows, are not touched.
    within = fixed(tmp_path, Absurd(greedy), cap)
    assert tiny.same_bits(within.recorder.gradients[1], usual.recorder.gradients[1])
    assert tiny.same_bits(capped.recorder.gradients[0], free.recorder.gradients[0])


def test_the_cap_knows_neither_split_nor_kappa(tmp_path: Path) -> None:
    def gradients(kappa: float, micro: int) -> list[tiny.Tensors]:
        made = tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, max_steps=9, kappa=kappa, per_device_train_batch_size=micro),
            tiny.speech(20),
            unlabeled_dataset=tiny.speech(20, 1, labels=False),
            pseudo_label_args=tiny.pseudo(pl_start=1.0, unlabeled_ratio=3.0, max_unlabeled_loss=1.5),
            labeler=Content(),
        )
        return made.recorder.gradients

    ones, fours, split = gradients(1.0, 16), gradients(4.0, 16), gradients(4.0, 2)
    for step in (1, 2):
        low = 1 + 4 * (step - 1)
        assert tiny.difference(tiny.mean(ones[low : low + 4]), fours[step]) < 3e-5
        assert tiny.difference(fours[step], split[step]) < 3e-5


def test_filters_that_ask_for_what_is_not_there_are_refused(tmp_path: Path) -> None:
    bare = labelled_runs.unlabelled().remove_columns("duration")
    processor = labelled_runs.processor(tmp_path / "processor")
    for spec, data, more, message in (
        ({"repeat": {}}, None, {}, "the filters Repeat need the text of labels: give the trainer a processing_class"),
        ({"rate": {}}, bare, {"processing_class": processor}, "the filters Rate need durations: add a column"),
        ({"length_ratio": {}}, None, {}, "the filters LengthRatio need rows with input_ids"),
        ({"rate": "fit"}, None, {}, "the filter rate cannot be fitted"),
    ):
        with pytest.raises(ValueError, match=message):
            labelled_runs.trainer(tmp_path, data=data, pl={"filters": spec}, more=more)
    with pytest.raises(ValueError, match="source_column='nowhere' is none of the columns"):
        labelled_runs.trainer(tmp_path, pl={"source_column": "nowhere"})
    with pytest.raises(ValueError, match="hidden_reference_column='nowhere' is none of the columns"):
        labelled_runs.trainer(tmp_path, pl={"hidden_reference_column": "nowhere"})
    with pytest.raises(TypeError, match=r"needs a datasets\.Dataset, whose columns can be taken out; got list"):
        labelled_runs.trainer(tmp_path, data=[{"truth": 1}], pl={"hidden_reference_column": "truth"})
    texts = labelled_runs.unlabelled().add_column("text", ["b"] * 20)
    with pytest.raises(ValueError, match="holds texts, and nothing decodes labels"):
        labelled_runs.trainer(tmp_path, data=texts, pl={"hidden_reference_column": "text"})
    with pytest.raises(ValueError, match="the score 'entropy', which this labeler does not give"):
        labelled_runs.trainer(tmp_path, pl={"filters": {"entropy": {"maximum": 1}}}).train()


def test_limits_are_fitted_on_the_labelled_set(tmp_path: Path) -> None:
    made = labelled_runs.trainer(
        tmp_path,
        pl={"filters": {"rate": "fit"}},
        more={"processing_class": labelled_runs.processor(tmp_path / "processor")},
    )
    (rate,) = made.judge.chain.filters
    gold = tiny.speech(20)
    decode = made.judge.decode
    rates = [len(decode(row["labels"].tolist()).strip()) / row["duration"] for row in gold]
    assert rate.max_characters == pytest.approx(1.5 * np.quantile(rates, 0.995))
    assert rate.min_characters == pytest.approx(np.quantile(rates, 0.005) / 1.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filters": {"rates": {}}}, "no filter is called 'rates'; did you mean rate"),
        ({"max_unlabeled_loss": 0.0}, r"max_unlabeled_loss must be above 0 or None, got 0\.0"),
        ({"pl_dropout": 1.0}, r"pl_dropout must lie in \[0, 1\) or be None, got 1\.0"),
        ({"cache_half_lives": 0.0}, r"cache_half_lives must be above 0 or None, got 0\.0"),
        ({"cache_half_lives": 1.0, "cache_steps": 4.0}, "give cache_steps or cache_half_lives, got 4 and 1"),
        ({"calibration_rows": -1}, "calibration_rows must be at least 0, got -1"),
        ({"on_collapse": "panic"}, "on_collapse must be one of off, warn, stop, rollback, got 'panic'"),
        ({"collapse_window": 0.0}, r"collapse_window must be above 0 reference steps, got 0\.0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.pseudo(**values)


def test_the_age_of_cached_labels_in_half_lives(tmp_path: Path) -> None:
    # Half-life at 0.9: 6.58 reference steps.
    half_life = np.log(2) / -np.log(0.9)
    made = labelled_runs.trainer(tmp_path, pl={"cache_half_lives": 3.0, "cache_refresh": 0.2}, max_steps=250)
    assert made.plan.recipe.cache_steps == pytest.approx(3 * half_life * 0.2)
    assert made.sampler.stream.pool.size == round(3 * made.plan.recipe.cache_steps + 0.49)
    made.train()
    ages = [entry["cache/age"] for entry in made.state.log_history if "cache/age" in entry]
    assert np.mean(ages[20:]) / half_life == pytest.approx(3.0, rel=0.2)
    with pytest.raises(ValueError, match=r"cache_half_lives=0\.5 makes a cache of 0\.658 reference steps"):
        labelled_runs.trainer(tmp_path, pl={"cache_half_lives": 0.5, "cache_refresh": 0.2})


def test_calibration_on_labelled_rows_by_hand(tmp_path: Path) -> None:
    sets = {"a": tiny.speech(4, 5), "b": tiny.speech(3, 6)}
    evaluating = {"eval_strategy": "steps", "eval_steps": 6, "more": {"eval_dataset": sets}}
    made = labelled_runs.trainer(tmp_path, pl={"calibration_rows": 6}, **evaluating)
    made.train()
    logged = [entry for entry in made.state.log_history if "calibration/ece" in entry]
    # Once for both evaluation sets.
    assert [entry["clock/reference_step"] for entry in logged] == [6.0, 12.0]
    gold = tiny.speech(20)
    edits = length = 0
    bins = np.zeros((10, 3))
    for row in (0, 4, 8, 11, 15, 19):
        label, wanted = Content().of(float(gold[row]["input_values"][0])), gold[row]["labels"].tolist()
        wrong = Levenshtein.distance(label.ids, wanted)
        edits, length = edits + wrong, length + len(wanted)
        bins[int(label.confidence * 10)] += (1, label.confidence, max(0, 1 - wrong / len(wanted)))
    assert logged[0]["calibration/error"] == pytest.approx(edits / length)
    assert logged[0]["calibration/ece"] == pytest.approx(np.abs(bins[:, 1] - bins[:, 2]).sum() / 6)
    without = labelled_runs.trainer(tmp_path, **evaluating)
    without.train()
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(without.model))
