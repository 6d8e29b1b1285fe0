"""Speech in files, beside a manifest that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000


def write_manifest(path: Path, rows: int, *, seed: int, text: str | None = None, labelled: bool = True) -> Path:
    """`rows` tones of 0.5 s and more in noise, beside a manifest that names them by relative paths."""
    generator = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        seconds = 0.5 + 0.1 * int(generator.integers(0, 6))
        time = np.arange(int(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * generator.uniform(200, 2000) * time) + 0.05 * generator.standard_normal(
            len(time)
        )
        name = f"wav/{path.stem}{row}.wav"
        (path.parent / "wav").mkdir(parents=True, exist_ok=True)
        soundfile.write(path.parent / name, tone.astype(np.float32), RATE)
        line: dict[str, Any] = {"audio": name, "duration": seconds, "id": f"{path.stem}{row}"}
        if labelled:
            line["text"] = text or " ".join(generator.choice(["ab", "ba", "cab", "bc"], size=2))
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
