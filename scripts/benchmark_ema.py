"""What one update of an average costs, ours beside five others and beside the limit, and whether the average is right.

    python scripts/benchmark_ema.py                  # about three minutes on two cores
    python scripts/benchmark_ema.py --json

Needs the extra "bench" (timm, diffusers, ema-pytorch, torch_ema) and peft; what is not installed is left out.

**Time.** All averages of one model are alive at once and take turns, round by round, each time in another order. `ms`
is the median over the rounds, `ratio_to_limit` the median of what an update took over what the limit took in the same
round, so that a machine that slows down does not favour anybody. The table also has the shortest. The limit is one
`lerp_` over two flat float32 tensors with as many elements as the model has trainable ones, also where parameters are
bfloat16.

**Models.** `wav2vec2-94M`: `Wav2Vec2ForCTC` of the base size. `many-small`: 1200 linear layers of 64 x 64, which makes
2400 tensors with 5.0 M weights, where calls and not bytes take the time. `lora`: the first with rank-64 adapters on
every linear layer of its encoder (10.6 M trainable weights); averages that copy a module copy all of it, averages of
parameters are given the trainable ones.

**Right.** On a small model of the same layout, with a tied embedding, an integer counter and a buffer of position ids
added, weights take 1000 random steps; the float64 recursion over the very weights of the steps is what every average
should hold. Of an average are judged the tensors that it keeps: parameters to `TOLERANCE` of their largest value,
integer buffers to the bit. Momenta are held constant and start values are the weights before the first step: where
another library begins with copies or a warm-up, it is set up or first updated so that both come out the same.

**Temporary bytes** are those of all results with storage of their own in one update.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.initialization import no_init_weights

from hf_ema_scaling import WeightAverage
from hf_ema_scaling.training.stock import nonfinite_parameter

RHO = 0.9995
TOLERANCE = 1e-4
MODELS = ["wav2vec2-94M", "many-small", "lora"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = list(DTYPES)
LIMIT, OURS = "limit (one flat lerp_)", "ours (WeightAverage)"
_WARM = 2
"""Updates before the first measured one: some averages allocate then, or begin with copies."""


@dataclass
class Row:
    """One average on one model."""

    name: str
    model: str
    dtype: str
    milliseconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    temporary: int | None = None
    right: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The columns that others read."""
        ms = median(self.milliseconds) if self.milliseconds else None
        ratios = [mine / limit for mine, limit in zip(self.milliseconds, self.limits, strict=False)]
        ratio = median(ratios) if ratios else None
        return {
            "name": self.name, "model": self.model, "dtype": self.dtype,
            "ms": ms, "ratio_to_limit": ratio, "right": self.right,
        }  # fmt: skip


@dataclass
class Average:
    """An average under test: how it is updated, and the tensors that it keeps, by the model's names."""

    update: Callable[[], Any]
    tensors: Callable[[], Mapping[str, Tensor]]
    corrected: bool = False
    """Whether the start value has no share in it, as with ours of adapters."""


Build = Callable[[nn.Module], Average]


# ---- The averages


def ours(model: nn.Module) -> Average:
    """`WeightAverage`."""
    average = WeightAverage(model)
    corrected = getattr(average, "gathered", None) is not None
    return Average(lambda: average.update(model, RHO), average.tensors, corrected)


def timm_v3(**options: Any) -> Build:
    """timm's `ModelEmaV3`."""

    def build(model: nn.Module) -> Average:
        from timm.utils import ModelEmaV3

        average = ModelEmaV3(model, decay=RHO, **options)
        return Average(lambda: average.update(model), lambda: _tensors(average.module))

    return build


def diffusers_ema(dtype: torch.dtype | None = None, **options: Any) -> Build:
    """diffusers' `EMAModel`, without its warm-up."""

    def build(model: nn.Module) -> Average:
        from diffusers.training_utils import EMAModel

        names, parameters = _trainable(model)
        average = EMAModel(parameters, decay=RHO, min_decay=RHO, update_after_step=-1, **options)
        average.to(dtype=dtype)
        return Average(lambda: average.step(parameters), lambda: dict(zip(names, average.shadow_params, strict=True)))

    return build


def averaged_model(dtype: torch.dtype | None = None, **options: Any) -> Build:
    """torch's `AveragedModel`, whose first update copies."""

    def build(model: nn.Module) -> Average:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(RHO), **options)
        average.module.to(dtype)
        average.update_parameters(model)
        return Average(lambda: average.update_parameters(model), lambda: _tensors(average.module))

    return build


def ema_pytorch(dtype: torch.dtype | None = None, **options: Any) -> Build:
    """`ema_pytorch.EMA`, without its warm-up."""

    def build(model: nn.Module) -> Average:
        from ema_pytorch import EMA

        copied = None if dtype is None else copy.deepcopy(model).to(dtype)
        average = EMA(
            model, copied, beta=RHO, min_value=RHO, update_after_step=-1, update_every=1, include_online_model=False,
            coerce_dtype=dtype is not None, **options,
        )  # fmt: skip
        for _ in range(_WARM):
            average.update()
        return Average(average.update, lambda: _tensors(average.ema_model))

    return build


def torch_ema(dtype: torch.dtype | None = None) -> Build:
    """`torch_ema.ExponentialMovingAverage`, without its warm-up."""

    def build(model: nn.Module) -> Average:
        from torch_ema import ExponentialMovingAverage

        names, parameters = _trainable(model)
        average = ExponentialMovingAverage(parameters, decay=RHO, use_num_updates=False)
        average.to(dtype=dtype)
        return Average(average.update, lambda: dict(zip(names, average.shadow_params, strict=True)))

    return build


def averages(dtype: torch.dtype) -> dict[str, Build]:
    """Every average by name; in half precision each as it comes, and with a float32 shadow where it can have one."""
    found: dict[str, Build] = {
        OURS: ours,
        "timm ModelEmaV3": timm_v3(),
        "diffusers EMAModel": diffusers_ema(),
        "diffusers EMAModel, foreach": diffusers_ema(foreach=True),
        "torch AveragedModel": averaged_model(),
        "torch AveragedModel, use_buffers": averaged_model(use_buffers=True),
        "ema-pytorch": ema_pytorch(),
        "ema-pytorch, foreach": ema_pytorch(use_foreach=True),
        "torch_ema": torch_ema(),
    }
    if dtype != torch.float32:
        full = torch.float32
        found |= {
            "timm ModelEmaV3, float32": timm_v3(dtype=full),
            "diffusers EMAModel, float32": diffusers_ema(full),
            "diffusers EMAModel, foreach, float32": diffusers_ema(full, foreach=True),
            "torch AveragedModel, float32": averaged_model(full),
            "ema-pytorch, float32": ema_pytorch(full),
            "ema-pytorch, foreach, float32": ema_pytorch(full, use_foreach=True),
            "torch_ema, float32": torch_ema(full),
        }
    return found


PACKAGES = {"timm": "timm", "diffusers": "diffusers", "ema-pytorch": "ema_pytorch", "torch_ema": "torch_ema"}


def installed(name: str) -> bool:
    """Whether the library of an average is there."""
    package = PACKAGES.get(name.split()[0].rstrip(","))
    return package is None or importlib.util.find_spec(package) is not None


# ---- The models


def wav2vec2(small: bool) -> Wav2Vec2ForCTC:
    """The base size, or one layer of a thousandth of it."""
    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    config = Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, **(sizes if small else {}))
    with no_init_weights():
        model = Wav2Vec2ForCTC(config)
    return _filled(model)


def many_small(small: bool) -> nn.Module:
    """Linear layers of 64 x 64."""
    return _filled(nn.ModuleList([nn.Linear(64, 64) for _ in range(3 if small else 1200)]))


def lora(small: bool) -> nn.Module:
    """`wav2vec2` with adapters on the linear layers of its encoder."""
    from peft import LoraConfig, get_peft_model

    rank, layers = 4 if small else 64, r".*encoder\.layers\..*\.(q_proj|k_proj|v_proj|out_proj|.*_dense)"
    model = get_peft_model(wav2vec2(small), LoraConfig(r=rank, target_modules=layers))
    return _filled(model, only_trainable=True)


def build_model(name: str, dtype: torch.dtype, *, small: bool) -> nn.Module:
    """A model by name, of random weights."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[bool], nn.Module]] = dict(zip(MODELS, (wav2vec2, many_small, lora), strict=True))
    return makers[name](small).to(dtype)


class Extras(nn.Module):
    """What averages get wrong beside the weights: a tied weight, an integer counter, an integer table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counter", torch.tensor(0))
        self.register_buffer("position_ids", torch.arange(512))


def _filled(model: nn.Module, *, only_trainable: bool = False) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trainable:
                parameter.normal_(std=0.05)
    return model


def _trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name, _ in found], [parameter for _, parameter in found]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


# ---- What is measured


class NewStorage(TorchDispatchMode):
    """Counts the bytes of results that are not views and not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        new = {_storage(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self.bytes += sum(leaf.untyped_storage().nbytes() for at, leaf in new.items() if at not in known)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def judge(builds: Mapping[str, Build], model: nn.Module, steps: int) -> dict[str, tuple[bool | None, str]]:
    """Whether averages of `model` follow the float64 recursion over random steps, and what each has wrong.

    Args:
        builds: Averages by name; they watch the same steps.
        model: A small model; it is changed.
        steps: How many.

    Returns:
        By name True and the largest error, False and what is wrong, or None and what an average raised.
    """
    model = nn.ModuleDict({"model": model, "extras": Extras().to(next(model.parameters()).dtype)})
    generator = torch.Generator().manual_seed(1)
    names, trained = _trainable(model)
    expected = [parameter.detach().double() for parameter in trained]
    from_zero = [torch.zeros_like(value) for value in expected]
    averages: dict[str, Average] = {}
    found: dict[str, tuple[bool | None, str]] = {}
    for step in range(steps + 1):
        for name, build in builds.items():
            if name in found:
                continue
            try:
                if step == 0:
                    averages[name] = build(model)
                else:
                    averages[name].update()
            except Exception as error:
                found[name] = None, f"raises {type(error).__name__}: {str(error).splitlines()[0][:60]}"
        if step == steps:
            break
        with torch.no_grad():
            for parameter in trained:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02 + 2e-3).to(parameter.dtype))
            model["extras"].counter += 1  # type: ignore[operator]
        sources = [parameter.detach().double() for parameter in trained]
        for target in (expected, from_zero):
            torch._foreach_lerp_(target, sources, 1 - RHO)
    corrected = [value / (1 - RHO**steps) for value in from_zero]
    for name, average in averages.items():
        if name not in found:
            right = dict(zip(names, corrected if average.corrected else expected, strict=True))
            found[name] = _verdict(average.tensors(), right, dict(model.named_buffers()))
    return found


def _verdict(
    kept: Mapping[str, Tensor], right: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[bool, str]:
    errors = {
        name: float((kept[name].double() - value).abs().max() / value.abs().max()) for name, value in right.items()
    }
    tied = errors.pop("extras.embedding.weight")
    worst = max(errors.values())
    wrong = [f"weights off by {worst:.1%}"] if not worst <= TOLERANCE else []
    wrong += [f"tied weight off by {tied:.1%}"] if not tied <= TOLERANCE else []
    for name, buffer in buffers.items():
        if name in kept and not buffer.is_floating_point() and not torch.equal(kept[name], buffer):
            wrong.append(f"{name.removeprefix('extras.')} differs")
    return not wrong, "; ".join(wrong) or f"within {max(worst, tied):.0e}"


def measure(model_name: str, dtype_name: str, *, rounds: int, steps: int, quick: bool) -> list[Row]:
    """All averages of one model, and the limit."""
    dtype = DTYPES[dtype_name]
    builds = {name: build for name, build in averages(dtype).items() if installed(name)}
    verdicts = judge(builds, build_model(model_name, dtype, small=True), steps)
    model = build_model(model_name, dtype, small=quick)
    flat, other = torch.randn(2, sum(parameter.numel() for parameter in _trainable(model)[1])).unbind()
    rows = [Row(LIMIT, model_name, dtype_name, temporary=0)]
    updates: list[tuple[Row, Callable[[], Any]]] = [(rows[0], lambda: flat.lerp_(other, 1 - RHO))]
    for name, build in builds.items():
        right, note = verdicts[name]
        rows.append(Row(name, model_name, dtype_name, right=right, note=note))
        if right is None:
            continue
        average = build(model)
        for _ in range(_WARM):
            average.update()
        with NewStorage() as storage:
            average.update()
        rows[-1].temporary = storage.bytes
        updates.append((rows[-1], average.update))
    for number in range(rounds):
        turn = number % len(updates)
        for row, update in updates[turn:] + updates[:turn]:
            began = time.perf_counter()
            update()
            row.milliseconds.append(1e3 * (time.perf_counter() - began))
    for row in rows:
        row.limits = rows[0].milliseconds
    return rows


def training_step_seconds() -> float:
    """One training step of the 94 M model on 4 x 5 seconds of noise with AdamW: what an update comes on top of."""
    model = wav2vec2(False)
    model.config.ctc_zero_infinity = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    audio, labels = torch.randn(4, 80_000), torch.randint(1, 30, (4, 40))
    times = []
    for _ in range(2):  # the first step allocates the optimizer's state
        began = time.perf_counter()
        model(audio, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return times[-1]


def finite_check_seconds() -> float:
    """What `EMACallback` does at each step beside the update, on the 94 M model; the shortest of five."""
    model = wav2vec2(False)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        nonfinite_parameter(model)
        times.append(time.perf_counter() - began)
    return min(times)


def table(rows: list[Row]) -> str:
    """One model and dtype, a line per average."""
    lines = [f"\n{rows[0].model}, {rows[0].dtype}", "  ms min  median   x limit  temporary MB  right"]
    for row in rows:
        found = row.to_json()
        if found["ms"] is None:
            numbers = f"{'-':>8}{'-':>8}{'-':>10}{'-':>14}"
        else:
            megabytes = (row.temporary or 0) / 1e6
            numbers = f"{min(row.milliseconds):8.3f}{found['ms']:8.3f}{found['ratio_to_limit']:10.2f}{megabytes:14.2f}"
        verdict = {True: "yes", False: "NO", None: "-"}[row.right]
        lines.append(f"{numbers}  {verdict:<5}  {row.name}{': ' if row.note else ''}{row.note}")
    return "\n".join(lines)


def main(
    model: Annotated[list[str], typer.Option(help="wav2vec2-94M, many-small or lora; repeatable.")] = MODELS,
    dtype: Annotated[list[str], typer.Option(help="fp32 or bf16; repeatable.")] = KINDS,
    rounds: Annotated[int, typer.Option(help="Rounds of one update each.", min=1)] = 21,
    steps: Annotated[int, typer.Option(help="Random steps after which an average is judged.", min=1)] = 1000,
    quick: Annotated[
        bool, typer.Option(help="Time the small models: a test of this script, not a measurement.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, nothing else.")] = False,
) -> None:
    """Time, memory and correctness of one update of an average of weights."""
    for value, known in [*((name, MODELS) for name in model), *((name, KINDS) for name in dtype)]:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}")
    if importlib.util.find_spec("peft") is None:
        typer.echo("no lora rows: pip install peft", err=True)
        model = [name for name in model if name != "lora"]
    if not as_json:
        missing = sorted(package for name, package in PACKAGES.items() if not installed(name))
        typer.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, momentum {RHO}, {rounds} rounds")
        typer.echo(f"not installed: {', '.join(missing)}\n" if missing else "", nl=False)
    rows: list[Row] = []
    for name in model:
        for kind in dtype:
            found = list(measure(name, kind, rounds=rounds, steps=steps, quick=quick))
            rows += found
            if not as_json:
                typer.echo(table(found))
    if as_json:
        typer.echo(json.dumps({"rows": [row.to_json() for row in rows]}, indent=1, allow_nan=False))
        return
    mine = [row for row in rows if (row.name, row.model) == (OURS, MODELS[0])]
    if mine and not quick:
        seconds = training_step_seconds()
        worst = max(median(row.milliseconds) for row in mine) / 1e3
        typer.echo(
            f"\na training step of {MODELS[0]} on 4 x 5 s of audio takes {seconds:.2f} s: an update is "
            f"{worst / seconds:.2%} of it, the look of EMACallback for weights that are not finite "
            f"{finite_check_seconds() / seconds:.2%}"
        )


if __name__ == "__main__":
    typer.run(main)
