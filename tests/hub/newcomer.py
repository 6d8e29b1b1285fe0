"""Loads from the Hub in `HF_ENDPOINT` what a recipe trained: `newcomer.py REPO RUN WAV OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import soundfile
import torch
from transformers import AutoModelForCTC, AutoProcessor


def main(repo: str, run: str, wav: str, out: str) -> None:
    torch.set_num_threads(1)
    samples, rate = soundfile.read(wav, dtype="float32")
    result: dict[str, Any] = {}
    for name, options, local in (("average", {}, f"{run}/ema"), ("student", {"subfolder": "student"}, run)):
        seen: list[torch.Tensor] = []
        ids: list[list[int]] = []
        for place, where in ((repo, options), (local, {})):
            processor = AutoProcessor.from_pretrained(place, **where)
            inputs = processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt")
            with torch.no_grad():
                seen.append(AutoModelForCTC.from_pretrained(place, **where).eval()(**inputs).logits)
            ids.append(processor.tokenizer("ab ba").input_ids)
        same = torch.equal(*seen) and ids[0] == ids[1]
        result[name] = {"same": same, "sum": float(seen[0].double().sum()), "shape": list(seen[0].shape)}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
