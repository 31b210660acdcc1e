"""The search for p: p = 0 among the trials, what decides, going on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from hf_temporal.data.copying import digit_tokenizer
from recipes.finetune_causal_lm import CausalTrainer, main

FLAGS = [
    *("--task", "copying", "--blank_length", "4", "--copy_length", "2", "--model_type", "memory_linear_rnn"),
    *("--config_overrides", "hidden_size=4", "--max_steps", "2", "--max_eval_samples", "4", "--use_cpu"),
    *("--per_device_train_batch_size", "2", "--report_to", "none", "--do_train", "--do_eval"),
]


def studies(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    storage = f"sqlite:///{folder / 'search' / 'study.db'}"
    return {
        name: optuna.load_study(study_name=name, storage=storage).trials
        for name in optuna.get_all_study_names(storage)
    }


def test_a_search_tells_what_each_p_reached_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = CausalTrainer.train
    trained: list[float] = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(trained) == 1:
            trained.append(-1.0)
            raise KeyboardInterrupt
        found = train(self, *args, **kwargs)
        trained.append(self.weighting.power)
        return found

    monkeypatch.setattr(CausalTrainer, "train", interrupted)
    flags = [*FLAGS, "--output_dir", str(tmp_path), "--metric_for_best_model", "recall"]
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--search_power", "3"])
    main([*flags, "--search_power", "3"])
    ((_, trials),) = studies(tmp_path).items()
    complete = [each for each in trials if each.value is not None]
    assert [each.params["temporal_power"] for each in complete] == [each for each in trained if each >= 0]
    assert len(complete) == 3
    assert complete[0].params["temporal_power"] == 0
    assert all(0 < each.params["temporal_power"] <= 10 for each in complete[1:])
    best = max(complete, key=lambda each: each.value or 0.0)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "**best**" in line]
    assert float(told.split("|")[1]) == pytest.approx(best.params["temporal_power"], abs=5e-4)
    assert (tmp_path / "search" / "trials.png").read_bytes().startswith(b"\x89PNG")

    assert {each.name for each in tmp_path.iterdir()} == {"search"}  # a run's own files stay as they are

    main([*flags, "--search_power", "3"])
    assert len(trained) == 4
    main([*flags, "--search_power", "1", "--learning_rate", "1e-3"])
    assert sorted(len(each) for each in studies(tmp_path).values()) == [1, len(trials)]


def test_the_loss_decides_where_nothing_else_is_named(tmp_path: Path) -> None:
    main([*FLAGS, "--output_dir", str(tmp_path), "--search_power", "1"])
    ((name, (trial,)),) = studies(tmp_path).items()
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'search' / 'study.db'}")
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert trial.value is not None


def test_other_data_are_another_search(tmp_path: Path) -> None:
    flags = [flag for flag in FLAGS if flag not in ("--task", "copying")]
    flags += ["--task", "language_modeling", "--output_dir", str(tmp_path), "--search_power", "1"]
    flags += ["--tokenizer_name", str(tmp_path / "tokenizer")]
    flags += [f"--{split}_file={tmp_path / split}.jsonl" for split in ("train", "validation")]
    digit_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for text in ("123", "456"):
        for split in ("train", "validation"):
            (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        main(flags)
    assert [len(trials) for trials in studies(tmp_path).values()] == [1, 1]


def test_a_run_that_diverges_counts_as_infinitely_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FLAGS, "--output_dir", str(tmp_path), "--search_power", "2", "--learning_rate", "1e30"])
    assert capsys.readouterr().out.count("| not finite") == 2
    ((_, trials),) = studies(tmp_path).items()
    assert [trial.value for trial in trials] == [math.inf, math.inf]


def test_what_is_not_measured_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    message = "metric_for_best_model='rouge1' is not measured; accepted of: .*loss, .*recall"
    with pytest.raises(ValueError, match=message):
        main([*FLAGS, "--output_dir", str(tmp_path), "--search_power", "1", "--metric_for_best_model", "rouge1"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--metric_for_best_model", "temporal_loss"], "metric_for_best_model='temporal_loss' cannot choose a p"),
        (["--search_power", "-1"], "search_power=-1; accepted: a whole number"),
    ],
)
def test_what_cannot_be_searched_is_named(given: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([*FLAGS, "--output_dir", str(tmp_path), "--search_power", "1", *given])
