"""The private parts of other libraries that the package relies on: a test that fails here names the one that moved."""

from __future__ import annotations

import contextlib
import functools
import inspect
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import PushInProgress

from hf_temporal import _peft, _transformers
from tests.tiny_models import PadCollator, causal_examples, tiny_model
from tests.tiny_summarization import tiny_tokenizer

ROWS = causal_examples(4)


def trainer(folder: Path, model: str = "llama", **arguments: Any) -> Any:
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **{**settings, **arguments})
    return Trainer(tiny_model(model), args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=PadCollator())


# ---- transformers


def test_signature_columns_are_a_list_that_decides_what_is_kept(tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    owner._set_signature_columns_if_needed()
    assert "input_ids" in owner._signature_columns, "Trainer._signature_columns"
    _transformers.keep_columns(owner, ["mine", "mine"])
    assert owner._signature_columns.count("mine") == 1
    owner._set_signature_columns_if_needed()
    assert "mine" in owner._signature_columns, "Trainer._set_signature_columns_if_needed fills a list that is there"
    kept = owner._get_collator_with_removed_columns(lambda rows: rows)([{"input_ids": 1, "mine": 2, "other": 3}])
    assert kept == [{"input_ids": 1, "mine": 2}]


@pytest.mark.parametrize(("name", "shifts"), [("llama", True), ("t5", False), ("bart", False)])
def test_loss_mapping_tells_who_shifts_labels(name: str, shifts: bool) -> None:
    assert LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss, "transformers.loss.loss_utils.LOSS_MAPPING"
    model = tiny_model(name)
    assert isinstance(model.loss_type, str), "PreTrainedModel.loss_type"
    assert _transformers.shifts_by_class(model) is shifts
    assert not _transformers.shifts_by_class(nn.Linear(2, 2), default=True)


def test_context_parallel_inputs_are_a_partial_over_buffers(tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    state = mock.Mock(cp_enabled=True, cp_backend="torch", sp_backend="deepspeed", sp_enabled=False)
    found: dict[str, Any] = {}
    accelerator = mock.Mock(parallelism_config=state, maybe_context_parallel=lambda **given: found.update(given))
    owner.accelerator = accelerator
    batch = {key: torch.arange(8)[None].clone() for key in ("input_ids", "labels")}
    context, inputs = owner._prepare_context_parallel_inputs(nn.Linear(2, 2), dict(batch))
    assert isinstance(context, functools.partial), "Trainer._prepare_context_parallel_inputs returns a partial"
    assert "shift_labels" in inputs, "Trainer._prepare_context_parallel_inputs shifts the labels"
    assert any(buffer is inputs["shift_labels"] for buffer in context.keywords["buffers"])

    weights = torch.ones(1, 8)
    _transformers.split_between_ranks(context, weights)()
    assert found["buffers"][-1] is weights
    assert len(found["buffers"]) == len(found["buffer_seq_dims"]) == len(context.keywords["buffers"]) + 1
    assert found["buffer_seq_dims"][-1] == 1
    assert weights in found["no_restore_buffers"]
    with pytest.raises(TypeError, match=r"_prepare_context_parallel_inputs .* accepted: a partial with buffers"):
        _transformers.split_between_ranks(contextlib.nullcontext, weights)


def test_given_shift_labels_are_split_as_they_are(tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    owner.accelerator = mock.Mock(parallelism_config=mock.Mock(cp_enabled=True, cp_backend="torch"))
    shifted = torch.full((1, 8), 5)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None], "shift_labels": shifted}
    _, inputs = owner._prepare_context_parallel_inputs(nn.Linear(2, 2), batch)
    assert inputs["shift_labels"] is shifted, "Trainer._prepare_context_parallel_inputs keeps shift_labels"


class PlainLoss(nn.Module):
    """A model that takes no keyword arguments for its loss, so that older trainers divide what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        del labels
        return {"loss": self.scale, "logits": input_ids.float()}


@pytest.mark.parametrize("model", ["plain", "llama"])
@pytest.mark.parametrize("scaled", [True, False, None])
@pytest.mark.parametrize("items", [None, torch.tensor(8)])
def test_losses_are_divided_as_the_trainer_divides_them(
    model: str, scaled: bool | None, items: Tensor | None, tmp_path: Path
) -> None:
    divided: list[bool] = []

    class Own(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
            divided.append(_transformers.divides_by_accumulation_steps(self, num_items_in_batch))
            return 6.0 + 0.0 * next(model.parameters()).sum()

    args = TrainingArguments(str(tmp_path), gradient_accumulation_steps=3, use_cpu=True, report_to="none")
    owner: Any = Own(PlainLoss() if model == "plain" else tiny_model(model), args, train_dataset=ROWS)
    owner.current_gradient_accumulation_steps = 3
    owner.create_optimizer()
    loss = owner.training_step(owner.model, PadCollator()(ROWS), items)
    assert float(loss) == pytest.approx(2.0 if divided[0] else 6.0), "Trainer.training_step"


def test_get_batch_samples_counts_items_by_get_num_items_in_batch(tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    with mock.patch.object(owner, "_get_num_items_in_batch", return_value=7) as count:
        batches, items = owner.get_batch_samples(iter([PadCollator()(ROWS)]), 1, torch.device("cpu"))
    assert (len(batches), items) == (1, 7)
    assert count.call_count == 1, "Trainer._get_num_items_in_batch"


def test_the_trainer_waits_for_the_jobs_of_push_in_progress(tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    owner.push_in_progress = None
    assert _transformers.pushes_in_progress(owner) == []
    done: Future[Any] = Future()
    done.set_result(None)
    _transformers.set_pushes_in_progress(owner, [done])
    assert isinstance(owner.push_in_progress, PushInProgress)
    assert owner.push_in_progress.is_done(), "PushInProgress.jobs"
    assert _transformers.pushes_in_progress(owner) == [done]
    with mock.patch.object(PushInProgress, "is_done", return_value=False):
        _transformers.wait_for_pushes(owner)  # which asks and waits for those
    _transformers.set_pushes_in_progress(owner, [])
    assert owner.push_in_progress is None


def test_checkpoints_are_pushed_by_push_from_checkpoint(tmp_path: Path) -> None:
    owner = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    owner.args.push_to_hub = True
    owner.push_in_progress = None
    with mock.patch.object(owner, "_push_from_checkpoint") as push:
        owner.train()
    assert [Path(call.args[0]).name for call in push.call_args_list] == ["checkpoint-1"]


@pytest.mark.parametrize("private", [None, True, False])
def test_init_hf_repo_makes_a_private_repository(private: bool | None, tmp_path: Path) -> None:
    owner = trainer(tmp_path)
    makers = [
        mock.patch("transformers.trainer.create_repo", create=True),
        mock.patch("transformers.trainer.hf_api", create=True),
    ]
    with makers[0] as older, makers[1] as newer:
        _transformers.init_hub_repository(owner, token="t", private=private)
    calls = [*older.call_args_list, *newer.return_value.create_repo.call_args_list]
    assert [call.kwargs["private"] for call in calls] == [private], "Trainer.init_hf_repo"
    assert owner.args.hub_private_repo is None


def test_evaluation_loaders_are_kept_in_eval_dataloaders(tmp_path: Path) -> None:
    owner = trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    owner.get_eval_dataloader()
    assert "_eval_dataloaders" in vars(owner), "Trainer._eval_dataloaders"
    _transformers.forget_eval_dataloaders(owner)
    assert "_eval_dataloaders" not in vars(owner)


def test_align_special_tokens_is_what_train_does_first(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    aligned, trained = tiny_model("llama"), tiny_model("llama")
    for model in (aligned, trained):
        model.generation_config.eos_token_id = model.config.eos_token_id = 3
    _transformers.align_special_tokens(aligned, tokenizer)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    data: dict[str, Any] = {"train_dataset": causal_examples(2), "data_collator": PadCollator()}
    trainer = Trainer(trained, args, processing_class=tokenizer, **data)
    trainer.train()
    assert (
        aligned.generation_config.eos_token_id == trained.generation_config.eos_token_id == [tokenizer.eos_token_id, 3]
    )
    assert aligned.config.eos_token_id == trained.config.eos_token_id


def test_a_search_sets_the_arguments_in_hp_search_setup() -> None:
    assert list(inspect.signature(Trainer._hp_search_setup).parameters) == ["self", "trial"]


def test_an_untied_head_stays_untied_where_tie_weights_recomputes_nothing() -> None:
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    before = model.lm_head.weight.detach().clone()
    tied = model.config.tie_word_embeddings
    model.tie_weights(recompute_mapping=False)
    assert tied or torch.equal(model.lm_head.weight, before), "PreTrainedModel.tie_weights(recompute_mapping=False)"


# ---- PEFT


def lora(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=6, **settings)
    model = get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()


def head_of(model: Any) -> Any:
    return _peft.base_model(model).get_output_embeddings()


def plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def logits(layer: Any, hidden: Tensor) -> Tensor:
    linear = layer.base_layer if _peft.is_lora(layer) else layer
    terms = [(hidden, linear.weight), *(_peft.adapter_terms(layer, hidden) if _peft.is_lora(layer) else [])]
    return sum((x @ weight.T for x, weight in terms), torch.zeros(()))


def test_a_lora_layer_is_base_layer_plus_scaling_times_lora_b_lora_a() -> None:
    head = head_of(lora())
    hidden = torch.randn(3, head.base_layer.in_features)
    assert type(head) is LoraLinear
    layer = _peft.known_layer(head, plain)
    assert layer is head, "lora_variant, lora_B[...].bias of peft.tuners.lora.layer.Linear"
    torch.testing.assert_close(logits(layer, hidden), head(hidden), msg="lora_A, lora_B, lora_dropout, scaling")


def test_disabled_and_merged_lora_layers_are_their_base_layer() -> None:
    model = lora()
    head, hidden = head_of(model), torch.randn(3, head_of(model).base_layer.in_features)
    with model.disable_adapter():
        assert _peft.known_layer(head, plain) is head.base_layer, "LoraLayer.disable_adapters"
        torch.testing.assert_close(logits(head.base_layer, hidden), head(hidden))
    model.merge_adapter()
    assert _peft.known_layer(head, plain) is head.base_layer, "LoraLayer.merged"
    torch.testing.assert_close(logits(head.base_layer, hidden), head(hidden))
    with model.disable_adapter():
        assert _peft.known_layer(head, plain) is (head.base_layer if not head.merged else None)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_more_than_a_product_are_not_taken_for_one(settings: dict[str, Any]) -> None:
    assert _peft.known_layer(head_of(lora(**settings)), plain) is None, "LoraLayer.lora_variant, lora_B[...].bias"


def test_only_active_adapters_count() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], r=3, init_lora_weights=False))
    head, hidden = head_of(model), torch.randn(3, head_of(model).base_layer.in_features)
    for name in ("other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(head, hidden), head(hidden), msg="LoraLayer.active_adapters")


def test_a_saved_copy_is_the_one_of_its_active_adapter() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(tiny_model("llama"), config)
    head = head_of(model)
    assert isinstance(head, ModulesToSaveWrapper), "peft.utils.other.ModulesToSaveWrapper"
    assert _peft.known_layer(head, plain) is head.modules_to_save["default"]
    with model.disable_adapter():
        assert _peft.known_layer(head, plain) is head.original_module, "ModulesToSaveWrapper.disable_adapters"


def test_a_merged_model_has_no_adapters() -> None:
    model = lora()
    assert _peft.adapter_names(model) == ["default"]
    assert _peft.adapter_names(model.merge_and_unload()) == []
    assert _peft.adapter_names(tiny_model("llama")) == []
