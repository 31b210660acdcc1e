"""The main recipe from beginning to end on a tiny model: results, card, interruption, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_temporal.data.embedded_model import EMBEDDED_MODEL
from hf_temporal.evaluation import load_profiles
from hf_temporal.finetuning import models
from recipes import finetune_causal_lm
from recipes.finetune_causal_lm import CausalTrainer, main
from tests.loopback_hub import OWNER, TOKEN, loopback_hub
from tests.tiny_run import Tiny

ADAPTER = "adapter_model.safetensors"
KILLED_AT_STEP_3 = """
import os, signal, sys
from recipes import finetune_causal_lm as recipe
step = recipe.CausalTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
recipe.CausalTrainer.training_step = training_step
recipe.main(sys.argv[1:])
"""


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output_dir / "evaluations.json").read_text("utf-8"))["evaluations"]
    return found


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one undisturbed run."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs"))
        main(tiny.flags(output_dir, "--report_to", "tensorboard", "--do_predict"))
    return output_dir


def test_powers_are_told_and_nothing_is_trained(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    main(tiny.flags(tmp_path / "look", "--suggest_power"))
    text = capsys.readouterr().out
    assert "24 documents of " in text
    assert "| weight at p = 4 " in text
    numbers, picture = sorted((tmp_path / "look").iterdir())
    assert (numbers.name, picture.name) == ("suggested_power.json", "suggested_power.png")
    told = json.loads(numbers.read_text("utf-8"))
    assert told["documents"] == 24
    assert {"power", "effective_sample_size", "quarters", "loss"} <= told["effects"][0].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---- results


def test_adapter_is_trained_and_loads(finished: Path, tiny: Tiny) -> None:
    weights = load_file(finished / ADAPTER)
    assert all(weight.abs().sum() > 0 for weight in weights.values())  # B is zero before training
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.model), finished)
    adapted = {
        name.rpartition(".lora_B")[0].rpartition(".")[2] for name, _ in model.named_modules() if "lora_B" in name
    }
    assert adapted - {""} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_before_and_after_are_kept_and_the_model_learned(finished: Path) -> None:
    before, after = evaluations(finished)
    assert (before["step"], after["step"]) == (0, 4)
    assert after["metrics"]["eval_loss"] < before["metrics"]["eval_loss"] - 0.1
    for each in (before, after):
        names = {"rouge1", "rouge2", "rougeL", "gen_len", "loss", "temporal_loss", "head_loss", "tail_loss"}
        assert {f"eval_{name}" for name in names} <= set(each["metrics"])
        assert len(each["generated"]) == len(each["references"]) == 7
    assert before["references"] == after["references"]
    assert before["references"][0].startswith("Take x24 from file 24")
    assert before["generated"] != after["generated"]


def test_picture_profile_log_and_predictions(finished: Path) -> None:
    steps = [
        profile["step"] for profile in load_profiles(finished / "loss_by_position.json") if profile["split"] == "eval"
    ]
    assert steps == [0, 4]
    assert (finished / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "runs").glob("events.out.tfevents.*"))
    predictions = (finished / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["reference"][:8] for line in predictions] == [f"Take x{index}" for index in range(31, 36)]


def test_card_says_what_was_done(finished: Path, tiny: Tiny) -> None:
    card = ModelCard.load(finished / "README.md")
    before, after = evaluations(finished)
    sha256 = json.loads((finished / "run.json").read_text("utf-8"))["sha256_of_the_data"]
    for expected in (
        "| p | 1 |",
        "`sequence`",
        "24 train, 7 validation, 5 test examples",
        sha256,
        "accelerate launch recipes/finetune_causal_lm.py",
        "--max_steps 4",
        f"torch {version('torch')}",
        "arXiv:2307.11462",
        "loss_by_position.png",
        f"| eval_loss | {before['metrics']['eval_loss']:.3f} | {after['metrics']['eval_loss']:.3f} |",
        after["references"][4],
        "PeftModel.from_pretrained",
    ):
        assert expected in card.text
    assert str(tiny.model.parent) not in str(card)
    assert card.data.library_name == "peft"
    assert {"hf-temporal", "arxiv:2307.11462"} <= set(card.data.tags)
    assert {result.metric_type for result in card.data.eval_results} >= {"rouge1", "rouge2", "rougeL", "loss"}


def test_embedded_model_is_recorded_by_its_name(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "embedded_model_folder", lambda: tiny.model)
    flags = tiny.flags(tmp_path / "run", "--max_steps", "1", "--do_eval", "false")
    main(flags[2:])
    assert (
        json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == EMBEDDED_MODEL
    )
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert f"base_model: {EMBEDDED_MODEL}" in card
    assert "4-bit (Q4_1) GGUF" in card
    for path in (tmp_path / "run").rglob("*.json"):
        assert str(tiny.model) not in path.read_text("utf-8"), path


def test_all_weights_are_trained_without_an_adapter(tiny: Tiny, tmp_path: Path) -> None:
    main(tiny.flags(tmp_path / "run", "--use_peft", "false", "--max_steps", "1", "--do_eval", "false"))
    before = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]


# ---- interruption


def test_killed_and_continued_ends_in_the_same_adapter(
    finished: Path, tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    output_dir = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_AT_STEP_3, *tiny.flags(output_dir)]
    killed = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (output_dir / ADAPTER).exists()
    (before,) = evaluations(output_dir)

    main(tiny.flags(output_dir))

    assert evaluations(output_dir)[0] == before
    weights, expected = load_file(output_dir / ADAPTER), load_file(finished / ADAPTER)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)
    after, undisturbed = evaluations(output_dir)[1], evaluations(finished)[1]
    assert after["generated"] == undisturbed["generated"]
    assert after["metrics"]["eval_loss"] == pytest.approx(undisturbed["metrics"]["eval_loss"], rel=1e-5)


def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    main(tiny.flags(tmp_path / "run", "--do_eval", "false"))
    weights = load_file(tmp_path / "run" / ADAPTER)
    (tmp_path / "run" / ADAPTER).unlink()
    last = tmp_path / "run" / "checkpoint-4"
    (last / "trainer_state.json").write_text('{"global_step": 4, "max_st', encoding="utf-8")
    (last / ADAPTER).write_bytes(b"")
    (last / "checksums.json").unlink()
    main(tiny.flags(tmp_path / "run", "--do_eval", "false"))
    for name, weight in load_file(tmp_path / "run" / ADAPTER).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-6, atol=1e-7)


def test_a_finished_run_is_reported_and_not_trained_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny.flags(tmp_path / "run"))
    first = capsys.readouterr().out
    weights = (tmp_path / "run" / ADAPTER).read_bytes()
    (tmp_path / "run" / ADAPTER).unlink()
    monkeypatch.setattr(CausalTrainer, "training_step", lambda *_: pytest.fail("trained again"))
    main(tiny.flags(tmp_path / "run"))
    table = capsys.readouterr().out
    assert "| ROUGE-1" in table
    assert table.strip().splitlines()[-20:] == first.strip().splitlines()[-20:]
    assert (tmp_path / "run" / ADAPTER).read_bytes() == weights


def test_another_run_does_not_go_on_in_the_same_folder(tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", "--max_steps", "2", "--do_eval", "false")
    main(flags)
    with pytest.raises(
        ValueError, match=r"temporal_power=0\.0, but output_dir=.*holds a run with temporal_power=1\.0"
    ):
        main([*flags, "--temporal_power", "0"])


def test_a_run_does_not_go_on_with_other_data(tiny: Tiny, tmp_path: Path) -> None:
    train_file = tmp_path / "train.jsonl"
    lines = Path(tiny.data_flags[1]).read_text("utf-8").splitlines(keepends=True)
    train_file.write_text("".join(lines), encoding="utf-8")
    flags = tiny.flags(tmp_path / "run", "--train_file", str(train_file), "--max_steps", "2", "--do_eval", "false")
    main(flags)
    train_file.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sha256_of_the_data=.* holds a run with sha256_of_the_data="):
        main(flags)


# ---- the Hub


def test_a_push_that_broke_off_is_made_up_for_by_the_same_command(
    tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """And what arrives is the model with its card, without token or path, and loads from the Hub elsewhere."""
    script = Path(finetune_causal_lm.__file__)
    push = ("--push_to_hub", "--hub_model_id", f"{OWNER}/x24", "--hub_token", TOKEN, "--hub_strategy", "end")
    flags = tiny.flags(tmp_path / "run", "--merge_adapter", "--max_steps", "1", "--max_eval_samples", "4", *push)
    command = [sys.executable, str(script), *flags]
    with loopback_hub({f"{OWNER}/x24": 1000}) as hub:
        online = child_environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        broken = subprocess.run(command, env=online, capture_output=True, text=True, check=False)
        hub.drops.clear()
        complete = subprocess.run(command, env=online, capture_output=True, text=True, check=False)
        assert broken.returncode == 1
        assert f"the push to {OWNER}/x24" in broken.stderr
        assert "the same command" in broken.stderr
        assert complete.returncode == 0, complete.stderr[-3000:]
        assert "is not trained again" in complete.stderr
        files = hub.files[f"{OWNER}/x24"]
        assert {"README.md", "model.safetensors", "tokenizer.json", "temporal_weighting.json"} <= set(files)
        assert not {"training_args.bin", ADAPTER} & set(files)
        assert b"## Temporal weighting" in files["README.md"]
        for name, content in files.items():
            assert TOKEN.encode() not in content, name
            assert str(tmp_path).encode() not in content, name
            assert str(tiny.model.parent).encode() not in content, name
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer; import torch; "
            f"model = AutoModelForCausalLM.from_pretrained('{OWNER}/x24'); "
            f"tokenizer = AutoTokenizer.from_pretrained('{OWNER}/x24'); "
            "inputs = tokenizer('The value', return_tensors='pt'); print(model(**inputs).logits.sum().item())"
        )
        elsewhere = online | {"HF_HOME": str(tmp_path / "elsewhere")}
        load = [sys.executable, "-c", code]
        loaded = subprocess.run(load, env=elsewhere, capture_output=True, text=True, check=True)
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "run")("The value", return_tensors="pt")
    assert float(loaded.stdout) == pytest.approx(local(**inputs).logits.sum().item(), rel=1e-5)


def test_reported_is_the_model_that_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    """The loss falls, so the highest is that of step 2."""
    best = ["--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    main(tiny.flags(tmp_path / "run", "--eval_strategy", "steps", "--eval_steps", "2", *best))
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    last = evaluations(tmp_path / "run")[-1]
    assert state["best_global_step"] == 2
    assert last["metrics"]["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-4)


# ---- what is wrong is said


def test_adapter_modules_that_match_nothing_are_named(tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", "--lora_target_modules", "q_proj", "qkv")
    with pytest.raises(ValueError, match=r"'qkv' is no module here; accepted: .*down_proj.*q_proj"):
        main(flags)


def test_a_run_without_anything_to_do_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    flags = [flag for flag in tiny.flags(tmp_path) if flag not in ("--do_train", "--do_eval")]
    with pytest.raises(ValueError, match="leave nothing to do; accepted: --do_train"):
        main(flags)
    main([*flags, "--suggest_power"])


def test_missing_split_is_named(tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run")
    position = flags.index("--validation_file")
    with pytest.raises(ValueError, match="do_eval=True needs a validation split, and the data have: train, test"):
        main(flags[:position] + flags[position + 2 :])


# ---- several processes


def test_two_processes_evaluate_as_one_does(tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]) -> None:
    """The same examples a step, seven to evaluate on, which two do not divide."""
    script = Path(finetune_causal_lm.__file__)
    config = script.parent / "accelerate" / "ddp_cpu.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    flags = tiny.flags(tmp_path / "run", "--per_device_train_batch_size", "2", "--lora_dropout", "0")
    if not torch.accelerator.is_available():
        flags.remove("--use_cpu")  # nothing else is there, and the README's command does without
    command = [*launch, str(script), *flags]
    run = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    main(tiny.flags(tmp_path / "alone", "--lora_dropout", "0"))
    assert "--num_processes 2" in (tmp_path / "run" / "README.md").read_text("utf-8")
    for several, alone in zip(evaluations(tmp_path / "run"), evaluations(tmp_path / "alone"), strict=True):
        assert several["references"] == alone["references"]
        assert several["generated"] == alone["generated"]
        assert len(set(alone["generated"])) > 3
        for name in ("eval_rouge1", "eval_temporal_loss", "eval_head_loss", "eval_tail_loss", "eval_gen_len"):
            assert several["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4), name
    weights = load_file(tmp_path / "alone" / ADAPTER)
    for name, weight in load_file(tmp_path / "run" / ADAPTER).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-5)
    assert run.stdout.count("| ROUGE-1") == 1


ALONE = "world_size=1, and 2 processes were launched: each would train alone"


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.13"),
    reason="accelerate refuses it, and leaves its environment",
)
def test_one_of_two_processes_that_is_alone_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=ALONE):
        main([*(flag for flag in tiny.flags(tmp_path / "run") if flag != "--use_cpu"), "--use_cpu", "false"])
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.skipif(torch.accelerator.is_available(), reason="they would know of each other")
def test_processes_that_know_nothing_of_each_other_are_refused(
    tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    flags = [flag for flag in tiny.flags(tmp_path / "run") if flag != "--use_cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, finetune_causal_lm.__file__, *flags, "--use_cpu", "false"]
    run = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert ALONE in run.stderr
    assert not (tmp_path / "run").exists()
