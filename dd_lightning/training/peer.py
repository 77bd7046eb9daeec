"""The authors' code beside ours in `dd-bench`: its own functions, in a process of its own.

`Peer` is our side. Run as a program, by its path, this file is the other: it imports nothing of this package, and
answers every line that it reads with the seconds of an outer step.
"""

import json
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, Self

import torch

ARCHITECTURES = {"lenet": ("LeNet", 1, 28), "alexcifarnet": ("AlexCifarNet", 3, 32)}  # with channels and image size


def check_checkout(folder: Path) -> None:
    """Refuses a folder that does not hold the authors' code.

    Raises:
        ValueError: naming it.
    """
    if not (folder / "train_distilled_image.py").is_file():
        raise ValueError(f"peer={folder} is no checkout of SsnL/dataset-distillation")


class Peer:
    """Outer steps of a checkout of github.com/SsnL/dataset-distillation, one when it is asked for.

    Args:
        folder: of the checkout.
        setting: network, J, T and the number of real images, as of `BareStep`.
    """

    def __init__(self, folder: Path, setting: tuple[str, int, int, int], device: torch.device) -> None:
        arguments = [str(folder.resolve()), *map(str, setting), str(device), str(torch.get_num_threads())]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__, *arguments], **pipes)

    def run(self) -> dict[str, float]:
        """Seconds of an outer step.

        Raises:
            ValueError: it does not run.
        """
        streams: Any = self._process
        with suppress(BrokenPipeError):
            streams.stdin.write("\n")
            streams.stdin.flush()
        answer = json.loads(streams.stdout.readline() or '{"failure": "its process was killed"}')
        if "failure" in answer:
            raise ValueError(f"peer: an outer step does not run: {answer['failure']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class _AuthorsStep:
    """An outer step with their `Trainer`, as its `train` takes one, on random pictures."""

    def __init__(self, network: str, per_step: int, steps: int, batch_size: int, device: torch.device) -> None:
        architecture, channels, size = ARCHITECTURES[network]
        self.state: Any = SimpleNamespace(
            **{"device": device, "distributed": False, "mode": "distill_basic", "dropout": False, "num_classes": 10},
            **{"arch": architecture, "nc": channels, "input_size": size, "init": "xavier", "init_param": 1.0},
            **{"distill_steps": steps, "distill_epochs": 1, "distilled_images_per_class_per_step": 1},
            **{"distill_lr": 0.02, "lr": 1e-6, "decay_epochs": 40, "decay_factor": 0.5, "local_n_nets": 1},
        )
        (model,) = import_module("networks").get_networks(self.state, N=1)
        self.trainer = import_module("train_distilled_image").Trainer(self.state, [model] * per_step)
        shape = (batch_size, channels, size, size)
        self.real = torch.randn(shape, device=device), torch.randint(10, (batch_size,), device=device)

    def run(self) -> dict[str, float]:
        trainer, began = self.trainer, self._now()
        trainer.optimizer.zero_grad(set_to_none=False)  # as in torch 1: `accumulate_grad` adds to what is there
        steps, found = trainer.get_steps(), []
        for model in trainer.models:
            model.reset(self.state)
            _, saved = trainer.forward(model, *self.real, steps)
            found.append(trainer.backward(model, *self.real, steps, saved))
        trainer.accumulate_grad(found)
        for parameter in trainer.params:
            parameter.grad.div_(len(trainer.models))
        trainer.optimizer.step()
        return {"step": self._now() - began}

    def _now(self) -> float:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
        return time.perf_counter()


def _without_six() -> None:
    """Stands in for what the networks need of `six`, and for the data sets, which need more of it."""
    six: Any = ModuleType("six")
    slots = ("__dict__", "__weakref__")  # which a new class makes anew
    six.add_metaclass = lambda meta: (
        lambda c: meta(c.__name__, c.__bases__, {k: v for k, v in vars(c).items() if k not in slots})
    )
    sys.modules |= {"six": six, "datasets": ModuleType("datasets")}


def _answer(folder: str, network: str, per_step: str, steps: str, batch: str, device: str, threads: str) -> None:
    sys.path[0] = folder  # in place of this file's own
    torch.set_num_threads(int(threads))
    if find_spec("six") is None:
        _without_six()
    try:
        step = _AuthorsStep(network, int(per_step), int(steps), int(batch), torch.device(device))
        for _ in sys.stdin:
            print(json.dumps(step.run()), flush=True)
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
