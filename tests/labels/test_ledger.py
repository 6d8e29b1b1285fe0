"""The ledger: counts, sums over processes, and its table."""

from __future__ import annotations

import json
from pathlib import Path

from hf_ema_scaling.labels.ledger import LEDGER_NAME, Ledger


def filled() -> Ledger:
    ledger = Ledger("seconds")
    Ledger.add(ledger.used, "web", [None, "rate", "rate"], [2.5, 0.25, 1.25])
    Ledger.add(ledger.used, "books", [None, "mine"], [3.0, 1.0])
    Ledger.add(ledger.made, "books", [None], [3.0])
    return ledger


def test_the_table_is_for_people() -> None:
    assert filled().table() == (
        "source  outcome  items  seconds  share\n"
        "books   kept         1        3  75.0%\n"
        "books   mine         1        1  25.0%\n"
        "web     kept         1      2.5  62.5%\n"
        "web     rate         2      1.5  37.5%"
    )
    assert (
        filled().reasons == ["mine", "rate"] and Ledger("samples").table() == "source  outcome  items  samples  share"
    )


def test_states_add_up_whatever_their_order() -> None:
    other = Ledger("seconds")
    Ledger.add(other.used, "web", ["copy", None], [0.1, 0.2])
    Ledger.add(other.used, "music", ["rate"], [0.7])
    sums = []
    for states in ((filled(), other), (other, filled())):
        total = Ledger("seconds")
        total.load_state_dict(*(json.loads(json.dumps(one.state_dict())) for one in states))
        sums.append(json.dumps(total.state_dict()))
        assert total.to_dict()["used"]["web"] == {
            "copy": {"items": 1, "seconds": 0.1},
            "kept": {"items": 2, "seconds": 2.7},
            "rate": {"items": 2, "seconds": 1.5},
        }
    assert sums[0] == sums[1]
    total.load_state_dict()
    assert total.to_dict() == {"unit": "seconds", "used": {}, "made": {}}


def test_the_file_holds_what_the_table_says(tmp_path: Path) -> None:
    filled().save(tmp_path / "new")
    written = json.loads((tmp_path / "new" / LEDGER_NAME).read_text())
    assert written["unit"] == "seconds" and written["made"] == {"books": {"kept": {"items": 1, "seconds": 3.0}}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LEDGER_NAME]


def test_what_else_is_known_of_items_is_counted_beside_the_unit() -> None:
    ledger = Ledger("samples", ("seconds", "tokens", "samples"))
    Ledger.add(ledger.used, "web", [None, "rate"], [1, 1], [2.5, 0.25], [30, 4])
    cells = {"kept": {"items": 1, "samples": 1, "seconds": 2.5, "tokens": 30}}
    assert ledger.to_dict()["used"]["web"] == cells | {
        "rate": {"items": 1, "samples": 1, "seconds": 0.25, "tokens": 4}
    }
    assert ledger.table().splitlines()[1].split() == ["web", "kept", "1", "1", "2.5", "30", "50.0%"]
    # What a checkpoint of before has not counted is not made up.
    before = Ledger("samples")
    Ledger.add(before.used, "web", [None], [1])
    ledger.load_state_dict(before.state_dict(), ledger.state_dict())
    assert ledger.to_dict()["used"]["web"]["kept"] == {"items": 2, "samples": 2, "seconds": 2.5, "tokens": 30}
