r"""Fine-tune a decoder-only model to summarize, each target token's loss weighted by t^p.

The demo: SmolLM2-135M-Instruct with LoRA on docstrings, minutes on two CPU cores, no model hub needed:

    accelerate launch recipes/finetune_causal_lm.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml

A look at the whole way in about a minute:

    accelerate launch recipes/finetune_causal_lm.py \
        --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/smollm2_lora_docstrings_look

Any model and data set of the Hub, or files of your own, on the GPUs of one machine:

    accelerate launch --num_processes 8 recipes/finetune_causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix "Summarize:\n\n" --use_peft --bf16 --do_train --do_eval \
        --max_eval_samples 512 --output_dir outputs/qwen3_cnn_dailymail

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import EvalLoopOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_temporal.tasks.embedded_model import EMBEDDED_MODEL, EMBEDDED_PROVENANCE, embedded_model_folder
from hf_temporal.tasks.summarization import (
    IGNORED,
    SummarizationArguments,
    SummaryScores,
    encode_for_causal_lm,
    generate_summaries,
    load_pairs,
    prompt_of,
)
from hf_temporal.trainer import TemporalWeightTrainer
from hf_temporal.training_args import TemporalTrainingArguments
from recipes.configuration import parse
from recipes.summarization_run import (
    CardMixin,
    ModelArguments,
    begin,
    carry_out,
    command_line,
    encode,
    publish,
    share_cores,
)

USAGE = '''
{imports}

model = {load}
tokenizer = AutoTokenizer.from_pretrained({name!r})
messages = [{{"role": "user", "content": """{prefix}""" + text}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
'''.strip()


@dataclass
class CausalModelArguments(ModelArguments):
    """Which model is trained, and with which adapter, in TRL's names."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get an adapter; all-linear: every linear layer but the LM head."},
    )


class SummarizationTrainer(CardMixin, TemporalWeightTrainer):
    """Adds to every evaluation the scores of summaries generated from the prompts alone.

    Args:
        scores: compares them with the references, the labels' texts.
        max_new_tokens: of a summary.
        num_beams: 1 is greedy.
    """

    def __init__(self, *args: Any, scores: SummaryScores, max_new_tokens: int, num_beams: int, **kwargs: Any) -> None:
        self._scores = scores
        self._generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and the scores among its metrics."""
        output = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        examples: Any = dataloader.dataset
        generated = self._generate([prompt_of(example) for example in examples])
        scores = self._scores.score(generated, [example["labels"] for example in examples])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Each process generates its share; shares are equally long, as sharded models need."""
        processes, rank = self.args.world_size, self.args.process_index
        padded = prompts + prompts[:1] * (-len(prompts) % processes)
        mine = generate_summaries(
            self.model,
            self._scores.tokenizer,
            padded[rank::processes],
            batch_size=self.args.per_device_eval_batch_size,
            synced_gpus=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            **self._generation,
        )
        shares: list[list[list[int]]] = gather_object([mine])
        return [summary for turn in zip(*shares, strict=True) for summary in turn][: len(prompts)]


def load_model(arguments: CausalModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; one without a padding token pads with its end token."""
    folder = arguments.model_name_or_path or str(embedded_model_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=arguments.model_revision)
    if tokenizer.eos_token is None:
        raise ValueError(f"model_name_or_path={folder!r} has a tokenizer without an end token; accepted: one with it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, revision=arguments.model_revision, dtype=arguments.dtype)
    if arguments.model_name_or_path is None:
        # what is saved says where the model is from, not where it lies on this machine
        model.name_or_path = model.config._name_or_path = EMBEDDED_MODEL
        warnings.filterwarnings("ignore", message="Could not find a config file in|Unable to fetch remote file")
    return model, tokenizer


def add_adapter(model: PreTrainedModel, arguments: CausalModelArguments) -> PeftModel:
    """Wrap the model in a LoRA adapter.

    Raises ValueError where one of `lora_target_modules` matches nothing: PEFT is content with any match.
    """
    names = arguments.lora_target_modules
    everywhere = names == ["all-linear"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if everywhere else names,
    )
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for name in () if everywhere else names:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            accepted = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            raise ValueError(f"lora_target_modules={names!r}: {name!r} is no module here; accepted: {accepted}")
    return get_peft_model(model, config)


def usage(model_args: CausalModelArguments, data_args: SummarizationArguments, name: str) -> str:
    """Python code that summarizes with the model in the folder `name`."""
    base = "embedded_model_folder()" if model_args.model_name_or_path is None else repr(model_args.model_name_or_path)
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {name!r})"
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if model_args.model_name_or_path is None:
        imports.append("from hf_temporal.tasks.embedded_model import embedded_model_folder")
    if not model_args.use_peft:
        load, imports = f"AutoModelForCausalLM.from_pretrained({name!r})", imports[1:2]
    return USAGE.format(
        imports="\n".join(imports),
        load=load,
        name=name,
        prefix=data_args.source_prefix,
        max_new_tokens=data_args.max_target_length,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    kinds = (CausalModelArguments, SummarizationArguments, TemporalTrainingArguments)
    model_args, data_args, training_args = parse(kinds, argv, description=__doc__)
    share_cores()
    set_seed(training_args.seed)
    with training_args.main_process_first():
        data = load_pairs(data_args)
    run = begin(training_args, model_args, data_args, data)
    with training_args.main_process_first():
        model, tokenizer = load_model(model_args)
    splits = encode(data, encode_for_causal_lm, tokenizer, training_args, data_args)
    scores = SummaryScores(tokenizer)
    trainer = SummarizationTrainer(
        add_adapter(model, model_args) if model_args.use_peft else model,
        training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        scores=scores,
        max_new_tokens=data_args.max_target_length,
        num_beams=data_args.num_beams,
    )
    carry_out(trainer, run, scores, splits)
    if training_args.do_train:
        trained = f"a LoRA adapter of rank {model_args.lora_r}" if model_args.use_peft else "all its weights"
        base = model_args.model_name_or_path or EMBEDDED_MODEL
        publish(
            trainer,
            data,
            command=command_line(__file__, argv, training_args),
            summary=f"{base} with {trained} trained to summarize: {data.name}.",
            usage=usage(model_args, data_args, Path(str(training_args.output_dir)).name),
            base_model=base,
            base_model_note=EMBEDDED_PROVENANCE if model_args.model_name_or_path is None else None,
        )


if __name__ == "__main__":
    main()
