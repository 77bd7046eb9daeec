"""Searches with Optuna: gone on with where they were stopped, hopeless trials stopped, the best as an experiment."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from test_commands import TOY

from dd_lightning.commands import distill
from dd_lightning.commands.launch import CONF
from dd_lightning.commands.search import experiment
from dd_lightning.system.signals import Interrupted

optuna = pytest.importorskip("optuna")

LINE = ("sweep=search", *TOY, "unroll=functional", "trainer.max_steps=4", "callbacks.held_out.every=1")
LINE += ("hydra.sweep.dir=runs/search", "hydra.sweep.subdir=${optimizer.lr}", "hydra.sweeper.n_trials=4")


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


def trials():
    return optuna.load_study(storage="sqlite:///runs/search/study.db", study_name="search").trials


def test_a_search_goes_on_with_the_trials_that_are_missing(run, monkeypatch):
    whole, count = distill.run, []

    def interrupted(cfg, folder):
        count.append(folder)
        if len(count) == 1:
            raise Interrupted(15, "")
        return whole(cfg, folder)

    monkeypatch.setattr(distill, "run", interrupted)
    assert run("distill", *LINE)[0] == 128 + 15
    assert [t.state.name for t in trials()] == ["RUNNING"]
    code, error, _ = run("distill", *LINE)
    assert (code, error) == (0, "")
    found = trials()
    assert [t.state.name for t in found] == ["COMPLETE"] * 4
    assert len({t.params["optimizer.lr"] for t in found}) == 4
    assert (len(count), count[0]) == (5, count[1])  # what was interrupted went on in its folder
    validation = {
        path.parent.name: json.loads(path.read_text())["validation_accuracy_mean"]
        for path in Path("runs/search").glob("*/result.json")
    }
    assert {str(t.params["optimizer.lr"]): t.value for t in found} == validation

    best = max(found, key=lambda t: t.value)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "distill", overrides=[f"hydra.searchpath=[file://{Path('runs/search').absolute()}]", "experiment=best"]
        )
    assert cfg.optimizer.lr == best.params["optimizer.lr"]
    assert (cfg.dataset.path, cfg.trainer.max_steps, cfg.returned) == ("toy.npz", 4, "test")
    assert Path("runs/search/search.png").stat().st_size > 1000
    record = json.loads(Path("runs/search/search.json").read_text())
    assert [trial["value"] for trial in record["trials"]] == [t.value for t in found]
    assert record["of"] == 4

    code, error, _ = run("distill", *LINE)
    assert (code, len(count)) == (0, 5)  # nothing is missing
    code, error, _ = run("distill", *LINE, "batch_size=8")
    assert code == 1
    assert "is of other settings" in error


def hopeless(n_startup_trials):
    return optuna.pruners.ThresholdPruner(lower=101, n_warmup_steps=2)


def test_a_hopeless_trial_is_stopped(run):
    pruner = "callbacks.pruning.pruner._target_=test_search.hopeless"
    code, error, _ = run("distill", *LINE[:-1], pruner, "hydra.sweeper.n_trials=1")
    assert (code, error) == (0, "")
    (trial,) = trials()
    assert list(trial.intermediate_values) == [1, 2]
    (path,) = Path("runs/search").glob("*/result.json")
    assert json.loads(path.read_text())["outer_steps"] == 2
    assert trial.value == max(trial.intermediate_values.values())


def test_the_best_is_an_experiment_on_top_of_another():
    text = experiment("demo", ["trainer.max_steps=60", "schedule=step", "distilled.learning_rate=[1,2]"], "why")
    assert text.splitlines() == [
        "# @package _global_",
        "# why",
        "defaults:",
        "- demo",
        "- override /schedule: step",
        "- _self_",
        "trainer:",
        "  max_steps: 60",
        "distilled:",
        "  learning_rate:",
        "  - 1",
        "  - 2",
        "name: demo_best",
    ]
