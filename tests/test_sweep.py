"""Sweeps: what is finished is not run again, what fails stops nothing else; tables' rows and columns compose."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ended, forked
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from dd_lightning.commands import sweep
from dd_lightning.commands.launch import CONF
from dd_lightning.commands.report import PAPER
from dd_lightning.commands.sweep import number_of_jobs
from dd_lightning.evaluation import evaluator

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "init=random")
TOY += ("network._target_=conftest.SmallNet", "networks=3", "distilled=random_real", "distilled.sets=2")
TOY += ("distilled.steps=2",)
SWEPT = (*TOY, "hydra.sweep.dir=runs/sweep", "hydra.sweep.subdir=${distilled.learning_rate}")


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


def results():
    """The result files of the sweep, by the learning rate of their job."""
    return {path.parent.name: path for path in Path("runs/sweep").glob("*/result.json")}


def test_finished_jobs_are_skipped_and_failed_ones_listed_and_run_again(run):
    jobs = ("-m", "distilled.learning_rate=0.1,-1,0.2")
    code, error, _ = run("evaluate", *jobs, *SWEPT)
    assert code == 1
    assert "1 job of the sweep failed; the same command runs what failed again" in error
    assert "distilled.learning_rate=-1" in error
    assert "learning_rate[0] must be a number above 0, not -1" in error
    assert "Traceback" not in error
    first = {rate: path.stat().st_mtime_ns for rate, path in results().items()}
    assert set(first) == {"0.1", "0.2"}
    code, error, _ = run("evaluate", "-m", "distilled.learning_rate=0.1,0.2,0.3", *SWEPT)
    assert (code, error) == (0, "")  # what failed before is no job of this sweep
    second = {rate: path.stat().st_mtime_ns for rate, path in results().items()}
    assert second.pop("0.3")
    assert second == first


def test_a_job_of_other_settings_is_run_in_the_same_folder(run):
    run("evaluate", "-m", "distilled.learning_rate=0.1", *SWEPT)
    (path,) = results().values()
    finished = json.loads((path.parent / "finished.json").read_text())
    finished["settings"]["networks"] = 99
    (path.parent / "finished.json").write_text(json.dumps(finished))
    before = path.stat().st_mtime_ns
    run("evaluate", "-m", "distilled.learning_rate=0.1", *SWEPT)
    assert path.stat().st_mtime_ns > before


def test_a_grid_is_one_job_and_leaves_its_choice(run):
    grid = ("use=grid", "use.learning_rates=[0.1,0.3]", "use.epochs=[1,2]", "use.pictures=10")
    code, error, folder = run("evaluate", *TOY, *grid)
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert len(result["use"]["combinations"]) == 4
    assert result["use"]["chosen"] in result["use"]["combinations"]
    assert result["use"]["gap"] >= 0
    assert len(result["test"]["accuracies"]) == 6
    assert not (folder / "pieces").exists()
    assert (folder / "distilled.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("use=grid use.learning_rates=[0.1,0.1]", "use: learning_rates must be different values"),
        ("use=grid use.epochs=[0]", "use: epochs[0] must"),
        ("use=knn use.metrics=[l3]", "use: unknown metric 'l3'; choose one of l1, l2"),
        ("use=few_shot_adaptation", "use: few-shot adaptation needs the networks' own data set: +dataset@source=NAME"),
        ("distilled.sets=0", "distilled: sets must"),
        ("processes=0", "processes must"),
        ("column=nonsense", "average_real"),
    ],
)
def test_bad_input_in_one_line(run, overrides, message):
    code, error, _ = run("evaluate", *TOY, *overrides.split())
    assert code not in (0, None)
    assert message in error
    assert "Traceback" not in error
    assert error.startswith("dd-evaluate: error: ")


def test_a_missing_population_names_the_command_that_makes_it(run):
    code, error, _ = run("evaluate", "row=m2u", "column=no_adaptation", "dataset=digits")
    assert code == 1
    assert "dd-pretrain" in error


def test_baselines_start_a_distillation_but_candidates_do_not(run):
    short = (
        "trainer.max_steps=1",
        "callbacks.held_out.test_networks=1",
        "callbacks.held_out.networks=1",
        "batch_size=8",
    )
    code, error, _ = run("distill", *TOY[:5], TOY[5], *short, "distilled=average_real", "init=fixed")
    assert (code, error) == (0, "")
    code, error, _ = run("distill", *TOY[:5], TOY[5], *short, "distilled=optimized_real", "distilled.steps=1")
    assert code == 1
    assert "for dd-evaluate alone" in error


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(CONF.parent)])}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_sweep_goes_on_with_what_is_missing(run, monkeypatch):
    jobs = ("-m", "distilled.learning_rate=0.1,0.2", "networks=100", "distilled.steps=2", "distilled.sets=8")
    line = (*jobs, *(o for o in SWEPT if not o.startswith(("networks", "distilled.s"))))
    process, deadline = forked("evaluate", *line), time.monotonic() + 200
    while not (kept := list(Path("runs").rglob("testing/*.npz"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == 128 + signal.SIGKILL
    before = len(list(kept[0].parent.glob("networks*.npz")))
    assert before < 10
    assert not list(Path("runs").rglob("result.json"))
    done, work = [], evaluator.judge_sets
    # By the name under which the kept results lie.
    monkeypatch.setattr(evaluator, "judge_sets", lambda *arguments: done.append(1) or work(*arguments))
    assert run("evaluate", *line)[:2] == (0, "")
    assert len(list(Path("runs").rglob("result.json"))) == 2
    assert len(done) == 20 - before


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    command = [sys.executable, "-m", "dd_lightning.commands.evaluate", "-m", "distilled.learning_rate=0.1,-1,0.2"]
    command += [*SWEPT, f"hydra/launcher={launcher}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 job of the sweep failed" in done.stderr
    assert "learning_rate[0] must be a number above 0, not -1" in done.stderr
    assert len(list(tmp_path.glob("runs/sweep/*/result.json"))) == 2


def test_every_number_of_the_paper_has_a_command_that_composes():
    """Rows, columns, sweeps and experiments that paper.yaml names exist, and the sweeps run through all of them."""
    paper = yaml.safe_load(PAPER.read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for table in paper["tables"].values():
            sweep = yaml.safe_load((CONF / "sweep" / f"{table['sweep']}.yaml").read_text())
            params = {k: v.split(",") for k, v in sweep["hydra"]["sweeper"]["params"].items()}
            assert set(params["row"]) == set(table["rows"])
            of_sweep = {c for row in table["rows"].values() for c, v in row["cells"].items() if "experiment" not in v}
            assert set(params["column"]) == of_sweep
            for row, of_row in table["rows"].items():
                for column, cell in of_row["cells"].items():
                    if "experiment" in cell:
                        assert (CONF / "experiment" / f"{cell['experiment']}.yaml").is_file()
                    else:
                        overrides = [f"sweep={table['sweep']}", f"row={row}", f"column={column}"]
                        assert compose("evaluate", overrides=overrides).name == table["sweep"]
        for entry in paper["curves"].values():
            assert compose("distill", overrides=[f"sweep={entry['sweep']}"]).name == entry["sweep"]
        five = compose("distill", overrides=["sweep=fig5_steps_vs_batch", "+arrangement=one_step", "per_class=7"])
        assert (five.distilled.steps, five.distilled.images_per_class) == (1, 7)
        six = compose("evaluate", overrides=["sweep=fig6_baselines", "row=fig6_mnist", "column=kmeans"])
        assert (list(six.use.epochs), six.distilled.steps, six.objective.target_class) == ([1], 1, 1)
        three = compose("evaluate", overrides=["sweep=table3_baselines", "row=voc", "column=average_real"])
        assert (three.distilled.steps, three.distilled.epochs, three.network.name) == (1, 3, "alexnet")


def test_jobs_are_counted_as_the_command_line_says():
    config = OmegaConf.create({"hydra": {"sweeper": {"params": {"network": "mlp,lenet"}}, "overrides": {"task": []}}})
    assert number_of_jobs(config) == 2
    config.hydra.overrides.task = ["seed=1,2,3"]
    assert number_of_jobs(config) == 6
    config.hydra.overrides.task = ["seed=1,2,3", "network=lenet"]
    assert number_of_jobs(config) == 3


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": {"seed": 2}}'])
def test_a_record_that_is_not_whole_finishes_no_job(tmp_path, monkeypatch, record):
    runtime = SimpleNamespace(output_dir=str(tmp_path))
    overrides = SimpleNamespace(task=["seed=1"])
    job = SimpleNamespace(runtime=runtime, overrides=overrides, job=SimpleNamespace(num=0))
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: job)
    cfg, done = OmegaConf.create({"seed": 1, "hydra": {}}), []
    (tmp_path / "finished.json").write_text(record)
    for _ in range(2):
        assert sweep.run_job(lambda cfg: done.append(1) or 0.5, cfg, str) == 0.5
    assert done == [1]


def test_a_job_whose_settings_cannot_be_resolved_stops_no_other(run):
    code, error, _ = run("evaluate", "-m", "distilled.learning_rate=${nope},0.1", *SWEPT[:-1])
    assert code == 1
    assert "1 job of the sweep failed" in error
    assert "'nope' not found" in error
    assert len(list(Path("runs/sweep").glob("*/result.json"))) == 1


@pytest.mark.parametrize(
    ("launcher", "extra"), [("joblib", "joblib"), ("submitit_local", "submitit"), ("slurm", "submitit")]
)
def test_a_launcher_that_is_not_installed_says_how_to_install_it(run, monkeypatch, launcher, extra):
    Plugins.instance()
    known = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in [n for n in known if n.startswith(extra)]:
        monkeypatch.delitem(known, name)
    code, error, _ = run("evaluate", "-m", "seed=1,2", f"hydra/launcher={launcher}")
    assert code == 1
    assert error == f"dd-evaluate: error: the launcher {extra} is not installed: pip install -e '.[{extra}]'"


def test_a_full_disk_says_so_wherever_it_is_met(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    code, error, _ = run("evaluate", *TOY)
    assert code == 1
    said = "cannot write (No space left on device); once there is room, the same command goes on"
    assert error == f"dd-evaluate: error: {said}"
