"""What `test_fsdp.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import two_processes
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_ema_scaling import EMACallback, PseudoLabelCollator, WeightAverage
from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.ema import EMATeacher, check_agreement, check_liveness, load_average
from hf_ema_scaling.ema.sharding import reshard
from hf_ema_scaling.labels import CTCLabeler

PLANS = {
    # The classifier stays gathered after an evaluation, and so does what belongs to no named part.
    "bert": {"bert.encoder.layer.*": "free_full_weight", "classifier": "keep_full_weight"},
    "wav2vec2": {"wav2vec2.encoder.layers.*": "free_full_weight", "lm_head": "keep_full_weight"},
}
SENTENCE = torch.tensor([[1, 2, 3, 4, 5, 6]])
LAST_TOKENS = torch.tensor([[1, 20, 10, 19, 11]])
"""Of the first shard of 22 rows, and of the second."""
BAD = 3
"""Number of the sentence whose loss is not finite in the runs that meet such a gradient."""


# ---- Runs: the same function trains one process on a whole model, or two on shards of it


def model_of(family: str, saved: Path | None = None, **more: Any) -> Any:
    """A tiny model: whole, or where it is given a folder, sharded from there over the two processes."""
    model = getattr(tiny, family)()
    return model if saved is None else in_shards(model, saved, PLANS[family], **more)


def in_shards(model: Any, saved: Path, plan: dict[str, str], **more: Any) -> Any:
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    dist.barrier()
    config = DistributedConfig(fsdp_size=2, fsdp_plan=plan, **more)
    return type(model).from_pretrained(saved, distributed_config=config)


def tied(rows: int) -> GPT2LMHeadModel:
    """Its head is its embedding of so many rows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=rows, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tied_in_shards(folder: Path) -> dict[str, Any]:
    """What a model of 22 tied rows says as its average, over tokens of both shards; and how one of 21 is refused."""
    plan = {"transformer.h.*": "free_full_weight", "lm_head": "keep_full_weight"}
    model = in_shards(tied(22), folder / "even", plan)
    average = WeightAverage(model)
    with torch.no_grad():
        model(input_ids=LAST_TOKENS)  # leaves both places gathered
        reshard(model)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        average.update(model, 0.5)
        with average.swapped(model):
            said = model(input_ids=LAST_TOKENS).logits.clone()
    uneven, rows = in_shards(tied(21), folder / "uneven", plan), [{"input_ids": [1, 2], "labels": [1, 2]}] * 4
    callback = EMACallback(momentum=0.9, reference_batch_size=4)
    args = TrainingArguments(str(folder), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    return {
        "said": said,
        "names": [name for name in average.tensors() if "wte" in name or "lm_head" in name],
        "callback": error_of(Trainer(uneven, args, train_dataset=rows, callbacks=[callback]).train),
        "trainer": error_of(lambda: tiny.trainer(uneven, tiny.arguments(folder), rows)),
    }


def split(folder: Path, model: Any, family: str, micro: int, **changes: Any) -> Any:
    """Steps of 16 items and one of 48, with clipping that has an effect."""
    values: dict[str, Any] = {
        "max_steps": 6,
        "reference_batch_size": 16,
        "kappa": 3.0,
        "small_batch_until": 3.0,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": micro,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    make = tiny.sentences if family == "bert" else tiny.speech
    # Six rows in batches of three: Trainer's loss of an evaluation is exact where no process has to fill a batch up.
    args = tiny.arguments(folder, **(values | changes))
    return tiny.trainer(model, args, make(40), eval_dataset={"a": make(6, 9)})


def semi_supervised(folder: Path, model: Any, micro: int, labeler: Any = None, **changes: Any) -> Any:
    """Labels by the teacher; five unlabelled items of eight, so that one process has fewer than the other."""
    values: dict[str, Any] = {
        "max_steps": 8,
        "reference_batch_size": 8,
        "ema_momentum": 0.5,
        "per_device_train_batch_size": micro,
        "adam_epsilon": 1e-3,
    }
    made = tiny.trainer(
        model,
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=5 / 3),
        labeler=labeler or CTCLabeler(0),
    )
    return two_processes.labelling(made)


def meets_nan(folder: Path, model: Any, micro: int, on_nonfinite: str) -> Any:
    """One item of the data has a loss that is not finite."""

    def losses(model: nn.Module, inputs: Any, logits: Tensor, labels: Tensor) -> Tensor:
        bad = (inputs["input_ids"] == tiny.sentences(12)[BAD]["input_ids"]).all(-1)
        return nn.functional.cross_entropy(logits, labels, reduction="none") / torch.where(bad, 0.0, 1.0)

    args = tiny.arguments(
        folder,
        max_steps=5,
        reference_batch_size=4,
        per_device_train_batch_size=micro,
        on_nonfinite=on_nonfinite,
        adam_epsilon=1e-3,
    )
    return tiny.trainer(model, args, tiny.sentences(12), example_loss=losses)


def seen(made: Any) -> dict[str, Any]:
    recorder = made.recorder
    keys = ("grad_norm", "ema/distance", "ema/momentum", "clip/rate", "loss", "noise/scale")
    return {
        "gradients": recorder.gradients,
        "weights": recorder.weights,
        "averages": recorder.averages,
        "drawn": made.drawn,
        "updates": made.average.num_updates,
        "noise": made._noise.last,
        "logs": [{k: v for k, v in log.items() if k in keys} for log in made.state.log_history if "loss" in log],
    }


def error_of(action: Callable[[], Any]) -> str:
    """Class and message of what an action raises; on both processes, or the test would wait forever."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- A module in which shards are uneven, empty, or in half precision


class Uneven(nn.Module):
    """Seven rows, three, and one: on two processes four and three, two and one, one and none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.last = nn.Linear(3, 1)
        self.register_buffer("running", torch.ones(3))
        self.first.weight.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.second(self.first(inputs).relu()).relu() * self.running)


def trajectory(model: nn.Module, dtype: torch.dtype, steps: int = 4) -> list[dict[str, Tensor]]:
    """Whole values of a model that moves by steps of its own."""
    generator = torch.Generator().manual_seed(5)
    steps_of = []
    for _ in range(steps):
        values = {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in model.named_parameters()}
        steps_of.append(values)
    return steps_of


def move(model: nn.Module, values: dict[str, Tensor]) -> None:
    reshard(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = values[name]
            if isinstance(parameter, DTensor):
                # By hand, as `torch.chunk` cuts: what the library cuts by is not what it is tested with.
                rows = whole.chunk(2)
                mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]
                parameter.to_local().copy_(mine)
            else:
                parameter.copy_(whole)


def update_all(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """An average over a moving model, and everything it can be asked."""
    average = WeightAverage(model)
    inputs = torch.ones(2, 5, dtype=dtype)
    model(inputs).sum().backward()
    fingerprints = [average.fingerprint()]
    distances = []
    for number, values in enumerate(trajectory(model, dtype)):
        move(model, values)
        average.update(model, 0.9, 1.5 + number)
        fingerprints.append(average.fingerprint())
        with torch.no_grad():
            model(inputs)  # and leaves parts of the model gathered
        distances.append(average.distance(model))
        with torch.no_grad():
            model(inputs)
    state = {name: value.clone() for name, value in average.state_dict(model).items()}
    return {"average": average, "fingerprints": fingerprints, "distances": distances, "state": state}


def uneven(mesh: Any, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    model = Uneven().to(dtype)
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    found = update_all(model, dtype)
    average: WeightAverage = found.pop("average")
    found["empty"] = [name for name, p in model.named_parameters() if p.to_local().numel() == 0]
    with CommDebugMode() as communication:
        average.update(model, 0.9)
        average.lead(model, -0.25)
        average.blend(model, 0.5)
        with average.swapped(model):
            pass
    found["communication"] = communication.get_total_counts()
    # One process's shard differs by one bit of one value: all must know.
    average.copy_to(model)
    found["equals"] = [average.equals(model)] if dtype == torch.float32 else []
    with torch.no_grad():
        if rank == 0:
            model.second.weight.to_local()[0, 0].add_(1.0)
    found["equals"].append(average.equals(model))
    before = average.fingerprint()
    average.blend(model, 1.0)
    found["moved"] = [a != b for a, b in zip(before, average.fingerprint(), strict=True)]
    average.load(found["state"])
    found["loaded"] = {name: value.clone() for name, value in average.state_dict(model).items()}
    found["dropped"] = list(average.state_dict(model, keep=rank == 0))
    return found


def after_evaluation(model: Any, average: WeightAverage) -> dict[str, Any]:
    """Forward passes before, while and after the average is swapped in, and after it was copied, by one sentence."""

    def logits() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=SENTENCE).logits
            return result.clone()

    model.eval()
    found: dict[str, Any] = {"student": logits()}
    # Parts of the model are gathered now.
    found["gathered"] = sum(not isinstance(p, DTensor) for p in model.parameters())
    with average.swapped(model):
        found["swapped"] = logits()
        found["swapped_again"] = logits()
    found["back"] = logits()
    found["refused"] = error_of(lambda: _raise_inside(average, model))
    found["back_from_error"] = logits()
    found["distance"] = average.distance(model)
    reshard(model)
    saved = [p.detach().clone() for p in model.parameters()]
    average.copy_to(model)
    found["copied"] = logits()
    reshard(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), saved, strict=True):
            parameter.copy_(value)
    return found


def _raise_inside(average: WeightAverage, model: nn.Module) -> None:
    with average.swapped(model):
        model(input_ids=SENTENCE)
        average.update(model, 0.9)


def teacher_of(model: Any, average: WeightAverage) -> dict[str, Any]:
    teacher = EMATeacher(model, average)
    first = teacher(input_ids=SENTENCE).logits
    average.blend(model, 0.5)
    found = {"stale": error_of(lambda: teacher(input_ids=SENTENCE)), "first": first}
    teacher.refresh()
    found["second"] = teacher(input_ids=SENTENCE).logits
    found["weights"] = {name: p.detach().clone() for name, p in teacher.module.named_parameters()}
    found["average"] = {name: tiny.whole(tensor) for name, tensor in average.tensors().items()}
    found["sharded_parts"] = sum(isinstance(p, DTensor) for p in teacher.module.parameters())
    before = [tiny.parameters(model), found["average"]]
    found["gap"] = check_agreement(model, average, teacher, {"input_ids": SENTENCE})
    check_liveness(model, average, teacher, {"input_ids": SENTENCE})
    handle = model.classifier.register_forward_hook(tripled)
    found["hooked"] = error_of(lambda: check_agreement(model, average, teacher, {"input_ids": SENTENCE}))
    handle.remove()
    after = [tiny.parameters(model), {name: tiny.whole(tensor) for name, tensor in average.tensors().items()}]
    found["put_back"] = tiny.same_bits(before, after)
    return found


def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3.0 * output


def with_callback(folder: Path, model: Any, rank: int) -> dict[str, Any]:
    """`EMACallback` in the stock Trainer, and what it says of a weight that is not finite in one process's shard."""
    callback = EMACallback(momentum=0.9, reference_batch_size=4)
    weights: list[dict[str, Tensor]] = []

    class Watch(EMACallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().on_optimizer_step(*args, **kwargs)
            weights.append(tiny.parameters(kwargs["model"]))

    watch = Watch(momentum=0.9, reference_batch_size=4, name="watch")
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, args, train_dataset=tiny.sentences(40), callbacks=[callback, watch])
    initial = tiny.parameters(model)
    trainer.train()
    callback.export(folder / "exported")
    found: dict[str, Any] = {
        "initial": initial,
        "weights": weights,
        "kappa": callback.kappa,
        "average": {name: tiny.whole(tensor) for name, tensor in callback.average.tensors().items()},
        "labels": callback.teacher(input_ids=SENTENCE).logits,
    }
    with callback.averaged_weights():
        model.eval()
        with torch.no_grad():
            found["averaged"] = model(input_ids=SENTENCE).logits.clone()

    class Spoil(EMACallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().on_pre_optimizer_step(*args, **kwargs)
            if rank == 1:
                with torch.no_grad():
                    kwargs["model"].bert.pooler.dense.bias.to_local()[0] = math.nan

    args.save_strategy = "no"
    spoilt = Trainer(
        model, args, train_dataset=tiny.sentences(40), callbacks=[Spoil(momentum=0.9, reference_batch_size=4)]
    )
    found["spoilt"] = error_of(spoilt.train)
    return found


def with_collator(folder: Path, model: Any) -> dict[str, Any]:
    """Labels by the callback's teacher; each process meets unlabelled rows at batches of its own."""
    callback = EMACallback(momentum=0.5, reference_batch_size=4)
    labelled, unlabelled = tiny.speech(13), tiny.speech(3, 1, labels=False)
    rows = [dict(row) for row in labelled] + [{**row, "labels": None} for row in unlabelled]
    collator = PseudoLabelCollator(callback, CTCLabeler(0), CTCCollator(), stand_ins=[dict(labelled[0])])
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    return {
        "counts": dict(collator.counts),
        "average": {name: tiny.whole(tensor) for name, tensor in callback.average.tensors().items()},
        "teacher": {name: p.detach().clone() for name, p in callback.teacher.module.named_parameters()},
        "finite": all(bool(value.isfinite().all()) for value in tiny.parameters(model).values()),
    }


def trained(folder: Path, family: str) -> tuple[Any, dict[str, Any]]:
    """A run with everything that is asked of one, saved; and what it saw."""
    save = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    made = split(folder / f"split-{family}", model_of(family, folder / family), family, 4, noise_scale_every=1, **save)
    made.train()
    found = seen(made)
    found["evaluated"] = made.evaluate()
    made.save_model(str(folder / f"split-{family}" / "final"))
    return made, found | {"final": (tiny.parameters(made.model), tiny.average(made))}


def main(folder: Path, rank: int) -> dict[str, Any]:
    """The average in shards, and one run from training to teaching."""
    results: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (2,))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        results[f"uneven-{name}"] = uneven(mesh, rank, dtype)
    made, results["split-bert"] = trained(folder, "bert")
    model, place = made.model, folder / "split-bert"
    results["after_evaluation"] = after_evaluation(model, made.average)
    again = WeightAverage(model)
    load_average(place / "final" / "ema", model, again)
    results["loaded"] = {name: tiny.whole(tensor) for name, tensor in again.tensors().items()}
    results["teacher"] = teacher_of(model, made.average)
    results["resume"] = error_of(lambda: made.train(resume_from_checkpoint=str(place / "checkpoint-3")))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    save = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    results["best"] = error_of(lambda: split(folder, model, "bert", 4, **save, **best))
    model.config.distributed_config.tp_size = 2
    results["tensor_parallel"] = error_of(lambda: split(folder, model, "bert", 4))
    model.config.distributed_config.tp_size = 1
    results["tied"] = tied_in_shards(folder / "tied")
    results["fp16"] = error_of(lambda: split(folder, model, "bert", 4, fp16=True))
    return results


def main_more(folder: Path, rank: int) -> dict[str, Any]:
    """Other models, labels by a teacher, gradients that are not finite, the callback."""
    results: dict[str, Any] = {}
    made, results["split-wav2vec2"] = trained(folder, "wav2vec2")
    made.model.config.layerdrop = 0.1
    results["layerdrop"] = error_of(lambda: split(folder, made.model, "wav2vec2", 4))

    for name, each in (("deferred", False), ("each", True)):
        config = {"gradient_accumulation_kwargs": {"sync_each_batch": each}}
        made = split(folder / name, model_of("bert", folder / "bert"), "bert", 4, accelerator_config=config)
        made.train()
        results[name] = seen(made)

    for name, labeler in (("labels", None), ("one_side", tiny.ContentLabeler(drop=lambda number: rank == 1))):
        made = semi_supervised(folder / name, model_of("wav2vec2", folder / "wav2vec2"), 2, labeler)
        made.train()
        results[name] = seen(made) | {"found": made.found}

    # Weights are bfloat16 as they are gathered for a forward pass, and float32 in the shards.
    cast = model_of("wav2vec2", folder / "wav2vec2", fsdp_mixed_precision=True)
    made = semi_supervised(folder / "cast", cast, 2)
    made.train()
    with torch.no_grad():
        output = cast(input_values=torch.ones(1, 640)).logits.dtype
    results["cast"] = seen(made) | {"found": made.found, "initial": made.recorder.initial, "output": str(output)}

    made = meets_nan(folder / "skip", model_of("bert", folder / "bert"), 2, "skip")
    made.train()
    results["skip"] = seen(made)
    made = meets_nan(folder / "raise", model_of("bert", folder / "bert"), 2, "raise")
    results["raise"] = {"error": error_of(made.train), "weights": tiny.parameters(made.model)}

    dead = split(folder / "dead", model_of("bert", folder / "bert"), "bert", 4, max_steps=18)
    blend, WeightAverage.blend = WeightAverage.blend, lambda self, *_, **__: setattr(self, "num_updates", 3)  # type: ignore[method-assign,assignment]
    try:
        results["dead"] = error_of(dead.train)
    finally:
        WeightAverage.blend = blend  # type: ignore[method-assign]

    results["collator"] = with_collator(folder / "collator", model_of("wav2vec2", folder / "wav2vec2"))
    results["callback"] = with_callback(folder / "callback", model_of("bert", folder / "bert"), rank)
    return results


def force_plugin() -> None:
    """Lets accelerate use its FSDP2 plugin here, which it does for accelerators only: to it the CPU looks like one."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    init = PartialState.__init__

    def as_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpus  # type: ignore[method-assign]


def main_plugin(folder: Path, rank: int) -> dict[str, Any]:
    """A run sharded by accelerate's plugin, and the second half of it once more, from a checkpoint."""
    whole = split(folder, tiny.bert(), "bert", 4, save_strategy="steps", save_steps=1)
    whole.train()
    results: dict[str, Any] = {"whole": seen(whole), "fsdp2": whole.accelerator.is_fsdp2}
    results["shards"] = sum(isinstance(p, DTensor) for p in whole.model.parameters())
    again = split(folder / "again", tiny.bert(seed=5), "bert", 4)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return results | {"resumed": seen(again)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PART, OUT = sys.argv[2], Path(sys.argv[1])
    if PART == "plugin":
        force_plugin()
    RANK = PartialState(cpu=True).process_index
    torch.save({"core": main, "more": main_more, "plugin": main_plugin}[PART](OUT, RANK), OUT / f"{RANK}.pt")
    dist.destroy_process_group()
