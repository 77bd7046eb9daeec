"""The first layers of many networks that see the same pictures, as one convolution."""

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from dd_lightning.system.processor import is_out_of_memory

LANES = 32  # output channels that keep a processor's vector units full
_CHANNELWISE_FUNCTIONS = (F.relu, torch.relu, F.max_pool2d, torch.max_pool2d, F.avg_pool2d)
_CHANNELWISE_MODULES = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)


class Tracer(fx.Tracer):
    """Takes torch's layers, and ours that replace them, as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.MaxPool2d | nn.LocalResponseNorm) or super().is_leaf_module(m, module_qualified_name)


class Stem(NamedTuple):
    """A network in two parts: a narrow first convolution with what follows channel by channel, and the rest.

    LeNet's six channels leave most of a vector unit empty; those of five networks side by side do not.

    Attributes:
        name: of the convolution.
        convolution: of one network.
        rest_of_stem: of the convolution's output, for any number of channels.
        tail: of the stem's output; its weights are named as in the network.
        format: of the pictures, and of what the tail takes.
    """

    name: str
    convolution: nn.Conv2d
    rest_of_stem: fx.GraphModule
    tail: fx.GraphModule
    format: torch.memory_format

    @property
    def names(self) -> list[str]:
        """Of the stem's weights."""
        return [f"{self.name}.{name}" for name, _ in self.convolution.named_parameters()]

    @property
    def networks(self) -> int:
        """That are best taken together."""
        return LANES // self.convolution.out_channels

    def __call__(
        self, weights: dict[str, Float[Tensor, "init ..."]], images: Float[Tensor, "batch c h w"]
    ) -> Float[Tensor, "batch init*channels h w"]:
        weight, *bias = (weights[name].flatten(0, 1) for name in self.names)
        return self.rest_of_stem(self.convolution._conv_forward(images, weight, bias[0] if bias else None))

    def inputs(self, features: Tensor) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """Of each network's tail."""
        for one in features.split(self.convolution.out_channels, dim=1):
            yield one.contiguous(memory_format=self.format)


_STEMS: WeakKeyDictionary[nn.Module, Stem | None] = WeakKeyDictionary()


def stem_of(network: nn.Module, images: Float[Tensor, "batch c h w"], format: torch.memory_format) -> Stem | None:
    """The stem of a network in eval mode, on a CPU; None where many networks would gain nothing from it."""
    if images.device.type != "cpu":
        return None
    if network not in _STEMS:
        _STEMS[network] = _split(network, images[:2], format)
    return _STEMS[network]


def _split(network: nn.Module, images: Tensor, format: torch.memory_format) -> Stem | None:
    try:
        graph = Tracer().trace(network)
        stem = _cut(network, graph, format)
        return stem if stem is not None and _same(stem, network, images) else None
    except Exception as error:  # a forward in ordinary Python, which may do anything with what it is traced by
        if is_out_of_memory(error):
            raise
        return None


def _cut(network: nn.Module, graph: fx.Graph, format: torch.memory_format) -> Stem | None:
    modules = dict(network.named_modules())
    image, convolution = list(graph.nodes)[:2]
    module = modules.get(str(convolution.target))
    # Of a subclass, or a parametrized one, the weights alone do not say what it computes.
    if type(module) is not nn.Conv2d or module.groups != 1 or module.out_channels > LANES // 2:
        return None
    if set(image.users) != {convolution}:
        return None
    last, stem_graph = convolution, fx.Graph()
    copies = {convolution: stem_graph.placeholder("y")}
    while len(last.users) == 1 and _channelwise(following := next(iter(last.users)), modules):
        copies[following] = stem_graph.node_copy(following, copies.__getitem__)
        last = following
    stem_graph.output(copies[last])
    tail_graph = fx.Graph()
    copies = {last: tail_graph.placeholder("features")}
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(last) + 1 :]:
        copies[node] = tail_graph.node_copy(node, copies.__getitem__)
    rest_of_stem, tail = (fx.GraphModule(network, part) for part in (stem_graph, tail_graph))
    stem = Stem(str(convolution.target), module, rest_of_stem, tail, format)
    used = [*stem.names, *dict(tail.named_parameters())]
    # None where both parts use a weight, or neither.
    return stem if sorted(used) == sorted(name for name, _ in network.named_parameters()) else None


def _same(stem: Stem, network: nn.Module, images: Tensor) -> bool:
    """Whether the two parts are the network, and the tail leaves what it takes as it is."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        features = stem({name: own[name][None] for name in stem.names}, images)
        changes = features._version
        logits = stem.tail(features)
        return features._version == changes and torch.allclose(logits, network(images), rtol=1e-4, atol=1e-5)


def _channelwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node acts on each channel by itself, without weights."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _CHANNELWISE_MODULES)
    return node.target in (_CHANNELWISE_FUNCTIONS if node.op == "call_function" else ("relu",))
