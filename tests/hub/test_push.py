"""What is pushed can be loaded from the Hub elsewhere, and tells nothing of the machine that it comes from."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeightMixin,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from hf_temporal.hub import HubMixin
from hf_temporal.hub.privacy import PublicCopies, is_local_path
from tests.loopback_hub import OWNER, TOKEN, LoopbackHub, loopback_hub
from tests.tiny_models import tiny_model
from tests.tiny_summarization import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
USER = "ann-onymous"
BASE = "the-base"
LEARNING_RATES = (step / 100 for step in itertools.count(1))  # the hub takes equal weights only once
ROWS = [{"input_ids": list(range(5, 12 + i)), "labels": list(range(5, 12 + i))} for i in range(4)]
INPUTS = torch.arange(5, 25)[None]
RETRIES = 6  # attempts of huggingface_hub at one upload
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
OUR_FILES = {"README.md", "temporal_weighting.json"}
EVALUATION_FILES = {"loss_by_position.json", "loss_by_position.png"}
FULL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


# ---- what the child processes do; their home is the current folder


def new_trainer(name: str, model: Any, **settings: Any) -> TemporalWeightTrainer | TemporalWeightSeq2SeqTrainer:
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    trainer_class = TemporalWeightSeq2SeqTrainer if seq2seq else TemporalWeightTrainer
    tokenizer = AutoTokenizer.from_pretrained(str(Path.home() / BASE))
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = (TemporalSeq2SeqTrainingArguments if seq2seq else TemporalTrainingArguments)(
        **defaults | settings,
        output_dir=str(Path.home() / "outputs" / name),
        hub_model_id=f"{OWNER}/{name}",
        hub_token=TOKEN,
        hub_always_push=True,
        learning_rate=next(LEARNING_RATES),
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    return trainer_class(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collator, processing_class=tokenizer
    )


def adapted(base: str) -> PeftModel:
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig("CAUSAL_LM", target_modules=["q_proj"])
    )


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": INPUTS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=INPUTS, **inputs).logits


def train_and_push() -> None:
    """Train and push every model, and keep their logits."""
    base = str(Path.home() / BASE)
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["made_from"] = f"{base}/texts"
    tokenizer.save_pretrained(base)
    tiny_llama(len(tokenizer)).save_pretrained(base)
    (Path.home() / "outputs" / "full").mkdir(parents=True)
    (Path.home() / "outputs" / "full" / "notes.txt").write_text("mine")
    models: dict[str, Any] = {}

    trainer = new_trainer("full", AutoModelForCausalLM.from_pretrained(base), report_to="tensorboard", eval_steps=1,
                          eval_strategy="steps")  # fmt: skip
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub(dataset="someone/rows", tasks="text-generation", license="mit", tags="tiny")
    models["full"] = trainer.model

    trainer = new_trainer("adapter", adapted(f"{OWNER}/full"))
    trainer.train()
    trainer.push_to_hub()
    models["adapter"] = trainer.model

    trainer = new_trainer(
        "last", adapted(str(Path.home() / "outputs" / "full")), push_to_hub=True, hub_strategy="checkpoint"
    )
    trainer.train()
    trainer.push_to_hub(finetuned_from=f"{OWNER}/full")
    models["last"] = trainer.model

    tiny_model("t5").save_pretrained(Path.home() / "t5")
    t5 = AutoModelForSeq2SeqLM.from_pretrained(str(Path.home() / "t5"))
    trainer = new_trainer("every", t5, push_to_hub=True, hub_strategy="every_save")
    trainer.train()
    models["every"] = trainer.model

    trainer = new_trainer("all", adapted(base), push_to_hub=True, hub_strategy="all_checkpoints", eval_steps=1,
                          eval_strategy="steps", load_best_model_at_end=True, save_total_limit=1)  # fmt: skip
    trainer.train()

    trainer = new_trainer("merged", adapted(base), push_to_hub=True, hub_strategy="every_save")
    trainer.train()
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()  # type: ignore[union-attr, operator]
    trainer.push_to_hub()
    models["merged"] = trainer.model

    time.sleep = lambda _: None  # between attempts
    trainer = new_trainer("flaky", AutoModelForCausalLM.from_pretrained(base))
    trainer.train()
    for token in ("wrong", TOKEN):
        with pytest.raises(RuntimeError) as refused:
            trainer.push_to_hub(token=token)
        sys.stdout.write(f"refused: {refused.value}\n")
    trainer.push_to_hub(blocking=False).result()
    models["flaky"] = trainer.model
    trainer.push_to_hub()

    trainer = new_trainer("lossy", adapted(base), push_to_hub=True, hub_strategy="every_save")
    sys.stdout.write(f"trained to step {trainer.train().global_step}\n")
    trainer.push_to_hub()
    torch.save({name: logits_of(model) for name, model in models.items()}, "trained.pt")


def load() -> None:
    """Load what was pushed, and keep the logits."""
    names = {"full": AutoModelForCausalLM, "adapter": AutoModelForCausalLM, "last": AutoModelForCausalLM,
             "every": AutoModelForSeq2SeqLM, "flaky": AutoModelForCausalLM,
             "merged": AutoModelForCausalLM}  # fmt: skip
    logits = {name: logits_of(kind.from_pretrained(f"{OWNER}/{name}")) for name, kind in names.items()}
    assert (
        AutoTokenizer.from_pretrained(f"{OWNER}/adapter")("the file").input_ids
        == tiny_tokenizer()("the file").input_ids
    )
    torch.save(logits, "loaded.pt")


# ---- what became of it


@dataclass(frozen=True)
class Pushed:
    hub: LoopbackHub
    home: Path
    output: str
    trained: dict[str, torch.Tensor]
    loaded: dict[str, torch.Tensor]

    def files(self, name: str) -> dict[str, bytes]:
        return self.hub.files[f"{OWNER}/{name}"]

    def json(self, name: str, path: str) -> Any:
        return json.loads(self.files(name)[path])

    def card(self, name: str) -> Any:
        return ModelCard(self.files(name)["README.md"].decode())


def run_child(function: str, home: Path, hub: LoopbackHub) -> str:
    """What a process printed that reaches the loopback hub, in a home and with caches of its own."""
    unwanted = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HTTP_PROXY", "http_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted} | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / f"cache-{function}"),
        "HOME": str(home), "USER": USER, "LOGNAME": USER, "MPLCONFIGDIR": mpl.get_cachedir(),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "tests.hub.test_push", function],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout + child.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    home = tmp_path_factory.mktemp("people") / USER
    home.mkdir()
    with loopback_hub(drops={f"{OWNER}/flaky": RETRIES, f"{OWNER}/lossy": RETRIES}) as hub:
        output = run_child("train_and_push", home, hub)
        run_child("load", home, hub)
        yield Pushed(hub, home, output, torch.load(home / "trained.pt"), torch.load(home / "loaded.pt"))


@pytest.mark.parametrize("name", ["full", "adapter", "last", "every", "flaky", "merged"])
def test_a_fresh_process_loads_the_same_model(pushed: Pushed, name: str) -> None:
    assert torch.equal(pushed.loaded[name], pushed.trained[name])


def test_nothing_tells_of_this_machine(pushed: Pushed) -> None:
    secrets = [USER, TOKEN, str(pushed.home), str(pushed.home.parent), str(ROOT), sys.prefix]
    assert len(pushed.hub.files) == 8
    for repo, files in pushed.hub.files.items():
        for path, content in files.items():
            assert not [secret for secret in secrets if secret.encode() in content], f"{repo}/{path}"
            assert "training_args" not in path
    # the local copies are as ever, so there was something to take out
    assert TOKEN.encode() in (pushed.home / "outputs" / "last" / "training_args.bin").read_bytes()
    for name in ("adapter_config.json", "tokenizer_config.json"):
        assert USER in (pushed.home / "outputs" / "last" / name).read_text()
    assert not list((pushed.home / "outputs").rglob("_hub_*"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", FULL | TOKENIZER_FILES | OUR_FILES | EVALUATION_FILES),
        ("adapter", ADAPTER | TOKENIZER_FILES | OUR_FILES),
        ("every", FULL | TOKENIZER_FILES | OUR_FILES),
        ("last", ADAPTER | TOKENIZER_FILES | OUR_FILES),
        ("all", ADAPTER | TOKENIZER_FILES | OUR_FILES | {"loss_by_position.json"}),
    ],
)
def test_what_is_uploaded(pushed: Pushed, name: str, expected: set[str]) -> None:
    folders = {"last": ["last-checkpoint"], "all": ["checkpoint-1", "checkpoint-2"]}.get(name, [])
    checkpoint = ADAPTER | TOKENIZER_FILES | OUR_FILES | STATE
    in_folders = {f"{folder}/{path}" for folder in folders for path in checkpoint}
    assert set(pushed.files(name)) == expected | in_folders


def test_a_whole_model_takes_the_place_of_its_adapter(pushed: Pushed) -> None:
    steps = ["Training in progress, step 1", "Training in progress, step 2"]
    assert pushed.hub.commits[f"{OWNER}/merged"][1:] == [*steps, "End of training"]
    assert "model.safetensors" in pushed.files("merged")
    assert not ADAPTER & set(pushed.files("merged"))


def test_commits(pushed: Pushed) -> None:
    steps = ["Training in progress, step 1", "Training in progress, step 2"]
    assert pushed.hub.commits[f"{OWNER}/every"][1:] == steps
    assert pushed.hub.commits[f"{OWNER}/last"][1:] == [*steps, "End of training"]


def test_base_model_is_named_by_its_hub_id_or_the_name_of_its_folder(pushed: Pushed) -> None:
    for name in ("adapter", "last"):
        assert pushed.json(name, "adapter_config.json")["base_model_name_or_path"] == f"{OWNER}/full"
        assert pushed.card(name).data.base_model == f"{OWNER}/full"
        assert f"| base model | {OWNER}/full. |" in pushed.card(name).text
    assert pushed.json("all", "adapter_config.json")["base_model_name_or_path"] == BASE
    assert pushed.json("all", "checkpoint-2/adapter_config.json")["base_model_name_or_path"] == BASE
    assert pushed.json("all", "checkpoint-2/trainer_state.json")["best_model_checkpoint"].startswith("checkpoint-")
    assert pushed.card("all").data.base_model is None
    assert f"| base model | {BASE}, a folder. |" in pushed.card("all").text


def test_card(pushed: Pushed) -> None:
    card = pushed.card("full")
    assert {"hf-temporal", "arxiv:2307.11462", "tiny", "generated_from_trainer"} <= set(card.data.tags or [])
    assert (card.data.license, card.data.datasets) == ("mit", ["someone/rows"])
    results = {result.metric_type: result for result in card.data.eval_results or []}
    ends = {f"{end}_loss" for end in ("first_token", "head", "tail", "last_token")}
    assert {"loss", "temporal_loss"} | ends == set(results)
    assert results["loss"].task_type == "text-generation"
    for part in ("| p | 1 |", "| effective sample size | ", "| origin |", "| normalization |", "| schedule of p |",
                 "(loss_by_position.png)", "| eval_tail_loss |", "@article{wang2023improve"):  # fmt: skip
        assert part in card.text
    assert "| p | 1 |" in pushed.card("every").text


def test_a_push_that_broke_off_says_what_to_run_again(pushed: Pushed) -> None:
    not_allowed, dropped = (line for line in pushed.output.splitlines() if line.startswith("refused: "))
    assert "the push to flaky (End of training) broke off" in not_allowed
    assert "401" in not_allowed
    assert f"the push to {OWNER}/flaky (End of training) broke off" in dropped
    assert "model.safetensors" in dropped
    for line in (not_allowed, dropped):
        assert "run trainer.push_to_hub() again" in line
        assert str(pushed.home / "outputs" / "flaky") in line
    assert pushed.hub.uploads[f"{OWNER}/flaky"] == 1  # of three pushes


def test_training_survives_a_failed_push_and_the_last_push_tells(pushed: Pushed) -> None:
    assert "trained to step 2" in pushed.output
    assert f"Training goes on, but the push to {OWNER}/lossy (Training in progress, step 1) broke off" in pushed.output
    assert "1 of 2 pushes during training failed" in pushed.output
    assert pushed.hub.commits[f"{OWNER}/lossy"][1:] == ["Training in progress, step 2", "End of training"]


class PushesItself(Trainer):
    """Its own push, as a company's might be: another place, then the trainer's."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self.save_model(_internal_call=True)
        self.save_model(str(Path(str(self.args.output_dir)).parents[2] / "elsewhere"))
        self.create_model_card(model_name=kwargs["model_name"])
        self.received = {path.name: path.read_bytes() for path in Path(str(self.args.output_dir)).iterdir()}
        self.given = (args, kwargs)
        return Future() if kwargs["language"] == "later" else "elsewhere"


class OursInFront(TemporalWeightMixin, HubMixin, PushesItself): ...


@pytest.mark.parametrize("language", ["en", "later"])
def test_a_trainers_own_push_gets_the_copy(language: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / BASE)
    args = TemporalTrainingArguments(str(tmp_path / "mine"), use_cpu=True, hub_token=TOKEN)
    trainer = OursInFront(adapted(str(tmp_path / BASE)), args, processing_class=tokenizer)
    pushed = trainer.push_to_hub("done", private=True, language=language)
    assert trainer.given == (
        ("done", True, None, None),
        {"private": True, "language": language, "model_name": "mine"},
    )
    assert set(trainer.received) == ADAPTER | TOKENIZER_FILES | OUR_FILES
    assert b"## Temporal weighting" in trainer.received["README.md"]
    assert not [name for name, content in trainer.received.items() if str(tmp_path).encode() in content]
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").is_file()
    assert args.output_dir == str(tmp_path / "mine")
    assert str(tmp_path) in (tmp_path / "mine" / "adapter_config.json").read_text()
    if language == "later":
        assert list((tmp_path / "mine").glob("_hub_*"))
        pushed.set_result(None)
    assert not list((tmp_path / "mine").glob("_hub_*"))


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("/srv/ann/x", True),
        ("/srv/Ann Onymous/x", True),
        ("~/x", True),
        ("C:\\x", True),
        ("\\\\server\\x", True),
        ("file:///x", True),
        (str(ROOT.name), False),
        ("/", False),
        ("//", False),
        ("/think", False),
        ("</s>", False),
        ("\\d+", False),
        ("1:2/3", False),
        ("someone/name", False),
        ("https://host/a/b", False),
        ("/a/b\n", False),
        ("a/" * 5000, False),
    ],
)
def test_local_paths(text: str, local: bool) -> None:
    assert is_local_path(text) == local


def test_copies_leave_the_original_and_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    source = tmp_path / "source"
    source.mkdir()
    config = {
        "a": ["runs/base", {"b": "/srv/ann/base"}],
        "c": 1e-7,
        "d": "{% x %}\n/srv/ann/y",
        "e": "</s>",
        "f": TOKEN,
    }
    names = ("config.json", "tokenizer_config.json", "vocab.json")
    for name in names:
        (source / name).write_text(json.dumps(config))
    PublicCopies("/srv/ann/base", "someone/base").make(source, tmp_path / "target", ["*"])
    public = {"a": ["base", {"b": "someone/base"}], "c": 1e-7, "d": config["d"], "e": "</s>", "f": "<token>"}
    copies = [json.loads((tmp_path / "target" / name).read_text()) for name in names]
    assert copies == [{**public, "d": "{% x %}\ny"}, public, config]
    assert json.loads((source / "config.json").read_text()) == config


if __name__ == "__main__":
    {"train_and_push": train_and_push, "load": load}[sys.argv[1]]()
