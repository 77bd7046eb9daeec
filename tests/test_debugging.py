"""Debug presets, and progress without a terminal."""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_commands import SHORT, TOY

from dd_lightning.commands import dry_run
from dd_lightning.system.progress import Lines, Messages, duration, progress_of
from dd_lightning.training import Profile, ProgressBar, progress
from dd_lightning.training.progress import PlainProgress


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


def test_one_step_and_the_end_in_full(run):
    code, error, folder = run("distill", *TOY, "debug=step")
    assert (code, error) == (0, "")
    assert json.loads((folder / "result.json").read_text())["outer_steps"] == 1
    assert {"distilled.safetensors", "distilled.png", "csv"} < {path.name for path in folder.iterdir()}


def test_one_minibatch_is_learned(run):
    line = ("distilled.learning_rate=0.1", "optimizer.lr=0.1", "trainer.max_steps=25", "callbacks.held_out.every=25")
    code, error, folder = run("distill", *TOY, "debug=overfit", "unroll=functional", *line)
    assert (code, error) == (0, "")
    log = (folder / "dd-distill.log").read_text()
    told = log.split("outer loss of one minibatch over 25 outer steps: ")[1].split("\n")[0]
    first, last = map(float, told.split(" → "))
    assert last < 0.5 * first


def test_the_profile_is_of_all_of_an_outer_step(run, monkeypatch):
    kept, write = [], Profile._write
    monkeypatch.setattr(Profile, "_write", lambda self: kept.append(self) or write(self))
    code, _, folder = run("distill", *TOY, "debug=profile", "unroll=functional", "init=random", "init.per_step=2")
    assert code == 0
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    assert set(kept[0].parts) - {event.get("name") for event in trace["traceEvents"]} == {
        "gradient through the inner loop",
        "minibatch, outer optimizer, Lightning, callbacks",
    }
    assert all(seconds > 0 for seconds in kept[0].parts.values())
    assert "aten::" in (folder / "profile" / "operations.txt").read_text()
    code, error, _ = run("distill", *TOY, "debug=profile", "trainer.max_steps=17", "traceback=false")
    assert code == 1
    assert "the profile ends with outer step 18" in error


def test_lines_come_now_and_then_and_say_how_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = Lines("distilling", 1000, done=200, unit="outer steps", seconds=30)
    now[0] += 29
    assert lines.tell(300) is None
    now[0] += 1
    assert lines.tell(300, "loss 0.3") == "distilling: 300 of 1000 outer steps, 3.5 minutes left, loss 0.3"
    now[0] += 29
    assert lines.tell(400) is None
    said = ["1 second", "119 seconds", "2.0 minutes", "30 minutes", "2.0 hours", "10 hours"]
    assert [duration(seconds) for seconds in (1, 119, 120, 1800, 7200, 36000)] == said


def test_a_path_in_a_message_can_be_copied(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = f"saved in /[bold]{'folder/' * 20}"
    Messages().handle(logging.makeLogRecord({"msg": text}))
    assert capsys.readouterr().out == f"{text}\n"


def test_no_control_characters_without_a_terminal(capfd, monkeypatch):
    now = iter(range(0, 1000, 40))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with progress_of("test", 3) as advance:
        for _ in range(3):
            advance(1)
    monkeypatch.undo()
    said = capfd.readouterr().out.splitlines()
    assert said == [
        f"test: {done} of 3 networks, {left} left"
        for done, left in ((1, "80 seconds"), (2, "40 seconds"), (3, "0 seconds"))
    ]
    assert all(line.isprintable() for line in said)


def test_the_bar_is_for_terminals(monkeypatch):
    assert isinstance(progress(), PlainProgress)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert isinstance(progress(), ProgressBar)
    with pytest.raises(ValueError, match="seconds must be a number above 0"):
        progress(seconds=0)


def test_a_run_tells_its_progress_in_plain_lines(run, monkeypatch):
    said = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(words[0]))
    code, _, _ = run("distill", *SHORT, "callbacks.progress.seconds=0.0001", "init=fixed")
    assert code == 0
    assert len(said) >= 4
    assert said[0].startswith("distilling: 1 of 4 outer steps, ")
    assert "held-out accuracy" in said[3]
    assert said[3].startswith("distilling: 4 of 4 outer steps, 0 seconds left, loss ")


def test_a_dry_run_tells_what_a_run_would_take_and_leaves_nothing(run, tmp_path, monkeypatch):
    told, cost = [], dry_run.cost
    monkeypatch.setattr(dry_run, "cost", lambda *about: told.append(about) or cost(*about))
    monkeypatch.setattr(dry_run, "get_console", lambda: SimpleNamespace(print=said.append))
    said = []
    code, error, folder = run("distill", *SHORT, "init=random", "dry_run=true", "trainer.max_steps=100")
    assert (code, error, folder) == (0, "", None)
    assert not list(Path(tempfile.gettempdir()).glob(f"dd_dry_run_{os.getpid()}*"))
    ((foretold, stored_numbers),) = told
    assert stored_numbers == 3 * 144 + 3
    assert (foretold.steps, foretold.evaluations) == (100, 50)
    assert foretold.seconds > 100 * foretold.step > 0
    assert foretold.test > foretold.evaluation > 0  # of 200 networks, and of 20
    assert foretold.memory > 2**20
    table = said[0]
    rows = dict(zip(*(list(column.cells) for column in table.columns[::2]), strict=True))
    assert "path=toy.npz" in rows["dataset"]
    assert "max_steps=100" in rows["trainer"]


def test_a_dry_run_that_is_refused_leaves_nothing_either(run):
    code, error, folder = run("distill", *TOY, "dry_run=true", "distilled.steps=0")
    assert (code, folder) == (1, None)
    assert "distilled: steps must" in error
    assert not list(Path(tempfile.gettempdir()).glob(f"dd_dry_run_{os.getpid()}*"))
    assert "dry_run must be true or false, not 1" in run("distill", *TOY, "dry_run=1")[1]


def test_a_dry_run_is_of_one_run(run):
    code, error, _ = run("distill", "-m", *TOY, "dry_run=true", "seed=1,2", "init=fixed")
    assert code == 1
    assert "dry_run=true is for one run; leave it out of a sweep" in error
