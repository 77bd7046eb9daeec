"""dd-doctor --gpu: all that the CUDA paths promise, in one table and a JSON file, within eight minutes.

Every part is a process of its own: one that crashes, or takes too long and is cut, ends with a line that says so, and
the others go on. What was found is in the file as soon as it is.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dd_lightning.system.atomic import write_json
from dd_lightning.system.installation import BROKEN

# Each part, and the seconds after which it is cut; the last takes two minutes, or what is left.
LIMITS = {"gradients": 60, "recorded": 70, "memory": 50, "processes": 70, "resume": 100, "fig3a": 60, "demo": 60}
LIMITS |= {"bench": 100, "any_order": 180}
SECONDS = 470.0  # of all
LEAST = 15.0  # seconds in which a part is begun


class Line(NamedTuple):
    """What a line of a part found; without a mark it has begun."""

    name: str
    mark: str = ""
    said: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] | None = None


def prove(device: str, folder: Path, names: Iterable[str] = LIMITS) -> list[str]:
    """Goes through the parts, prints a line for each of theirs, and keeps `gpu.json` in `folder`.

    Returns:
        The names of lines that are broken.
    """
    from dd_lightning.system.processor import hardware, versions

    began, rows = time.monotonic(), []
    patience = 1 if device.startswith("cuda") else 20  # a trial on a CPU may be on a busy one
    about = {"device": device, "hardware": hardware(), "versions": versions()}
    parts = (Part(name, device, folder) for name in names)
    ahead = next(parts, None)
    while ahead:
        part, ahead = ahead, next(parts, None)  # which imports what it needs while this one works
        left = patience * SECONDS - (time.monotonic() - began)
        try:
            for line in part.lines(min(patience * LIMITS[part.name], left)):
                print(f"{line.mark:6} {part.name:10} {line.name:34} {line.seconds:5.1f} s  {line.said}", flush=True)
                rows.append({"part": part.name} | line._asdict())
                write_json(folder / "gpu.json", about | {"seconds": time.monotonic() - began, "rows": rows})
        except BaseException:
            if ahead:
                ahead.end()
            raise
    return [f"{row['part']} of {row['name'] or 'all'}" for row in rows if row["mark"] == BROKEN]


class Part:
    """A part in its process, which waits until its lines are asked for."""

    def __init__(self, name: str, device: str, folder: Path) -> None:
        self.name, self._said = name, folder / f"{name}.txt"
        command = [sys.executable, "-m", "dd_lightning.commands.gpu", name, device, str(folder)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with self._said.open("w", encoding="utf-8") as error:
            self._process = subprocess.Popen(command, stderr=error, **pipes)

    def lines(self, seconds: float) -> Iterator[Line]:
        """Its lines; where it ends early, one that says so, and names the line it was at.

        Args:
            seconds: after which it is cut.
        """
        cut, begun = threading.Event(), Line("")
        timer = threading.Timer(seconds, lambda: (cut.set(), self.end()))
        timer.start()
        streams: Any = self._process
        try:
            if seconds < LEAST:
                yield Line("", BROKEN, "no time was left for it")
                return
            with contextlib.suppress(BrokenPipeError):
                print(seconds, file=streams.stdin, flush=True)
            for text in streams.stdout:
                line = Line(*json.loads(text))
                if line.mark:
                    yield line
                begun = line._replace(mark="")
            if cut.is_set():
                yield Line(begun.name, BROKEN, f"cut after {seconds:.0f} s")
            elif code := self._process.wait():
                last = self._said.read_text(encoding="utf-8").strip().rpartition("\n")[2]
                yield Line(begun.name, BROKEN, f"ended with {code}: {last}")
        finally:
            timer.cancel()
            self.end()

    def end(self) -> None:
        """Ends it, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main(part: str, device: str, folder: str) -> None:
    """A part, in its process: answers on what was its standard output, and prints all else among the errors."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import torch

    from dd_lightning.commands.gpu_parts import PARTS
    from dd_lightning.commands.gpu_runs import Place
    from dd_lightning.system.processor import tune_cpu

    tune_cpu()
    seconds = float(sys.stdin.readline() or sys.exit())  # without a line, there is nobody to answer
    for line in answered(PARTS[part](Place(torch.device(device), Path(folder), seconds))):
        print(json.dumps(line), file=answers, flush=True)


def answered(lines: dict[str, Callable[[], Any]]) -> Iterator[Line]:
    """Each line when it begins, and when it is done; one that fails is broken."""
    for name, prove_one in lines.items():
        yield Line(name)
        began = time.monotonic()
        try:
            mark, said, numbers = prove_one()
        except Exception as error:
            mark, said, numbers = BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", None
        yield Line(name, mark, said, time.monotonic() - began, numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
