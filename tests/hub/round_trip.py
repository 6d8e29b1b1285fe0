"""Loads from the Hub in `HF_ENDPOINT`, as a user's program does: `round_trip.py MODEL_REPO LABELS_REPO RUN OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoProcessor, ParakeetForCTC


def logits(model: Any) -> torch.Tensor:
    features = torch.linspace(-1, 1, 80 * 8).reshape(1, 80, 8)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_features=features).logits
    return result


def main(model_repo: str, labels_repo: str, run: str, out: str) -> None:
    torch.set_num_threads(1)
    pushed: Any = ParakeetForCTC.from_pretrained
    result: dict[str, Any] = {}
    for name, options, local in (("average", {}, f"{run}/ema"), ("student", {"subfolder": "student"}, run)):
        here, there = logits(pushed(local)), logits(pushed(model_repo, **options))
        result[name] = {"same": torch.equal(here, there), "sum": float(there.double().sum())}
        processor = AutoProcessor.from_pretrained(model_repo, **options)
        result[name]["ids"] = processor.tokenizer("bad face").input_ids
    labels = load_dataset(labels_repo, split="train")
    kept = labels.filter(lambda row: row["reason"] is None)
    result["labels"] = {"rows": len(labels), "kept": kept["row"][:], "confidence": kept["confidence"][:]}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
