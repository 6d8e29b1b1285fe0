"""Expected values: the recursions of the noisy parabola, computed independently to the digits given."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "noisy_parabola.py"
    spec = importlib.util.spec_from_file_location("noisy_parabola", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["noisy_parabola"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


script = load()
app = typer.Typer()
app.command()(script.main)

# kappa: rho of rule, linear, best; errors of E zeta**2 by rule, unscaled, linear, best, corrected; of E theta**2.
NEW = {
    8: (0.999200, 0.999200, 0.999201, 2.869e-4, 0.3726, 3.790e-4, 8.51e-5, 9.475e-5, 1.288e-4),
    64: (0.993620, 0.993600, 0.993697, 2.582e-3, 0.4464, 3.414e-3, 7.59e-4, 8.525e-4, 1.162e-3),
    256: (0.974724, 0.974400, 0.975913, 1.044e-2, 0.4549, 1.386e-2, 2.98e-3, 3.458e-3, 4.740e-3),
    1024: (0.902664, 0.897600, 0.919032, 4.168e-2, 0.4148, 5.629e-2, 1.02e-2, 1.335e-2, 1.964e-2),
}
# kappa: errors of E zeta by the rule, and corrected.
MEANS = {
    8: (1.932e-4, 6.439e-5),
    64: (1.739e-3, 5.792e-4),
    256: (7.053e-3, 2.352e-3),
    1024: (2.776e-2, 8.781e-3),
}
# kappa: errors of E zeta**2 in the old order, by the rule and linear.
OLD = {8: (1.450e-4, 1.069e-4), 64: (1.311e-3, 9.70e-4), 256: (5.387e-3, 4.031e-3), 1024: (2.307e-2, 1.784e-2)}


def compared(kappa: int, order: str, **changes: Any) -> dict[str, Any]:
    return {row.method: row for row in script.compare(script.Parabola(**changes), kappa, order)[0]}


def test_the_reference_run() -> None:
    for order, zeta, zeta2 in (("new", 0.73572209, 0.54128925), ("old", 0.73575888, 0.54134339)):
        base = script.moments(script.Parabola(), 1, script.plain_update(1 - 1e-4, order))
        assert len(base.zeta2) == 10_001 and {float(values[0]) for values in base} == {1.0}
        ends = [float(values[-1]) for values in (base.theta, base.zeta, base.theta2, base.zeta2)]
        assert ends == pytest.approx([0.36786105, zeta, 0.13532852, zeta2], abs=6e-9)


@pytest.mark.parametrize("kappa", NEW)
def test_the_new_order(kappa: int) -> None:
    rule, linear, best, *errors, model = NEW[kappa]
    found = compared(kappa, "new")
    for method, momentum in (("rule", rule), ("linear", linear), ("best", best)):
        assert found[method].momentum == pytest.approx(momentum, abs=1.1e-6)
    for method, expected in zip(("rule", "unscaled", "linear", "best", "corrected"), errors, strict=True):
        assert found[method].error == pytest.approx(expected, rel=1e-2 if method == "best" else 1e-3), method
    assert found["model"].error == pytest.approx(model, rel=1e-3)
    means = [found[method].error_of_mean for method in ("rule", "corrected")]
    assert means == pytest.approx(list(MEANS[kappa]), rel=1e-3)
    # Three times less than the rule, and less than the model's own.
    assert found["corrected"].error < min(0.34 * found["rule"].error, found["model"].error)


@pytest.mark.parametrize("kappa", OLD)
def test_the_old_order(kappa: int) -> None:
    found = compared(kappa, "old")
    assert [found[m].error for m in ("rule", "linear")] == pytest.approx(list(OLD[kappa]), rel=1e-3)
    assert found["best"].error <= found["linear"].error < found["rule"].error
    # There the best momentum lies below the rule, in the new order above it.
    assert found["best"].momentum < found["rule"].momentum < compared(kappa, "new")["best"].momentum
    if kappa == 256:
        assert found["best"].momentum == pytest.approx(0.974092, abs=1.1e-6)
    # Corrected, the orders differ no longer, to first order.
    assert found["corrected"].error == pytest.approx(compared(kappa, "new")["corrected"].error, rel=1e-3)


def test_at_kappa_one_there_is_nothing_to_tell_apart() -> None:
    for order in script.ORDERS:
        assert {row.error for row in compared(1, order).values()} == {0.0}


@pytest.mark.parametrize("order", ["new", "old"])
def test_the_search_finds_the_best_of_a_grid(order: str) -> None:
    problem = script.Parabola((1.0, 0.3), steps=2_000, eta=5e-4, momentum=1 - 5e-4)
    base = script.moments(problem, 1, script.plain_update(problem.momentum, order)).zeta2
    rule = 1 - problem.momentum**32
    grid = [
        script.error(script.moments(problem, 32, script.plain_update(1 - weight, order)).zeta2, base, 32)
        for weight in rule * np.exp(np.linspace(-math.log(4), math.log(4), 801))
    ]
    found = script.compare(problem, 32, order)[0][3]
    assert found.method == "best" and min(grid) * 0.9 < found.error <= min(grid)


def loop(problem: Any, kappa: int, update: Any) -> tuple[np.ndarray, np.ndarray]:
    """E zeta and E zeta**2 after every step, term by term in a loop."""
    h, (r, before, after) = kappa * problem.eta, update
    means, squares = [], []
    for a in problem.curvatures:
        q, z, m, p, cross, z2 = 1 - h * a, 1.0, 1.0, 1.0, 1.0, 1.0
        ones: tuple[list[float], list[float]] = ([1.0], [1.0])
        for _ in range(problem.steps // kappa):
            p_next = q * q * p + h * h * (problem.relative_noise * a * a * p + problem.constant_noise) / kappa
            z2 = (
                r * r * z2
                + before**2 * p
                + after**2 * p_next
                + 2 * r * before * cross
                + 2 * r * after * q * cross
                + 2 * before * after * q * p
            )
            cross = r * q * cross + before * q * p + after * p_next
            z, m, p = r * z + before * m + after * q * m, q * m, p_next
            ones[0].append(z)
            ones[1].append(z2)
        means.append(ones[0])
        squares.append(ones[1])
    return np.mean(means, axis=0), np.mean(squares, axis=0)


@pytest.mark.parametrize("update", [(0.9, 0.0, 0.1), (0.9, 0.1, 0.0), (0.8, 0.05, 0.15)])
def test_powers_of_matrices_are_the_recursion(update: tuple[float, float, float]) -> None:
    problem = script.Parabola((2.0, 0.5, 0.1), 1e-2, 0.95, 301, relative_noise=3.0, constant_noise=0.7)
    for kappa in (1, 7):
        found = script.moments(problem, kappa, script.Update(*update))
        zeta, zeta2 = loop(problem, kappa, update)
        assert len(found.zeta2) == 301 // kappa + 1
        np.testing.assert_allclose(found.zeta, zeta, rtol=1e-12)
        np.testing.assert_allclose(found.zeta2, zeta2, rtol=1e-12)


def test_many_dimensions_are_the_mean_of_single_ones() -> None:
    update = script.plain_update(0.99, "new")
    many = script.moments(script.Parabola((1.0, 0.2, 0.05), steps=1000), 16, update)
    single = [script.moments(script.Parabola((a,), steps=1000), 16, update) for a in (1.0, 0.2, 0.05)]
    for index in range(4):
        np.testing.assert_allclose(many[index], np.mean([one[index] for one in single], axis=0), rtol=1e-13)


def test_the_simulation_agrees_with_the_recursion_and_would_see_another_one() -> None:
    """With noise strong enough that the second moments are not the squares of the first."""
    changes: dict[str, Any] = {
        "curvatures": (1.0, 0.25),
        "eta": 1e-2,
        "momentum": 0.98,
        "steps": 256,
        "relative_noise": 20.0,
        "constant_noise": 4.0,
    }
    problem = script.Parabola(**changes)
    results = script.study(problem, [1, 4, 16], 4000, seed=0)
    assert len(results) == 3 * 2 * 6
    assert 0 < max(row.deviation for row in results) < 4
    assert {row.simulated_end for row in script.study(problem, [4], 500, seed=0)} == {
        row.simulated_end for row in script.study(problem, [4], 500, seed=0)
    }
    quiet = {
        (row.order, row.kappa, row.method): row.exact_end
        for kappa in (1, 4, 16)
        for order in script.ORDERS
        for row in compared(kappa, order, **(changes | {"relative_noise": 0.0, "constant_noise": 0.0})).values()
    }
    for row in results:
        assert row.standard_error < 0.05 * row.exact_end
        if (row.method, row.kappa) not in {("unscaled", 16), ("unscaled", 4)}:
            apart = abs(row.simulated_end - quiet[row.order, row.kappa, row.method])
            assert apart > 4 * row.standard_error, row


def test_json() -> None:
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 0
    objects = json.loads(done.stdout)
    assert [entry["kappa"] for entry in objects] == [2**n for n in range(11)]
    keys = {"kappa", "rule", "unscaled", "linear", "best", "corrected", "model", "rho_rule", "rho_linear", "rho_best"}
    for entry in objects:
        assert entry.keys() == keys
        if entry["kappa"] in NEW:
            assert entry["rule"] == pytest.approx(NEW[entry["kappa"]][3], rel=1e-3)
            assert entry["rho_best"] == pytest.approx(NEW[entry["kappa"]][2], abs=1.1e-6)


def test_table_csv_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--steps", "64", "--eta", "0.01", "--momentum", "0.99", "--replicates", "300", "--kappa", "1"]
    options += ["--kappa", "8", "--curvatures", "1", "--curvatures", "1,0.5", "--output-dir", str(tmp_path / "out")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    with (tmp_path / "out" / "noisy_parabola.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 6
    (row,) = (r for r in rows if (r["dimensions"], r["order"], r["kappa"], r["method"]) == ("2", "old", "8", "rule"))
    (exact,) = (
        r for r in script.compare(script.Parabola((1.0, 0.5), 0.01, 0.99, 64), 8, "old")[0] if r.method == "rule"
    )
    assert (float(row["error"]), float(row["momentum"])) == (exact.error, exact.momentum)
    assert abs(float(row["simulated_end"]) - exact.exact_end) < 4 * float(row["standard_error"])
    assert f"{exact.error:.3e}" in done.stdout and "standard errors from the recursion" in done.stdout
    assert (tmp_path / "out" / "noisy_parabola.png").read_bytes().startswith(b"\x89PNG")


def test_a_simulation_that_disagrees_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def wrong(problem: Any, kappa: int, chosen: Any, replicates: int, seed: int) -> list[tuple[float, float]]:
        return [(2.0, 0.1)] * (len(chosen) + 1)

    monkeypatch.setattr(script, "simulate", wrong)
    done = CliRunner().invoke(app, ["--steps", "8", "--kappa", "2", "--output-dir", str(tmp_path)])
    assert done.exit_code == 1 and "simulation and recursion disagree" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curvatures", "1,-1"], "curvatures must be finite numbers above 0"),
        (["--curvatures", "a"], "could not convert"),
        (["--kappa", "0"], "kappa must be between 1 and the run's 10000 steps, got 0"),
        (["--kappa", "64", "--momentum", "0.98"], "the linear momentum 1 - kappa (1 - rho) is not above 0"),
        (["--kappa", "64", "--eta", "0.02"], "passes the minimum"),
        (["--momentum", "1"], "momentum between 0 and 1"),
        (["--constant-noise", "-1"], "variances must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["--json", *options])
    assert done.exit_code == 1 and message in done.output.replace("\n", " ")


@pytest.mark.slow
def test_the_default_simulation_agrees_everywhere() -> None:
    for text in script.CURVATURES:
        curvatures = tuple(map(float, text.split(",")))
        results = script.study(script.Parabola(curvatures), script.KAPPAS, 4096 // len(curvatures), 0)
        assert max(row.deviation for row in results) < 4
