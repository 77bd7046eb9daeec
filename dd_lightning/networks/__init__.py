"""Architectures, and how to run many networks of one from their weights."""

from dd_lightning.networks.alexcifarnet import AlexCifarNet
from dd_lightning.networks.calls import run_with
from dd_lightning.networks.check import check_network
from dd_lightning.networks.code import origin_of
from dd_lightning.networks.convnet import ConvNet
from dd_lightning.networks.fitting import completed, differences, digest_of, load_weights
from dd_lightning.networks.formats import channels_last, memory_format
from dd_lightning.networks.layers import LocalResponseNorm, MaxPool2d
from dd_lightning.networks.lenet import LeNet
from dd_lightning.networks.mlp import MLP
from dd_lightning.networks.modes import evaluating, training_without_dropout
from dd_lightning.networks.predictions import Predictions, predictions
from dd_lightning.networks.resnet18 import ResNet18
from dd_lightning.networks.stem import LANES, Stem, Tracer, stem_of
from dd_lightning.networks.torchvision import TorchvisionNetwork
from dd_lightning.networks.vgg11 import VGG11
from dd_lightning.networks.vit_small import ViTSmall
from dd_lightning.networks.weights import (
    Weights,
    class_name,
    concatenated,
    count,
    forward_each,
    frozen,
    predict,
    split,
    stack,
    unstack,
)

__all__ = [
    "LANES",
    "MLP",
    "VGG11",
    "AlexCifarNet",
    "ConvNet",
    "LeNet",
    "LocalResponseNorm",
    "MaxPool2d",
    "Predictions",
    "ResNet18",
    "Stem",
    "TorchvisionNetwork",
    "Tracer",
    "ViTSmall",
    "Weights",
    "channels_last",
    "check_network",
    "class_name",
    "completed",
    "concatenated",
    "count",
    "differences",
    "digest_of",
    "evaluating",
    "forward_each",
    "frozen",
    "load_weights",
    "memory_format",
    "origin_of",
    "predict",
    "predictions",
    "run_with",
    "split",
    "stack",
    "stem_of",
    "training_without_dropout",
    "unstack",
]
