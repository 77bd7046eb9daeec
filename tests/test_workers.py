"""One pool of worker processes: results in order, progress from inside a piece, nothing lost or left behind."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from dd_lightning.system.workers import Workers


def square(tensor, on_progress=None):
    if on_progress:
        on_progress(0.25)
        on_progress(0.75)
    return {
        "square": (tensor**2).numpy(),
        "threads": np.array(torch.get_num_threads()),
        "process": np.array(os.getpid()),
    }


def killed(tensor):
    os.kill(os.getpid(), signal.SIGKILL)


def first_fails(tensor):
    if not tensor:
        raise FloatingPointError("the loss is nan")
    time.sleep(600)


PIECES = {f"piece{i}": (torch.tensor([float(i)]),) for i in range(5)}


@pytest.mark.parametrize("processes", [1, 2])
def test_results_are_those_of_the_pieces(processes):
    advanced = []
    with Workers(processes) as workers:
        results = workers.map("squares", square, PIECES)
        again = workers.map("squares", square, PIECES)  # by the same processes
        told = dict(workers.run(square, PIECES, advanced.append))
    assert list(results) == list(PIECES)
    assert [r["square"].item() for r in results.values()] == [0, 1, 4, 9, 16]
    assert sum(advanced) == len(told) == 5
    used = {int(r["process"]) for r in [*results.values(), *again.values()]}
    assert used == {os.getpid()} if processes == 1 else len(used) <= 2 and os.getpid() not in used
    assert processes == 1 or all(r["threads"] == 1 for r in results.values())


def test_a_killed_process_is_told():
    with pytest.raises(MemoryError, match="a worker process was killed"), Workers(2) as workers:
        workers.map("kills", killed, PIECES)


def test_an_error_ends_the_others():
    before = set(multiprocessing.active_children())  # of an earlier test, perhaps
    with pytest.raises(FloatingPointError, match="the loss is nan"), Workers(2) as workers:
        workers.map("fails", first_fails, PIECES)
    assert set(multiprocessing.active_children()) <= before


def test_a_kept_result_that_is_not_whole_is_done_again(tmp_path):
    expected = Workers(1, tmp_path).map("squares", square, PIECES)
    for number, content in enumerate((b"", b"PK", (tmp_path / "squares" / "piece2.npz").read_bytes()[:-30])):
        (tmp_path / "squares" / f"piece{number}.npz").write_bytes(content)
    again = Workers(1, tmp_path).map("squares", square, PIECES)
    assert [r["square"] for r in again.values()] == [r["square"] for r in expected.values()]
    with np.load(tmp_path / "squares" / "piece0.npz") as file:
        assert file["square"] == 0
