"""What the EMA scaling rule gets right, where everything can be computed: gradient descent on a noisy parabola.

    python scripts/noisy_parabola.py

Every coordinate has L = a theta**2 / 2 and gradient noise of variance (b (a theta)**2 + c) / kappa at a batch of kappa
reference batches. SGD takes steps of kappa * eta; the average zeta moves by one of

    rule        rho**kappa ("How to Scale Your EMA", arXiv 2307.13813)
    unscaled    rho
    linear      1 - kappa (1 - rho), the rule to first order
    best        the momentum of the smallest error, found by search
    corrected   the rule with the path correction of `hf_ema_scaling.scaling.path_correction`

First and second moments follow linear recursions, so the errors are exact: the largest difference to kappa = 1 along
the run, at equal data seen, of E zeta**2 (mean over coordinates). `model` is the same for E theta**2: what the
optimizer's own scaling leaves. A simulation with a fixed seed stands beside the recursion.

Order "new": the average takes the weights after the step, as frameworks and this library do; "old": those before it.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer

from hf_ema_scaling.scaling import log_momentum, path_correction, scale_momentum

FloatArray = npt.NDArray[np.float64]

KAPPAS = [2**n for n in range(11)]
CURVATURES = ["1", "1,0.5,0.25,0.125,0.0625,0.03125"]
ORDERS = ("new", "old")
METHODS = ("rule", "unscaled", "linear", "best", "corrected")
LABELS = {
    "unscaled": "unscaled: rho",
    "linear": "linear: 1 - kappa (1 - rho)",
    "rule": "rule: rho ** kappa",
    "best": "best momentum",
    "corrected": "rule, path-corrected",
    "model": "the model itself",
}
MOST_STANDARD_ERRORS = 4.0
GOLDEN = (math.sqrt(5.0) - 1) / 2


def fail(message: str) -> typer.Exit:
    """Print why, and the exception that ends the program."""
    typer.secho(message, fg=typer.colors.RED, err=True)
    return typer.Exit(1)


@dataclass(frozen=True)
class Parabola:
    """A problem and its recipe at the reference batch; every coordinate of theta and zeta starts at 1.

    Args:
        curvatures: a of every coordinate; coordinates are independent.
        eta: learning rate.
        momentum: rho of the average.
        steps: reference steps.
        relative_noise: b.
        constant_noise: c.

    Raises:
        ValueError: for values outside their range.
    """

    curvatures: tuple[float, ...] = (1.0,)
    eta: float = 1e-4
    momentum: float = 1 - 1e-4
    steps: int = 10_000
    relative_noise: float = 0.5
    constant_noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.curvatures or not all(math.isfinite(a) and a > 0 for a in self.curvatures):
            raise ValueError(f"curvatures must be finite numbers above 0, got {self.curvatures}")
        if not (self.eta > 0 and 0 < self.momentum < 1 and self.steps >= 1):
            raise ValueError(f"eta and steps must be above 0 and momentum between 0 and 1, got {self}")
        if not (self.relative_noise >= 0 and self.constant_noise >= 0):
            raise ValueError(f"variances must be at least 0, got {self.relative_noise} and {self.constant_noise}")

    def check_kappa(self, kappa: int) -> None:
        """Refuses a kappa at which the run, the optimizer or the linear momentum means nothing."""
        if not 1 <= kappa <= self.steps:
            raise ValueError(f"kappa must be between 1 and the run's {self.steps} steps, got {kappa}")
        if kappa * (1 - self.momentum) >= 1:
            raise ValueError(f"at kappa={kappa} the linear momentum 1 - kappa (1 - rho) is not above 0: lower kappa")
        if kappa * self.eta * max(self.curvatures) >= 1:
            raise ValueError(f"at kappa={kappa} a step, kappa * eta * a, passes the minimum: lower kappa or eta")


class Update(NamedTuple):
    """Coefficients of `zeta' = keep * zeta + before * theta + after * theta'`."""

    keep: float
    before: float
    after: float


class Moments(NamedTuple):
    """Means over coordinates after each step, float64 `(steps + 1,)`."""

    theta: FloatArray
    zeta: FloatArray
    theta2: FloatArray
    zeta2: FloatArray


def plain_update(momentum: float, order: str) -> Update:
    """The ordinary update: of the weights after the step in the new order, before it in the old."""
    return Update(momentum, 0.0, 1 - momentum) if order == "new" else Update(momentum, 1 - momentum, 0.0)


def corrected_update(problem: Parabola, kappa: int, order: str) -> Update:
    """kappa reference updates for weights that move evenly during the step.

    The new order is the library's. In the old order every reference update sees the weights of one reference step
    earlier, a share of 1 / kappa of the way: w - (1 - r) / kappa in the place of w.
    """
    lead, after = path_correction(kappa * log_momentum(problem.momentum), kappa)
    update = Update((1 - lead) * (1 - after), lead * (1 - after), after)
    if order == "new":
        return update
    earlier = (update.before + update.after) / kappa
    return Update(update.keep, update.before + earlier, update.after - earlier)


def moments(problem: Parabola, kappa: int, update: Update) -> Moments:
    """Exact moments of a run with steps of `kappa` reference batches."""
    a = np.array(problem.curvatures)
    h, (r, before, after) = kappa * problem.eta, update
    q = 1 - h * a
    # theta' has the mean square growth * theta**2 + added.
    growth = q**2 + h**2 * problem.relative_noise * a**2 / kappa
    added = h**2 * problem.constant_noise / kappa
    first = np.zeros((len(a), 2, 2))  # acts on (E theta, E zeta)
    first[:, 0, 0], first[:, 1, 0], first[:, 1, 1] = q, before + after * q, r
    second = np.zeros((len(a), 4, 4))  # acts on (E theta**2, E theta zeta, E zeta**2, 1)
    second[:, 0, 0], second[:, 0, 3] = growth, added
    second[:, 1, 0], second[:, 1, 1], second[:, 1, 3] = before * q + after * growth, r * q, after * added
    second[:, 2, 0] = before**2 + 2 * before * after * q + after**2 * growth
    second[:, 2, 1], second[:, 2, 2], second[:, 2, 3] = 2 * r * (before + after * q), r**2, after**2 * added
    second[:, 3, 3] = 1.0
    count = problem.steps // kappa
    means, squares = orbit(first, count), orbit(second, count)
    return Moments(means[0], means[1], squares[0], squares[2])


def orbit(matrices: FloatArray, count: int) -> FloatArray:
    """Mean over d of `matrices[d] ** k @ ones`, for k = 0 to `count`; `(d, n, n)` to `(n, count + 1)`.

    By doubling, so that nothing loops over steps: the k-th power of the matrix takes the first k states to the next k.
    """
    states = np.ones((*matrices.shape[:2], 1))
    while states.shape[-1] <= count:
        states = np.concatenate([states, matrices @ states], axis=-1)
        matrices = matrices @ matrices
    mean: FloatArray = states[..., : count + 1].mean(axis=0)
    return mean


def error(scaled: FloatArray, reference: FloatArray, kappa: int) -> float:
    """Largest difference along the run, at equal data seen."""
    return float(np.abs(scaled - reference[::kappa][: len(scaled)]).max())


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-9) -> float:
    """Where a function with one minimum between `low` and `high` has it."""
    while high - low > tolerance:
        inner, outer = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if function(inner) < function(outer):
            high = outer
        else:
            low = inner
    return (low + high) / 2


def best_momentum(problem: Parabola, kappa: int, order: str, reference: FloatArray) -> float:
    """The momentum r of the smallest error of E zeta**2, by a search over log(1 - r) around the rule."""

    def loss(log_weight: float) -> float:
        update = plain_update(-math.expm1(log_weight), order)
        return error(moments(problem, kappa, update).zeta2, reference, kappa)

    rule = math.log(1 - scale_momentum(problem.momentum, kappa))
    if kappa == 1:  # the reference itself
        return problem.momentum
    return -math.expm1(golden_section(loss, rule - math.log(4), min(rule + math.log(4), -1e-9)))


class Result(NamedTuple):
    """One method (or `model`) at one kappa; a row of the CSV file."""

    dimensions: int
    order: str
    kappa: int
    method: str
    momentum: float | None
    error: float
    """Of E zeta**2, or E theta**2 for the model."""
    error_of_mean: float
    """Of E zeta, or E theta."""
    exact_end: float
    """E zeta**2 at the end of the run."""
    simulated_end: float | None = None
    standard_error: float | None = None

    @property
    def deviation(self) -> float:
        """Standard errors between simulation and recursion."""
        if self.simulated_end is None or not self.standard_error:
            return 0.0
        return abs(self.simulated_end - self.exact_end) / self.standard_error


def compare(problem: Parabola, kappa: int, order: str) -> tuple[list[Result], dict[str, Update]]:
    """Exact results of every method at one kappa, and the updates that gave them."""
    problem.check_kappa(kappa)
    base = moments(problem, 1, plain_update(problem.momentum, order))
    rho = problem.momentum
    chosen = {
        "rule": plain_update(scale_momentum(rho, kappa), order),
        "unscaled": plain_update(rho, order),
        "linear": plain_update(1 - kappa * (1 - rho), order),
        "best": plain_update(best_momentum(problem, kappa, order, base.zeta2), order),
        "corrected": corrected_update(problem, kappa, order),
    }
    key = (len(problem.curvatures), order, kappa)
    rows = []
    for method, update in chosen.items():
        run = moments(problem, kappa, update)
        errors = error(run.zeta2, base.zeta2, kappa), error(run.zeta, base.zeta, kappa)
        rows.append(Result(*key, method, update.keep, *errors, float(run.zeta2[-1])))
    errors = error(run.theta2, base.theta2, kappa), error(run.theta, base.theta, kappa)
    rows.append(Result(*key, "model", None, *errors, float(run.theta2[-1])))
    return rows, chosen


def simulate(
    problem: Parabola, kappa: int, chosen: Sequence[Update], replicates: int, seed: int
) -> Iterator[tuple[float, float]]:
    """Mean and standard error of zeta**2 at the end of the run for each update, and of theta**2 last.

    Args:
        problem: the problem.
        kappa: reference batches per step.
        chosen: updates; all see the same weights.
        replicates: independent runs, at least 2.
        seed: of the noise, together with kappa.
    """
    rng = np.random.default_rng([seed, kappa])
    a = np.array(problem.curvatures)
    keep, before, after = (np.array(column)[:, None, None] for column in zip(*chosen, strict=True))
    theta = np.ones((replicates, len(a)))
    zeta = np.ones((len(chosen), replicates, len(a)))
    h = kappa * problem.eta
    for _ in range(problem.steps // kappa):
        deviation = np.sqrt((problem.relative_noise * (a * theta) ** 2 + problem.constant_noise) / kappa)
        moved = theta - h * (a * theta + deviation * rng.standard_normal(theta.shape))
        zeta *= keep
        zeta += before * theta
        zeta += after * moved
        theta = moved
    for values in (*zeta, theta):
        squares = (values**2).mean(axis=-1)
        yield float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(replicates))


def study(problem: Parabola, kappas: Sequence[int], replicates: int, seed: int) -> list[Result]:
    """Exact and simulated results at every kappa, in both orders."""
    results = []
    for kappa in kappas:
        compared = [compare(problem, kappa, order) for order in ORDERS]
        chosen = [update for _, of_methods in compared for update in of_methods.values()]
        *simulated, model = simulate(problem, kappa, chosen, replicates, seed)
        for rows, of_methods in compared:
            ends = [simulated.pop(0) for _ in of_methods]
            for row, (mean, deviation) in zip(rows, [*ends, model], strict=True):
                results.append(row._replace(simulated_end=mean, standard_error=deviation))
    return results


def as_json(problem: Parabola, kappas: Sequence[int]) -> list[dict[str, Any]]:
    """Errors of E zeta**2 in the new order, one object per kappa."""
    objects: list[dict[str, Any]] = []
    for kappa in kappas:
        rows = {row.method: row for row in compare(problem, kappa, "new")[0]}
        objects.append({"kappa": kappa} | {method: row.error for method, row in rows.items()})
        objects[-1] |= {f"rho_{method}": rows[method].momentum for method in ("rule", "linear", "best")}
    return objects


def table(results: Sequence[Result]) -> str:
    """The results of one problem in one order, a line per kappa."""
    heads = ["kappa", "rho**k", "linear", "rho*", *(*METHODS, "model"), "end", "simulated", "s.e."]
    lines = [heads]
    for kappa in dict.fromkeys(row.kappa for row in results):
        rows = {row.method: row for row in results if row.kappa == kappa}
        line = [str(kappa), *(f"{rows[method].momentum:.6f}" for method in ("rule", "linear", "best"))]
        line += [f"{rows[method].error:.3e}" for method in (*METHODS, "model")]
        rule = rows["rule"]
        lines.append([*line, f"{rule.exact_end:.6f}", f"{rule.simulated_end:.6f}", f"{rule.standard_error:.1e}"])
    return "\n".join("  ".join(f"{cell:>9}" for cell in line) for line in lines)


def plot(path: Path, studies: Sequence[Sequence[Result]]) -> None:
    """Errors against kappa on logarithmic axes: a row per problem, a column per order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(studies)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(studies), len(ORDERS), squeeze=False, sharex=True, sharey="row")
    for line, results in zip(axes, studies, strict=True):
        for axis, order in zip(line, ORDERS, strict=True):
            for number, (method, label) in enumerate(LABELS.items()):
                rows = [row for row in results if (row.order, row.method) == (order, method) and row.kappa > 1]
                style = "k:" if method == "model" else f"C{number}o-"
                axis.loglog([row.kappa for row in rows], [row.error for row in rows], style, ms=3, label=label)
            axis.set_xscale("log", base=2)
            axis.set_title(f"dimensions: {results[0].dimensions}, {order} order")
            axis.set(xlabel="kappa", ylabel="largest error along the run")
            axis.grid(alpha=0.3)
        line[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(
    curvatures: Annotated[
        list[str], typer.Option(help="Curvatures of the coordinates of one problem, separated by commas; repeatable.")
    ] = CURVATURES,
    kappa: Annotated[list[int], typer.Option(help="Reference batches per step; repeatable.")] = KAPPAS,
    eta: Annotated[float, typer.Option(help="Learning rate at the reference batch.")] = 1e-4,
    momentum: Annotated[float, typer.Option(help="rho at the reference batch.")] = 1 - 1e-4,
    steps: Annotated[int, typer.Option(help="Reference steps.")] = 10_000,
    relative_noise: Annotated[float, typer.Option(help="b, variance of the noise per squared gradient.")] = 0.5,
    constant_noise: Annotated[float, typer.Option(help="c, variance of the noise at the minimum.")] = 0.0,
    replicates: Annotated[int, typer.Option(help="Simulated coordinates per kappa.", min=2)] = 4096,
    seed: Annotated[int, typer.Option(help="Of the simulation.", min=0)] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder of the CSV file and the figure.")] = Path(
        "runs/noisy_parabola"
    ),
    as_json_list: Annotated[
        bool, typer.Option("--json", help="Print the errors for the first problem in the new order, nothing else.")
    ] = False,
) -> None:
    """Errors of the average of the weights on a noisy parabola, by momentum and kappa."""
    try:
        problems = [
            Parabola(tuple(map(float, text.split(","))), eta, momentum, steps, relative_noise, constant_noise)
            for text in curvatures
        ]
        for problem in problems:
            for each in kappa:
                problem.check_kappa(each)
    except ValueError as refused:
        raise fail(str(refused)) from refused
    if as_json_list:
        typer.echo(json.dumps(as_json(problems[0], kappa), indent=1, allow_nan=False))
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise fail('the figure needs matplotlib: pip install "hf-ema-scaling[report]"')
    studies = []
    for problem in problems:
        runs = max(2, replicates // len(problem.curvatures))
        studies.append(study(problem, kappa, runs, seed))
        for order in ORDERS:
            rows = [row for row in studies[-1] if row.order == order]
            worst = max(row.deviation for row in rows)
            typer.echo(f"\ndimensions: {rows[0].dimensions}, {order} order; errors of E zeta**2 (model: E theta**2)")
            typer.echo(
                f"{table(rows)}\nsimulation of {runs} runs: at most {worst:.1f} standard errors from the recursion"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    every = [row for results in studies for row in results]
    with (output_dir / "noisy_parabola.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([Result._fields, *every])
    plot(output_dir / "noisy_parabola.png", studies)
    typer.echo(f"\nwrote {output_dir / 'noisy_parabola.csv'} and {output_dir / 'noisy_parabola.png'}")
    worst = max(row.deviation for row in every)
    if worst > MOST_STANDARD_ERRORS:
        raise fail(f"simulation and recursion disagree: {worst:.1f} standard errors apart, at most 4 expected")


if __name__ == "__main__":
    typer.run(main)
