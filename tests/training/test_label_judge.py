"""Filters that the labels of a head cannot serve are refused when the trainer is made; limits that are fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import head_runs
import labelled_runs
import numpy as np
import pytest
import tiny
import tiny_generation

from hf_ema_scaling.labels import PseudoLabel, RegressionLabeler, generative_labeler_for, two_views
from hf_ema_scaling.labels.score_filters import NoSpeech
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.trainer import PseudoLabelTrainer


def speech(folder: Path, spec: Any) -> Any:
    return tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(folder),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(filters=spec),
    )


def generating(folder: Path, family: str, spec: Any, *, rows: Any = None, **pl: Any) -> Any:
    model = tiny_generation.gpt2(5) if family == "gpt2" else head_runs.model_of(family)
    options = {"language": "fr"} if family == "whisper" else {}
    args: Any = head_runs.arguments(folder)
    return PseudoLabelTrainer(
        model,
        args,
        train_dataset=head_runs.rows_of(family, 40) if rows is None else rows,
        unlabeled_dataset=head_runs.rows_of(family, 14, 1, labels=False),
        pseudo_label_args=PseudoLabelArguments(filters=spec, **pl),
        labeler=generative_labeler_for(model, max_new_tokens=8, **options),
        data_collator=head_runs.collate,
    )


def classifying(folder: Path, problem: str, outputs: int, spec: Any, *, labeler: Any = None, **pl: Any) -> Any:
    made = head_runs.texts(folder, head_runs.classifier(problem, outputs), tiny.sentences(30))
    made |= {"pseudo_label_args": tiny.pseudo(filters=spec, **pl), "labeler": labeler}
    return tiny.trainer(**made)


def test_scores_that_a_head_does_not_give_are_found_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        speech(tmp_path, {"logprob": {}, "no_speech": {}})
    said = str(raised.value)
    assert said.startswith("the filter no_speech judges by the score 'no_speech', which is not among those")
    assert "(blank, log_probability) of the labels of Wav2Vec2ForCTC (CTCLabeler)" in said
    # No processor, so nothing that needs text; rows have a duration.
    assert said.endswith(
        "filters that work here: too_long, duration, logprob, logprob_quantile, confidence, confidence_quantile"
    )
    with pytest.raises(ValueError, match=r"the filter entropy judges by the score 'entropy'.* of T5ForConditionalGen"):
        generating(tmp_path, "t5", {"entropy": {"maximum": 0.5}})
    with pytest.raises(ValueError, match=r"the filter no_speech judges by .* of GPT2LMHeadModel"):
        generating(tmp_path, "gpt2", {"no_speech": {}})
    with pytest.raises(ValueError, match=r"the filter logprob judges by .*\(entropy, margin\) of the labels"):
        classifying(tmp_path, "single_label_classification", 3, {"logprob": {}})
    with pytest.raises(ValueError, match=r"the filter disagree judges by .*\(two_views\(labeler, view\) gives it\)"):
        speech(tmp_path, {"disagree": {}})
    # Those that the head has, all at once.
    generating(tmp_path, "whisper", {"no_speech": {}, "no_eos": {}, "logprob": {}, "logprob_quantile": {"share": 0.1}})


def test_filters_for_labels_of_another_kind_are_found_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the filter repeat judges labels that are texts.*one class per row"):
        classifying(tmp_path, "single_label_classification", 3, {"repeat": {}})
    with pytest.raises(ValueError, match="the filter confidence_adaptive judges labels that are one class per row"):
        speech(tmp_path, {"confidence_adaptive": {}})
    with pytest.raises(ValueError, match=r"the filter confidence_adaptive judges .*several classes per row"):
        classifying(tmp_path, "multi_label_classification", 3, {"confidence_adaptive": {}})
    with pytest.raises(ValueError, match=r"the filter min_confidence=0\.5 judges by the confidence, which says"):
        classifying(tmp_path, "regression", 1, None, min_confidence=0.5)
    views = two_views(RegressionLabeler(1), lambda batch: batch, scale=1.0)
    made = classifying(tmp_path, "regression", 1, {"disagree": {}}, labeler=views)
    assert made.judge.chain.reasons == ("disagree",)


def test_filters_given_as_objects_are_looked_at_as_well(tmp_path: Path) -> None:
    class Own:
        reason = "own"
        needs_scores = frozenset({"mood"})

        def drops(self, row: Any) -> bool:
            return False

    for one, name in ((NoSpeech(), "no_speech"), (Own(), "Own")):
        with pytest.raises(ValueError, match=f"the filter {name} judges by the score"):
            tiny.trainer(
                tiny.wav2vec2(),
                tiny.arguments(tmp_path),
                tiny.speech(20),
                unlabeled_dataset=tiny.speech(20, 1, labels=False),
                filters=[one],
            )


def test_a_labeler_that_does_not_tell_is_asked_when_training_starts(tmp_path: Path) -> None:
    """Labels begin at reference step 10 of 12, and no step is taken."""
    made = labelled_runs.trainer(tmp_path, pl={"pl_start": 10.0, "filters": {"logprob": {}}})
    with pytest.raises(ValueError, match="the score 'log_probability', which this labeler does not give"):
        made.train()
    assert made.state.global_step == 0

    class Scored(labelled_runs.Content):
        def of(self, first: float) -> PseudoLabel:
            return PseudoLabel(super().of(first).ids, 0.5, scores={"log_probability": -0.5})

    made = labelled_runs.trainer(tmp_path, Scored(), pl={"pl_start": 10.0, "filters": {"logprob": {}}})
    made.train()
    assert made.ledger.to_dict()["used"]["unlabelled"]["kept"]["items"] > 0


def test_length_ratios_of_causal_rows_are_completion_over_prompt(tmp_path: Path) -> None:
    """Prompts of 10 to 29 tokens, completions half as long; the input holds both, one row with padding."""
    sizes = range(10, 30)
    rows = {
        "input_ids": [[11] * (n + n // 2) + [0] * (n == 12) for n in sizes],
        "attention_mask": [[1] * (n + n // 2) + [0] * (n == 12) for n in sizes],
        "labels": [[-100] * n + [11] * (n // 2) + [-100] * (n == 12) for n in sizes],
    }
    made = generating(tmp_path, "gpt2", {"length_ratio": "fit"}, rows=datasets.Dataset.from_dict(rows))
    (ratio,) = made.judge.chain.filters
    ratios = [(n // 2) / n for n in sizes]
    assert ratio.maximum == pytest.approx(1.5 * np.quantile(ratios, 0.995)) and ratio.maximum < 0.76
    assert ratio.minimum == pytest.approx(np.quantile(ratios, 0.005) / 1.5)
    # An encoder-decoder's input holds no label.
    rows = head_runs.rows_of("t5", 40)
    (ratio,) = generating(tmp_path, "t5", {"length_ratio": "fit"}, rows=rows).judge.chain.filters
    assert ratio.maximum == pytest.approx(1.5 * np.quantile([5 / len(row["input_ids"]) for row in rows], 0.995))


def test_fitting_lengths_of_labels_that_have_none_is_a_clear_error(tmp_path: Path) -> None:
    for problem, outputs in (("single_label_classification", 3), ("regression", 1)):
        with pytest.raises(ValueError, match=r"the filter length_ratio judges labels that are texts.* of Bert"):
            classifying(tmp_path, problem, outputs, {"length_ratio": "fit"})

    class Own:
        def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
            return [PseudoLabel((1,), 0.5)] * len(batch["input_ids"])

    # A labeler that does not say what its labels are: one label is no list of tokens.
    with pytest.raises(ValueError, match="the filter length_ratio cannot be fitted: the labelled data does not have"):
        classifying(tmp_path, "single_label_classification", 3, {"length_ratio": "fit"}, labeler=Own())
