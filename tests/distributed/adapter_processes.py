"""What `test_adapters.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapted
import datasets
import sharded_processes
import stock_runs
import tiny
import torch
import torch.distributed as dist
from accelerate import PartialState
from adapted import peft
from sharded_processes import SENTENCE, seen
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.integrations import peft as peft_integration

from hf_ema_scaling.labels import CTCLabeler

LAYERS = {"bert": ["query", "value"], "wav2vec2": ["q_proj", "v_proj"]}


def lora(family: str, saved: Path | None = None, *, seed: int = 1, kind: str = "get_peft_model") -> Any:
    """A tiny model with adapters alone, whole, or where it is given a folder with its base in shards."""
    base = sharded_processes.model_of(family, saved)
    return adapted.adapt(base, kind, seed=seed, target_modules=LAYERS[family], modules_to_save=None)


def supervised(folder: Path, model: Any, micro: int, **changes: Any) -> Any:
    return sharded_processes.split(folder, model, "bert", micro, learning_rate=5e-2, **changes)


def semi_supervised(folder: Path, model: Any, micro: int) -> Any:
    """Labels by the averaged adapters, of five items in a step of eight."""
    args = tiny.arguments(
        folder,
        max_steps=8,
        reference_batch_size=8,
        ema_momentum=0.5,
        learning_rate=3e-2,
        per_device_train_batch_size=micro,
        adam_epsilon=1e-3,
    )
    made = tiny.trainer(
        model,
        args,
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=5 / 3),
        labeler=CTCLabeler(0),
        data_collator=tiny.CTCCollator(),
    )
    return sharded_processes.two_processes.labelling(made)


def trained(made: Any, **more: Any) -> dict[str, Any]:
    made.train(**more)
    return seen(made) | {"gathered": made.average.gathered, "found": getattr(made, "found", [])}


def saved(made: Any, folder: Path) -> dict[str, Any]:
    """The pair of adapters on the disk, and what both say of a sentence, student first."""
    made.save_model(str(folder))
    made.model.eval()
    said = []
    with torch.no_grad():
        said.append(made.model(input_ids=SENTENCE).logits.clone())
        with made.average.swapped(made.model):
            said.append(made.model(input_ids=SENTENCE).logits.clone())
    return {"said": said}


class Watch(stock_runs.Recorder):
    """Gathered weights of the student's adapters and of the average, after each step."""

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.student.append({name: p for name, p in tiny.parameters(model).items() if "lora" in name})
        tensors = self.callback.average.tensors().items()
        self.average.append({name: tiny.whole(tensor) for name, tensor in tensors if "lora" in name})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_callback(folder: Path, kind: str, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """`EMACallback` in the stock Trainer, or in TRL's with a `peft_config`."""
    callback = stock_runs.callback()
    watch = Watch(callback)
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-2}
    if kind == "stock":
        args: Any = stock_runs.arguments(folder, **(settings | changes))
        made: Any = Trainer(lora("bert"), args, train_dataset=tiny.sentences(40), callbacks=[callback, watch])
    else:
        from trl import SFTConfig, SFTTrainer

        more = {"max_length": 16, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4}
        more |= {"logging_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        texts = [" ".join(f"w{(3 * row + place) % 40}" for place in range(3 + row % 6)) for row in range(64)]
        made = SFTTrainer(
            llama(),
            SFTConfig(str(folder), **(settings | more | changes)),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=stock_runs.tokenizer(),
            callbacks=[callback, watch],
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
    made.train(resume_from_checkpoint=resume)
    callback.export(folder / "export")
    return {
        "students": watch.student,
        "averages": watch.average,
        "kappa": callback.kappa,
        "gathered": callback.average.gathered,
        "references": len(callback.average.references),
    }


def main(folder: Path) -> dict[str, Any]:
    """Under DDP, then with the base in shards."""
    results: dict[str, Any] = {}
    made = supervised(folder / "ddp", lora("bert"), 4, save_strategy="steps", save_steps=1)
    results["ddp"] = trained(made) | saved(made, folder / "ddp" / "final")
    again = supervised(folder / "again", lora("bert", seed=7), 4)
    results["again"] = trained(again, resume_from_checkpoint=str(folder / "ddp" / "checkpoint-2"))
    results["ddp-labels"] = trained(semi_supervised(folder, lora("wav2vec2"), 2))
    for kind in ("stock", "sft"):
        results[kind] = with_callback(folder / kind, kind)
        checkpoint = str(folder / kind / "checkpoint-2")
        results[f"{kind}-again"] = with_callback(folder / kind, kind, checkpoint)

    made = supervised(folder / "shards", lora("bert", folder / "bert"), 4)
    results["shards"] = trained(made) | saved(made, folder / "shards" / "final")
    parameters = list(made.model.named_parameters())
    results["sharded"] = [name for name, p in parameters if isinstance(p, DTensor)]
    results["whole"] = [name for name, p in parameters if not isinstance(p, DTensor)]
    results["shards-labels"] = trained(semi_supervised(folder, lora("wav2vec2", folder / "wav2vec2"), 2))
    return results


def main_added(folder: Path) -> dict[str, Any]:
    """Adapters of transformers' `add_adapter`, under DDP and over a base in shards."""
    # The newest transformers asks for a PEFT that is not published yet.
    peft_integration.check_peft_version = lambda **_: None
    made = supervised(folder / "ddp", lora("bert", kind="add_adapter"), 4, save_strategy="steps", save_steps=1)
    results = {"ddp": trained(made) | saved(made, folder / "ddp" / "final")}
    again = supervised(folder / "again", lora("bert", seed=7, kind="add_adapter"), 4)
    results["again"] = trained(again, resume_from_checkpoint=str(folder / "ddp" / "checkpoint-2"))
    made = supervised(folder / "shards", lora("bert", folder / "bert", kind="add_adapter"), 4)
    results["shards"] = trained(made) | saved(made, folder / "shards" / "final")
    parameters = list(made.model.named_parameters())
    results["whole"] = {"names": [name for name, p in parameters if not isinstance(p, DTensor)]}
    return results


def main_plugin(folder: Path) -> dict[str, Any]:
    """Base, adapters and a classifier trained along, all sharded by accelerate's plugin."""
    made = supervised(folder, adapted.lora_bert(), 4, save_strategy="steps", save_steps=1)
    results: dict[str, Any] = {"plugin": trained(made)}
    results["sharded"] = [name for name, p in made.model.named_parameters() if isinstance(p, DTensor)]
    again = supervised(folder / "again", adapted.lora_bert(seed=5), 4)
    return results | {"again": trained(again, resume_from_checkpoint=str(folder / "checkpoint-2"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PART, OUT = sys.argv[2], Path(sys.argv[1])
    if PART == "plugin":
        sharded_processes.force_plugin()
    RANK = PartialState(cpu=True).process_index
    torch.save({"all": main, "added": main_added, "plugin": main_plugin}[PART](OUT), OUT / f"{RANK}.pt")
    dist.destroy_process_group()
