"""Dataset distillation: learn a handful of images that train a network in a few gradient steps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dd_lightning.distilled import DistilledData
    from dd_lightning.networks import AlexCifarNet, LeNet

__all__ = ["AlexCifarNet", "DistilledData", "LeNet"]


def __getattr__(name: str) -> Any:
    # Only when asked for: commands set what torch reads once, before they load it.
    rooms = {"DistilledData": "distilled", "AlexCifarNet": "networks", "LeNet": "networks"}
    if name not in rooms:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dd_lightning.{rooms[name]}"), name)
