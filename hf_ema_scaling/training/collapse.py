"""Collapse of pseudo-labels: its signs, and what to do about it.

A teacher that is its student's average can talk itself into an easy answer: blanks only, one class only, nothing that
is kept. The loss on unlabelled data then *falls*. The guard looks at the labels of each window of the reference clock,
so the alarm comes at the same data, up to one step, at every batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.data.passes import CLOCK_DUST

LEAST_ROWS = 50
"""Windows are joined until they hold so many unlabelled rows: fewer say nothing."""
EMPTY_SHARE, EMPTY_RISE = 0.5, 0.25
BLANK_APPROACH = 0.9
DISTINCT_SHARE, DISTINCT_NUMBER, LEAST_DISTINCT = 0.25, 0.5, 20
KL_SHARE, KL_FLOOR = 0.8, 0.5
MINORITY_SHARE, LEAST_MINORITY = 0.1, 20
WITHIN_SHARE = 0.4
SPREAD_SHARE = 0.1
WITHIN = "pseudo/minority_within"
COUNTED = {"pseudo/minority": "targets", "pseudo/yes": "yes_rows", "pseudo/no": "no_rows", WITHIN: "within"}
"""Shares that are judged against labelled data, and the name of what they are shares of."""
_RARE = {
    "pseudo/minority": "{:.2%} of labels are not their most frequent class or token",
    "pseudo/yes": "{:.2%} of labels have any class",
    "pseudo/no": "{:.2%} of labels lack any class",
    WITHIN: "labels are of one class at a time: {:.2%} are not the most frequent class of their step",
}
LEAST_TARGETS = 20
"""Frequencies of fewer tokens or classes are not compared: a single one is always all of them."""
LABELLESS_ROWS = 1000
"""After so many rows, over all processes, the guard asks whether any of their labels was kept."""
LENGTH_FACTOR = 3.0
MOST_ROLLBACKS = 3
BACKOFF = 0.5
"""Factor on the weight of pseudo-labels after each rollback."""


class CollapseError(RuntimeError):
    """Pseudo-labels have collapsed, and training has been stopped; the message says where to go on from."""


class RollBack(Exception):
    """Ends training at an alarm, for `train` to go on from an earlier checkpoint.

    Args:
        checkpoint: its folder.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


def signs_of_collapse(now: Mapping[str, float], healthy: Mapping[str, float] | None) -> list[str]:
    """Every sign of collapse in a window, in words; none for a window that is healthy.

    - nothing kept: no label of the window was kept.
    - classes: the divergence of labels from the labelled data (`pseudo/kl`) is above `KL_SHARE` of what it were if all
      labels were its most frequent class or token, and above `KL_FLOOR` nats, and has grown by half since the healthy
      window. The floor is for skewed data, where that limit says little: one class of 95 % is 0.05 nats from data
      that are 95 % of it, and so are labels that have 86 % of it.
    - one class: the share of labels that are not the most frequent class or token (`pseudo/minority`) is below
      `MINORITY_SHARE` of that in labelled data, and below half of that in the healthy window. This is what a constant
      class looks like however skewed the data are. It takes as many labels as hold `LEAST_MINORITY` others in
      labelled data (`targets`; the guard joins windows until there are), for then chance alone does not do it: to see
      2 where 20 are expected has a probability below 1e-6.
    - several classes: the share of labels that have any class (`pseudo/yes`), or of those that lack any (`pseudo/no`),
      is below `MINORITY_SHARE` of that in labelled data, and below half of that in the healthy window: the teacher
      says no to every class of every row, or yes. It takes as many rows as hold `LEAST_MINORITY` such labels in the
      labelled data (`yes_rows`, `no_rows`; windows are joined), so rare classes are no sign.
    - one class at a time: the share of labels that are not the most frequent class *of their step*
      (`pseudo/minority_within`), over that of the whole window, is below `WITHIN_SHARE` of what this is in labelled
      data, and the share is below half of that in the healthy window. A teacher that calls everything one class in
      this step and another class in the next has all classes over a window. It takes as many labels
      (`within`) as the rule of the minority, and is asked where all before are silent.
    - spread: of numbers, the standard deviation is below `SPREAD_SHARE` of that of labelled numbers, and below half of
      that in the healthy window (`pseudo/spread`): the teacher says much the same of every row.
    - empty: more than `EMPTY_SHARE` of labels are empty, `EMPTY_RISE` more than in the healthy window, while the loss
      on unlabelled data is lower than there, or gone.
    - blank: the share of blank frames has come nine tenths of the way from the healthy window to 1, while that loss is
      lower.
    - distinct: the share of distinct labels is below a quarter, and their number below half, of the healthy window's,
      which had at least `LEAST_DISTINCT`: of a few rare classes some windows hold none.
    - length: labels have become `LENGTH_FACTOR` times as long or as short, against labelled data.

    Args:
        now: metrics of the window (`LabelCounts.metrics`, `student_metrics`,
            `LabelStatistics.take_window`), `rows`, and for each of `COUNTED` what
            it is a share of: numbers of tokens or classes of kept labels (`targets`, `within`), and kept rows.
        healthy: those of the first healthy window; None before there is one, which leaves the first five rules.
    """
    found = []
    if now.get("pseudo/kept") == 0:
        found.append(f"none of {now['rows']:.0f} labels was kept")
    kl, limit = now.get("pseudo/kl", 0.0), now.get("pseudo/kl_limit", math.inf)
    before = (healthy or {}).get("pseudo/kl", 0.0)
    if kl > max(KL_SHARE * limit, KL_FLOOR, 1.5 * before):
        found.append(
            f"labels are {kl:.2f} nats from the labelled data, where one single class or token is {limit:.2f}"
        )
    for name, text in _RARE.items():
        share, labelled = now.get(name, 1.0), now.get(f"{name}_labelled", 0.0)
        before = (healthy or {}).get(name, math.inf)
        certain = now.get(COUNTED[name], 0.0) * labelled >= LEAST_MINORITY
        if name == WITHIN:
            rare = not found and _is_rare_in_steps(now)
        else:
            rare = share < MINORITY_SHARE * labelled
        if certain and rare and share < 0.5 * before:
            found.append(f"{text.format(share)}, {labelled:.2%} in the labelled data")
    spread, before = now.get("pseudo/spread", math.inf), (healthy or {}).get("pseudo/spread", math.inf)
    if spread < min(SPREAD_SHARE, 0.5 * before):
        found.append(f"labels spread {spread:.3f} times as far as the labelled numbers")
    if healthy is None:
        return found
    falls = now.get("loss/unlabelled", -math.inf) < healthy.get("loss/unlabelled", math.inf)
    empty, empty_before = (one.get("pseudo/dropped_empty", 0.0) for one in (now, healthy))
    if falls and empty > EMPTY_SHARE and empty - empty_before > EMPTY_RISE:
        found.append(f"{empty:.0%} of labels are empty, {empty_before:.0%} before")
    blank, blank_before = (one.get("score/blank", 0.0) for one in (now, healthy))
    if falls and blank > blank_before + BLANK_APPROACH * (1 - blank_before):
        found.append(f"{blank:.1%} of frames are blank, {blank_before:.1%} before")
    shares = [one.get("pseudo/distinct", 0.0) for one in (now, healthy)]
    numbers = [one.get("pseudo/distinct", 0.0) * one.get("pseudo/kept", 0.0) * one["rows"] for one in (now, healthy)]
    fewer = shares[0] < DISTINCT_SHARE * shares[1] and numbers[0] < DISTINCT_NUMBER * numbers[1]
    fewer = fewer and numbers[1] >= LEAST_DISTINCT
    if now.get("pseudo/kept", 0.0) > 0 and fewer:
        found.append(f"{shares[0]:.1%} of labels are distinct, {shares[1]:.1%} before")
    lengths = [one.get("pseudo/length_ratio", 0.0) for one in (now, healthy)]
    if min(lengths) > 0 and not 1 / LENGTH_FACTOR <= lengths[0] / lengths[1] <= LENGTH_FACTOR:
        found.append(f"labels are {lengths[0]:.2f} times as long as labelled ones, {lengths[1]:.2f} times before")
    return found


def _is_rare_in_steps(now: Mapping[str, float]) -> bool:
    """Whether, over that of the window, the minority of steps is far smaller than in labelled data."""
    share, labelled = now.get("pseudo/minority", 1.0), now.get("pseudo/minority_labelled", 0.0)
    within, usual = now.get(WITHIN, 1.0), now.get(f"{WITHIN}_labelled", 0.0)
    return min(share, labelled) > 0 and within / share < WITHIN_SHARE * usual / labelled


class CollapseGuard:
    """What the windows of a run looked like, which checkpoints are good, and what weight pseudo-labels have left.

    A checkpoint is **good** when every window up to its clock ended without an alarm. A rollback goes to the last good
    one; from there pseudo-labels have weight 0 up to the clock of the alarm (they are drawn, labelled and counted all
    the same, so the data of the run stays what it was), and then `BACKOFF` times their weight, for each rollback.

    Args:
        pl_start: reference step at which pseudo-labels begin; checkpoints up to there are good.

    Attributes:
        shares: for each of `COUNTED` labels that are of this share (not the most frequent class of their window, for
            one), and all, since there were enough of them to judge by.
        labelless_from: unlabelled rows drawn when it was last asked whether any label is kept.
        alarms: clock and signs of every alarm.
        pauses: clock of the checkpoint and of the alarm of every rollback.
    """

    def __init__(self, pl_start: float) -> None:
        self.pl_start = pl_start
        self.healthy: dict[str, float] | None = None
        self.healthy_until = pl_start
        self.checkpoints: list[list[Any]] = []
        self.pauses: list[list[float]] = []
        self.alarms: list[list[Any]] = []
        self.shares = {name: [0.0, 0.0] for name in COUNTED}
        self.labelless_from = 0
        self._decided: dict[str, Any] = {}

    def look(self, metrics: Mapping[str, float], clock: float) -> list[str]:
        """Judge the window that ends at `clock`, and note what it says; the signs of collapse in it."""
        if metrics.get("targets", math.inf) < LEAST_TARGETS:
            metrics = {name: value for name, value in metrics.items() if name != "pseudo/kl"}
        joined = {name: self._joined(name, metrics) for name in COUNTED if name in metrics}
        sizes = {COUNTED[name]: size for name, (_, size) in joined.items()}
        signs = signs_of_collapse(
            {**metrics, **{name: share for name, (share, _) in joined.items()}, **sizes}, self.healthy
        )
        if signs:
            self.alarms.append([clock, signs])
            return signs
        self.healthy_until = clock
        if self.healthy is None:
            self.healthy = {name: value for name, value in metrics.items() if name not in COUNTED}
        for name, (share, size) in joined.items():
            # What is compared with later is a share that was certain, too.
            if size and self.shares[name][1] == 0:
                self.healthy.setdefault(name, share)
        return []

    def _joined(self, name: str, metrics: Mapping[str, float]) -> tuple[float, float]:
        """A share over as many windows as it takes to judge it, and what it is a share of."""
        here = metrics.get(COUNTED[name], 0.0)
        before, size = self.shares[name]
        part, size = before + metrics[name] * here, size + here
        enough = size * metrics.get(f"{name}_labelled", 0.0) >= LEAST_MINORITY
        self.shares[name] = [0.0, 0.0] if enough else [part, size]
        return (part / size if size else 1.0), size

    def labelless(self, dropped: Mapping[str, int], clock: float) -> list[str]:
        """Note that none of the last rows has a label that is kept; the sign of it.

        Args:
            dropped: rows by reason.
            clock: now.
        """
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
        signs = [f"none of the last {sum(dropped.values())} unlabelled rows got a label that is kept ({reasons})"]
        self.alarms.append([clock, signs])
        return signs

    def saved(self, checkpoint: str, clock: float) -> None:
        """Note a checkpoint, and forget those before the last good one."""
        good = self.good()
        first = good[0][1] if good else 0.0
        self.checkpoints = [entry for entry in self.checkpoints if first <= entry[1] < clock]
        self.checkpoints.append([checkpoint, clock])

    def good(self) -> list[tuple[str, float]]:
        """Good checkpoints and their clocks, the last one first."""
        until = self.healthy_until + CLOCK_DUST
        return [(str(name), float(clock)) for name, clock in reversed(self.checkpoints) if clock <= until]

    def roll_back(self, clock: float, alarm: float) -> None:
        """Pause pseudo-labels from the checkpoint at `clock` to the alarm, in whatever is loaded next."""
        self._decided = {"pauses": [*self.pauses, [clock, alarm]], "alarms": self.alarms}

    def weight(self, clocks: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is left of the weight of pseudo-labels at these places on the clock: 1 without rollbacks."""
        weight = np.ones(len(clocks))
        for start, end in self.pauses:
            paused = (clocks > start - CLOCK_DUST) & (clocks < end - CLOCK_DUST)
            weight *= np.where(paused, 0.0, np.where(clocks < end - CLOCK_DUST, 1.0, BACKOFF))
        return weight

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON values; the same on every process."""
        return {
            "healthy": self.healthy,
            "healthy_until": self.healthy_until,
            "checkpoints": self.checkpoints,
            "pauses": self.pauses,
            "alarms": self.alarms,
            "shares": self.shares,
            "labelless_from": self.labelless_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it; what `roll_back` decided outlives the state of the checkpoint it goes back to."""
        state, self._decided = {**state, **self._decided}, {}
        self.healthy = state.get("healthy")
        self.healthy_until = float(state.get("healthy_until", self.pl_start))
        self.checkpoints = [list(entry) for entry in state.get("checkpoints", [])]
        self.pauses = [list(entry) for entry in state.get("pauses", [])]
        self.alarms = [list(entry) for entry in state.get("alarms", [])]
        self.shares = {name: list(state.get("shares", {}).get(name, [0.0, 0.0])) for name in COUNTED}
        self.labelless_from = int(state.get("labelless_from", 0))
