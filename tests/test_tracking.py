"""Trackers of experiments, without a network: a run of theirs for a folder, artifacts, several at once, sweeps."""

import json
import struct

import pytest
import yaml
from hydra import compose, initialize_config_dir
from test_commands import SHORT, TOY

from dd_lightning import DistilledData
from dd_lightning.commands.launch import CONF


@pytest.fixture(autouse=True)
def toy(packed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return packed()


def records(folder):
    """What the W&B runs of a folder hold, by kind, in the order of their writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {"run": [], "artifact": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in pieces(path.read_bytes()):
            record = Record.FromString(data)
            if (kind := record.WhichOneof("record_type")) in found:
                found[kind].append(getattr(record, kind))
    return found


def pieces(content, block=32768):
    """The records of a LevelDB log, after its header: parts that begin with checksum, length and type."""
    whole, place = b"", 7
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for another part in this block
            place += block - place % block
            continue
        length, kind = struct.unpack("<4xHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or the last part of one
            yield whole
            whole = b""


def test_wandb_holds_the_data_and_a_run_gone_on_with_is_the_same_run(run):
    about = ("logger=wandb", "logger.wandb.tags=[one,two]", "logger.wandb.notes=why", "init=fixed")
    code, error, folder = run("distill", *SHORT, *about)
    assert code == 0, error
    name = (folder / "wandb_run.txt").read_text()
    assert run("distill", *SHORT, *about, f"resume={folder}", "trainer.max_steps=6")[0] == 0
    assert (folder / "wandb_run.txt").read_text() == name
    found = records(folder)
    assert {one.run_id for one in found["run"]} == {name}
    first = found["run"][0]
    assert (first.run_group, first.job_type, first.display_name) == ("distill", "dd-distill", "distill_seed0")
    assert (list(first.tags), first.notes) == (["one", "two"], "why")
    assert "batch_size" in {item.key for item in first.config.update}
    artifacts = [one for one in found["artifact"] if one.type == "distilled-data"]
    assert len(artifacts) == 2
    for one in artifacts:
        assert one.name == f"distilled-{name}"
        assert set(one.aliases) == {"best", "latest"}
        files = {content.path for content in one.manifest.contents}
        assert files == {"distilled.safetensors", "distilled.png", "card.json"}
    assert json.loads(artifacts[-1].metadata)["accuracy"] == DistilledData.load(folder).card["accuracy"]


def test_an_agent_of_a_wandb_sweep_names_the_run(run, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    code, _, folder = run("distill", *SHORT, "logger=wandb", "init=fixed")
    assert code == 0
    assert (folder / "wandb_run.txt").read_text() == "agent123"
    assert {one.run_id for one in records(folder)["run"]} == {"agent123"}


def test_jobs_of_a_multirun_share_a_group(run, tmp_path):
    line = ("seed=1,2", "logger=wandb", "init=fixed", "debug=step", "hydra.sweep.dir=runs/together")
    assert run("distill", "-m", *TOY, *line)[0] == 0
    first, second = (records(tmp_path / "runs" / "together" / job)["run"][0] for job in "01")
    assert first.run_group == second.run_group == "together"
    assert first.run_id != second.run_id
    assert (first.display_name, second.display_name) == ("distill_seed1_job0", "distill_seed2_job1")


def test_the_command_line_of_a_wandb_agent_composes():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    values = {key: {"value": one.get("values", [one.get("min")])[0]} for key, one in sweep["parameters"].items()}
    arguments = create_sweep_command_args({"args": values})["args_no_hyphens"]
    line = create_sweep_command(sweep["command"])
    assert line.pop() == "${args_no_hyphens}"
    assert line.pop(0) == sweep["program"] == "dd-distill"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("distill", overrides=line + arguments)
    assert (cfg.name, cfg.optimizer.lr, cfg.distilled.std) == ("fig2a_mnist_fixed", 0.003, 0.1)
    assert "wandb" in cfg.logger
    assert "accuracy_mean" in sweep["metric"]["name"]  # of validation, which the callback logs


def test_several_loggers_at_once(run):
    code, error, folder = run("distill", *TOY, "logger=many", "debug=step", "init=fixed")
    assert code == 0, error
    assert (folder / "csv" / "version_0" / "metrics.csv").is_file()
    assert list(folder.glob("tensorboard/events.*"))
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_goes_on_in_the_same_run_with_another_logger_beside_it(run, tmp_path):
    client = pytest.importorskip("mlflow").MlflowClient("sqlite:///runs/mlflow.db")
    code, error, _ = run("distill", *SHORT, "logger=[tensorboard,mlflow]", "init=fixed")
    assert code == 0, error
    (folder,) = (tmp_path / "runs" / "distill").iterdir()
    name = (folder / "mlflow_run.txt").read_text()
    assert run("distill", *SHORT, "logger=[tensorboard,mlflow]", f"resume={folder}", "trainer.max_steps=6")[0] == 0
    (experiment,) = (one for one in client.search_experiments() if one.name == "distill")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == name
    assert found.data.params["batch_size"] == "16"
    assert found.data.metrics["test/accuracy_mean"] == DistilledData.load(folder).card["accuracy"]["accuracy_mean"]
    kept = tmp_path / "runs" / "mlflow" / name / "artifacts"
    assert {"distilled.safetensors", "distilled.png", "card.json", "pictures"} == {path.name for path in kept.iterdir()}
    assert list(folder.glob("tensorboard/events.*"))
