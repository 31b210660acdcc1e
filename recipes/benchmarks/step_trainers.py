"""The trainers whose steps `training_step.py` measures, the models and rows they are given, and the process of one."""

import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from measured import memory, peak_memory, print_into
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, Trainer, TrainerCallback

import hf_temporal

MODELS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
STOCK, SFT = "stock", "SFTTrainer"
WEIGHTED_SFT = {"weighted SFTTrainer": "auto", "weighted SFTTrainer, full logits": "off"}  # by its fused head
TRAINERS = (STOCK, "by hand", SFT, *WEIGHTED_SFT, "fused head", "full logits", "no head")
TUNED = ("lora", "full")
POWER = 1.0
WARMUP = 2
FIRST_TOKEN = 2  # of the random rows; 0 is T5's padding, 1 its end


@dataclass(frozen=True)
class Job:
    """What one process trains: `targets` is the share of the length, of a seq2seq model's row the decoder's tokens."""

    model: str
    tuned: str
    dtype: str
    batch_size: int
    length: int
    share: float
    trainer: str = STOCK
    repeats: int = 7
    threads: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        return WARMUP + self.repeats

    @property
    def targets(self) -> int:
        return max(1, round(self.share * self.length))


def is_seq2seq(model: str) -> bool:
    """Whether a model of `MODELS` has an encoder and a decoder."""
    return bool(AutoConfig.for_model(**MODELS[model]).is_encoder_decoder)


def why_not(trainer: str, model: str) -> str:
    """Why a trainer does not train a model here, empty where it does."""
    if SFT in trainer and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if SFT in trainer and is_seq2seq(model):
        return "it trains decoder-only models"
    return ""


class ByHandTrainer(Trainer):
    """The subclass that users write: the loss of each token from the full logits, times its weight."""

    loss_is_scaled_for_ga: bool | None = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ wℓ / number of target tokens, w = t^p rescaled to mean 1 over the targets of a row."""
        outputs, labels = _outputs(model, inputs)
        logits = outputs.logits
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        is_target = labels != -100
        weights = is_target.cumsum(-1).float().pow(POWER) * is_target
        weights = weights * is_target.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        loss = (weights * losses).sum() / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class HeadlessTrainer(Trainer):
    """What is left of a step without LM head and loss: no trainer can be faster."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The mean of the hidden states at the target positions; they are the model's logits, its head being gone."""
        outputs, labels = _outputs(model, inputs)
        is_target = labels != -100
        return (outputs.logits.mean(-1) * is_target).sum() / is_target.sum()


def _outputs(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """What the model makes of a batch without its labels, and the labels."""
    labels = inputs.pop("labels")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    return model(**inputs), labels


class OnCommand(TrainerCallback):
    """Takes a step at each command and answers with its seconds and the peak of the memory so far."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.start = 0.0
        self.before = 0

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """The first command, when the model has seen a few tokens: what libraries allocate then is no trainer's."""
        tokens = torch.full((1, 9), FIRST_TOKEN)
        with torch.no_grad():
            model(tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
        self.before = memory()
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.connection.send((time.perf_counter() - self.start, peak_memory() - self.before))
        if state.global_step < state.max_steps:
            self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self.start = time.perf_counter()


def build_model(job: Job) -> Any:
    """The model with random weights; without its LM head for "no head"."""
    transformers.set_seed(job.seed)
    auto = transformers.AutoModelForSeq2SeqLM if is_seq2seq(job.model) else transformers.AutoModelForCausalLM
    model: Any = auto.from_config(AutoConfig.for_model(**MODELS[job.model]), dtype=getattr(torch, job.dtype))
    if job.trainer == "no head":
        model.set_output_embeddings(nn.Identity())
    if job.tuned == "lora":
        kind = "SEQ_2_SEQ_LM" if is_seq2seq(job.model) else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type=kind))
    return model


def build_trainer(job: Job, folder: str, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """The trainer of a job, ready to train."""
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": job.steps, "per_device_train_batch_size": job.batch_size,
        "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_strategy": "no", "seed": job.seed,
    }  # fmt: skip
    given: dict[str, Any] = {"model": build_model(job), "train_dataset": rows(job), "callbacks": [*callbacks]}
    if SFT in job.trainer:
        trl: Any = importlib.import_module("trl")
        kind, config = trl.SFTTrainer, trl.SFTConfig
        if job.trainer != SFT:
            ours: Any = importlib.import_module("hf_temporal.trl")
            kind, config = ours.TemporalWeightSFTTrainer, ours.TemporalSFTConfig
            common |= {"temporal_power": POWER, "temporal_fused_head": WEIGHTED_SFT[job.trainer]}
        arguments = config(**common, gradient_checkpointing=False, bf16=False, max_length=None)
        # It reads lists, and takes the padding from a tokenizer, which is of one token here.
        lists = {key: [row[key].tolist() for row in given["train_dataset"]] for key in ("input_ids", "labels")}
        words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
        given |= {"train_dataset": Dataset.from_dict(lists), "processing_class": tokenizer}
        return kind(args=arguments, **given)
    prefix = "Seq2Seq" if is_seq2seq(job.model) else ""
    if job.trainer in ("fused head", "full logits"):
        common |= {"temporal_power": POWER, "temporal_fused_head": "auto" if job.trainer == "fused head" else "off"}
        kind = getattr(hf_temporal, f"TemporalWeight{prefix}Trainer")
        arguments = getattr(hf_temporal, f"Temporal{prefix}TrainingArguments")(**common)
    else:
        stock = getattr(transformers, f"{prefix}Trainer")
        kind = {STOCK: stock, "by hand": ByHandTrainer, "no head": HeadlessTrainer}[job.trainer]
        arguments = getattr(transformers, f"{prefix}TrainingArguments")(**common)
    return kind(args=arguments, data_collator=transformers.default_data_collator, **given)


def rows(job: Job) -> list[dict[str, Tensor]]:
    """Random rows of `length` tokens, none of them padding; the targets are a row's last ones, or the decoder's."""
    generator = torch.Generator().manual_seed(job.seed)
    count, vocabulary = job.steps * job.batch_size, MODELS[job.model]["vocab_size"]
    ids = torch.randint(FIRST_TOKEN, vocabulary, (count, job.length), generator=generator)
    if is_seq2seq(job.model):
        labels = torch.randint(FIRST_TOKEN, vocabulary, (count, job.targets), generator=generator)
    else:
        labels = ids.clone()
        labels[:, : job.length - job.targets] = -100
    mask = torch.ones(job.length, dtype=torch.long)
    return [
        {"input_ids": row, "attention_mask": mask, "labels": row_labels}
        for row, row_labels in zip(ids, labels, strict=True)
    ]


def serve(connection: Connection, job: Job, log: Path) -> None:
    """Build the model and train it, a step per command; what is printed goes into a file."""
    print_into(log)
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(job, folder, [OnCommand(connection)]).train()
