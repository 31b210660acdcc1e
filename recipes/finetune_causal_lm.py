r"""Fine-tune a decoder-only model, each target token's loss weighted by t^p.

The demo: SmolLM2-135M-Instruct with LoRA summarizes docstrings, minutes on two CPU cores, no model hub needed:

    accelerate launch recipes/finetune_causal_lm.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml

A look at the whole way in about a minute:

    accelerate launch recipes/finetune_causal_lm.py \
        --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/smollm2_lora_docstrings_look

A small Llama from scratch learns to copy ten digits over a blank of a hundred:

    accelerate launch recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml

Any model and data set of the Hub, or files of your own, on the GPUs of one machine:

    accelerate launch --num_processes 8 recipes/finetune_causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix $'Summarize:\n\n' --use_peft --bf16 --do_train --do_eval \
        --max_eval_samples 512 --output_dir outputs/qwen3_cnn_dailymail

With `--task language_modeling` the data hold chat `messages`, `prompt` and `completion`, or `text`. The same command
continues a run that was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from hf_temporal.data.copying_scores import argmax_of_logits
from hf_temporal.data.embedded_model import EMBEDDED_MODEL, EMBEDDED_PROVENANCE
from hf_temporal.data.loading import IGNORED
from hf_temporal.finetuning.adapters import add_adapter, check_mergeable
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments, controlled
from hf_temporal.finetuning.generation import generate_completions, prompt_of
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm, require_4bit
from hf_temporal.finetuning.run import (
    CardMixin,
    begin,
    carry_out,
    command_line,
    publish,
    settings_of,
    share_cores,
    tell_powers,
    tell_search,
)
from hf_temporal.finetuning.tasks import TASK_KINDS, Scores, load_task
from hf_temporal.trainer import TemporalWeightTrainer
from hf_temporal.training_args import TemporalTrainingArguments


class CausalTrainer(CardMixin, TemporalWeightTrainer):
    """Adds to every evaluation the scores of what is generated from the prompts alone.

    Args:
        scores: compares it with the labels; None where nothing is generated.
        max_new_tokens: of an answer.
        num_beams: 1 is greedy.
    """

    def __init__(self, *args: Any, scores: Scores | None, max_new_tokens: int, num_beams: int, **kwargs: Any) -> None:
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
        if self._scores is not None:
            examples: Any = dataloader.dataset
            generated = self._generate([prompt_of(example) for example in examples])
            scores = self._scores.score(generated, [example["labels"] for example in examples])
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Each process generates its share; shares are equally long, as sharded models need."""
        processes, rank = self.args.world_size, self.args.process_index
        padded = prompts + prompts[:1] * (-len(prompts) % processes)
        tokenizer: Any = self.processing_class
        mine = generate_completions(
            self.model,
            tokenizer,
            padded[rank::processes],
            batch_size=self.args.per_device_eval_batch_size,
            synced_gpus=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            **self._generation,
        )
        shares: list[list[list[int]]] = gather_object([mine])
        return [answer for turn in zip(*shares, strict=True) for answer in turn][: len(prompts)]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    *arguments, training_args = parse(
        (ModelArguments, *TASK_KINDS, ControlArguments, TemporalTrainingArguments), argv, description=__doc__
    )
    model_args, task_args, _, summarization_args, _, language_modeling_args, control_args = arguments
    weighting = controlled(control_args, training_args)
    if weighting is not None and (task_args.suggest_power or task_args.search_power):
        raise ValueError(f"control={control_args.control!r} has a weighting of its own; accepted: to train with it")
    require_4bit(model_args)
    share_cores()
    set_seed(training_args.seed)
    task = load_task(arguments[1:-1], training_args)
    training_args.do_train &= not (task_args.suggest_power or task_args.search_power)
    run = begin(training_args, arguments, task)

    def load() -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_causal_lm(model_args, task.tokenizer(model_args.tokenizer_name))
        return add_adapter(model, model_args, "CAUSAL_LM") if model_args.use_peft else model, tokenizer

    with training_args.main_process_first():
        model, tokenizer = load()
        splits = task.encode(tokenizer, model.config)
    scores = task.scores(tokenizer, model.config)
    trainer = CausalTrainer(
        model,
        training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=(
            DataCollatorWithFlattening()
            if language_modeling_args.packing
            else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        ),
        processing_class=tokenizer,
        compute_metrics=None if task.generates else scores,
        preprocess_logits_for_metrics=None if task.generates else argmax_of_logits,
        weighting=weighting,
        scores=scores if task.generates else None,
        max_new_tokens=task.answer_length,
        num_beams=summarization_args.num_beams,
    )
    if task_args.suggest_power:
        tell_powers(trainer)
        return
    if task_args.search_power:
        tell_search(trainer, lambda: load()[0], settings_of(arguments, task), trials=task_args.search_power)
        return
    if model_args.merge_adapter:
        check_mergeable(trainer)
    carry_out(trainer, run, task, scores, splits)
    if training_args.do_train:
        base = model_args.model_name_or_path or model_args.model_type or EMBEDDED_MODEL
        publish(
            trainer,
            task,
            model_args,
            command=command_line(__file__, argv, training_args),
            num_beams=summarization_args.num_beams,
            trained=base,
            base_model=None if model_args.model_type else base,
            base_model_note=EMBEDDED_PROVENANCE if base == EMBEDDED_MODEL else None,
        )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
