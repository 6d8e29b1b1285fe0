"""What was pushed is loaded by another process, which knows nothing but the names of the repositories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.loopback import TOKEN, Hub, loopback

from hf_ema_scaling.data.speech import build_character_processor

COMMANDS = "import sys; from hf_ema_scaling.cli import main; main(sys.argv[1:])"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | own


@pytest.mark.parametrize("lfs", [False, True])
@pytest.mark.slow
def test_round_trip(run: Path, labels: Path, tmp_path: Path, lfs: bool) -> None:
    out = tmp_path / "out.json"
    script = str(Path(__file__).with_name("round_trip.py"))
    with loopback(lfs=lfs) as hub:
        own = environment(hub, tmp_path / "home")
        for folder, name in ((run, "tester/model"), (labels, "tester/labels")):
            words = [sys.executable, "-c", COMMANDS, "push", str(folder), "--repo_id", name, "--private"]
            subprocess.run(words, env=own, check=True, timeout=300)
        words = [sys.executable, script, "tester/model", "tester/labels", str(run), str(out)]
        subprocess.run(words, env=own, check=True, timeout=300)
        uploads = [path for method, path in hub.requests if method == "PUT"]
    assert bool(uploads) == lfs
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["average"]["same"] and result["student"]["same"]
    assert result["average"]["sum"] != result["student"]["sum"]
    expected = build_character_processor(["abcdef"], num_mel_bins=8).tokenizer("bad face").input_ids
    assert result["average"]["ids"] == result["student"]["ids"] == expected
    assert result["labels"] == {"rows": 6, "kept": [0, 1, 3, 4], "confidence": pytest.approx([0.9, 0.75] * 2)}
