"""The gradient of one GD step, and its derivative in a direction of weights: all that Eq. (9) and its reverse need."""

import itertools
import logging
import operator
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap

from dd_lightning.networks import Weights, channels_last, forward_each, stack, training_without_dropout, unstack
from dd_lightning.stem import LANES, Tracer
from dd_lightning.unroll import layers, plain, stacked
from dd_lightning.unroll.layers import Layer, UnsupportedLayerError

log = logging.getLogger(__name__)

Images = Float[Tensor, "batch c h w"]
Labels = Int[Tensor, " batch"]


class StepGradient(ABC):
    """∇ℓ(x̃, θ) of J networks, ℓ each network's mean cross entropy, and its derivative."""

    def prepared(self, theta: Weights) -> Weights:
        """The weights in the memory format that is fastest here."""
        return theta

    @abstractmethod
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        """∇ℓ, and if it is wanted `again` what `derivative` needs."""

    @abstractmethod
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        """∇²ℓ v and ∂⟨∇ℓ, v⟩/∂x̃ in the direction v."""


class AutogradGradient(StepGradient):
    """By autograd, for every network.

    Args:
        batched: all J networks at once with `vmap`, instead of one after the other.
    """

    def __init__(self, network: nn.Module, batched: bool) -> None:
        self.network, self.batched = network, batched

    def logits(self, theta: Weights, images: Images) -> Float[Tensor, "init batch classes"]:
        if self.batched:
            return vmap(lambda single: functional_call(self.network, single, (images,)))(theta)
        return forward_each(self.network, theta, images)

    @torch.enable_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        images = images.detach().requires_grad_(again)
        with training_without_dropout(self.network):
            logits = self.logits(theta, images)
        # The sum over networks of each network's mean: no network sees another's gradient.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)
        gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=again, materialize_grads=True)
        found = dict(zip(theta, gradient, strict=True))
        return {name: value.detach() for name, value in found.items()}, (found, theta, images) if again else None

    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        found, theta, images = tape
        inputs = [*theta.values(), images]
        used = [name for name, value in found.items() if value.requires_grad]  # by the forward
        *hessian, grad_images = torch.autograd.grad(
            [found[name] for name in used], inputs, [direction[name] for name in used], materialize_grads=True
        )
        return dict(zip(theta, hessian, strict=True)), grad_images


class LayeredGradient(StepGradient):
    """By the rules of one module for its layers: `stacked`, for J networks at once, or `plain`, for one at a time.

    Raises:
        UnsupportedLayerError: the network cannot be traced, or has a layer without a rule.
    """

    def __init__(self, network: nn.Module, rules: ModuleType) -> None:
        self.network = network
        try:
            graph = Tracer().trace(network)
        except Exception as error:
            raise UnsupportedLayerError(f"a forward that cannot be traced ({type(error).__name__})") from error
        modules = dict(network.named_modules())
        self._layers: list[tuple[Layer, list[int]]] = []  # in order, each with the activations that it takes
        activation: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                if activation:
                    raise UnsupportedLayerError("a forward with more than one input")
                activation[node] = 0
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise UnsupportedLayerError("a forward with more than one output")
                self._output = activation[node.args[0]]
            else:
                layer = _rule(node, modules, rules)
                if layer is None:
                    activation[node] = activation[node.all_input_nodes[0]]
                    continue
                self._layers.append((layer, [activation[n] for n in node.all_input_nodes]))
                activation[node] = len(self._layers)

    def _gradient(self, theta: Weights, x: Tensor, labels: Tensor, again: bool) -> tuple[Weights, Any]:
        """∇ℓ for x as the first layer takes it; labels broadcast against logits, whose axis 1 is the classes."""
        activations, saved = [x], []
        for layer, inputs in self._layers:
            y, kept = layer.forward([theta[n] for n in layer.names], [activations[i] for i in inputs])
            activations.append(y)
            saved.append(kept)
        logits = activations[self._output]
        probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
        classes = torch.arange(probabilities.shape[1], device=labels.device)
        truth = labels == classes.view(-1, *(1,) * (probabilities.ndim - 2))
        adjoints: list[Tensor | None] = [None] * len(activations)
        adjoints[self._output] = ((probabilities - truth.to(probabilities.dtype)) / labels.numel()).to(logits.dtype)
        gradient: Weights = {}
        for index in reversed(range(len(self._layers))):
            layer, inputs = self._layers[index]
            dy = adjoints[index + 1]
            assert dy is not None
            found, w_adjoints = layer.backward([theta[n] for n in layer.names], saved[index], dy, inputs != [0])
            _accumulate(adjoints, inputs, found)
            _collect(gradient, layer.names, w_adjoints)
        tape = (theta, saved, adjoints, probabilities, labels) if again else None
        return _of_all(theta, gradient), tape

    def _derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Tensor]:
        """∇²ℓ v and ∂⟨∇ℓ, v⟩/∂x."""
        theta, saved, adjoints, probabilities, labels = tape
        tangents: list[Tensor | None] = [None] * len(adjoints)
        tsaved = []
        for index, (layer, inputs) in enumerate(self._layers):
            w, v = [theta[n] for n in layer.names], [direction[n] for n in layer.names]
            tangents[index + 1], kept = layer.tangent(w, saved[index], v, [tangents[i] for i in inputs])
            tsaved.append(kept)
        moved = probabilities * tangents[self._output]
        moved = moved - probabilities * moved.sum(1, keepdim=True)
        eadjoints: list[Tensor | None] = [None] * len(adjoints)
        eadjoints[self._output] = moved / labels.numel()
        hessian: Weights = {}
        for index in reversed(range(len(self._layers))):
            layer, inputs = self._layers[index]
            w, v = [theta[n] for n in layer.names], [direction[n] for n in layer.names]
            found, w_adjoints = layer.backward_tangent(
                w, saved[index], v, tsaved[index], adjoints[index + 1], eadjoints[index + 1]
            )
            _accumulate(eadjoints, inputs, found)
            _collect(hessian, layer.names, w_adjoints)
        grad_x = eadjoints[0]
        assert grad_x is not None
        return _of_all(theta, hessian), grad_x


class StackedGradient(LayeredGradient):
    """All J networks at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, stacked)
        # What pooling alone reads gets its bias there; with adjoining windows it is laid out by their pixels, the
        # phases: of the images alone, because the patches of later layers are not shared, and slow in this order.
        readers = [index for _, inputs in self._layers for index in inputs] + [self._output]
        for index, ((before, images), (layer, inputs)) in enumerate(itertools.pairwise(self._layers), 1):
            alone = inputs == [index] and readers.count(index) == 1
            if alone and isinstance(before, stacked.Conv2d) and isinstance(layer, stacked.MaxPool2d):
                before.names, layer.names = before.names[:1], before.names[1:]
                if images == [0] and layer.tiles:
                    before.pooling, layer.phased = layer.kernel, True

    @torch.no_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        x = images.permute(1, 2, 3, 0).contiguous()[None, :, None]
        return self._gradient(theta, x, labels, again)

    @torch.no_grad()
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        hessian, grad_x = self._derivative(tape, direction)
        return hessian, grad_x[0, :, 0].permute(3, 0, 1, 2)


class PlainGradient(LayeredGradient):
    """One network after the other, by torch's own kernels; on a CPU in channels last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, plain)

    def prepared(self, theta: Weights) -> Weights:
        return {name: channels_last(weight) for name, weight in theta.items()}

    @torch.no_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        found = [self._gradient(single, channels_last(images), labels[:, None], again) for single in unstack(theta)]
        gradients, tapes = zip(*found, strict=True)
        return stack(list(gradients)), tapes

    @torch.no_grad()
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        found = [self._derivative(one, v) for one, v in zip(tape, unstack(direction), strict=True)]
        hessians, grads_x = zip(*found, strict=True)
        return stack(list(hessians)), torch.stack(grads_x).sum(0)


def _accumulate(adjoints: list[Tensor | None], inputs: list[int], found: list[Tensor | None]) -> None:
    for index, adjoint in zip(inputs, found, strict=True):
        before = adjoints[index]
        adjoints[index] = adjoint if before is None else before if adjoint is None else before + adjoint


def _collect(gradient: Weights, names: tuple[str, ...], found: list[Tensor]) -> None:
    for name, value in zip(names, found, strict=True):
        gradient[name] = gradient[name] + value if name in gradient else value


def _of_all(theta: Weights, found: Weights) -> Weights:
    """In the order of the weights, with zeros for those that the forward does not use."""
    return {name: found[name] if name in found else torch.zeros_like(value) for name, value in theta.items()}


def _rule(node: fx.Node, modules: dict[str, nn.Module], rules: ModuleType) -> Layer | None:
    """The layer of a node of the traced forward; None for one that changes nothing."""
    if node.op == "call_module":
        return _module_rule(str(node.target), modules[str(node.target)], rules)
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        raise UnsupportedLayerError(f"{node.target} with an activation given by name")
    options = [a for a in node.args if not isinstance(a, fx.Node)]
    if node.op == "call_function":
        if node.target in (F.relu, torch.relu):
            return layers.ReLU()
        if node.target in (operator.add, torch.add) and (options or node.kwargs):
            raise UnsupportedLayerError("a sum with a number")
        if node.target in layers.ELEMENTWISE and not options:
            function = layers.ELEMENTWISE[node.target]
            return layers.Differentiated(partial(function, **node.kwargs) if node.kwargs else function)
        if node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, torch.flatten):
            return _function_rule(node.target, options, node.kwargs, rules)
        raise UnsupportedLayerError(getattr(node.target, "__name__", str(node.target)))
    if node.op == "call_method" and node.target == "flatten":
        return _function_rule(torch.flatten, options, node.kwargs, rules)
    if node.op == "call_method" and node.target == "relu":
        return layers.ReLU()
    raise UnsupportedLayerError(str(node.target))


def _function_rule(function: Any, options: list[Any], kwargs: dict[str, Any], rules: ModuleType) -> Layer:
    def module(kernel_size: Any, stride: Any = None, padding: Any = 0, *a: Any, **k: Any) -> nn.Module:
        kind = nn.AvgPool2d if function is F.avg_pool2d else nn.MaxPool2d
        order = ("ceil_mode", "count_include_pad", "divisor_override")
        order = order if kind is nn.AvgPool2d else ("dilation", "ceil_mode", "return_indices")
        return kind(kernel_size, stride, padding, **dict(zip(order, a, strict=False)), **k)

    if function is torch.flatten:
        return _module_rule("flatten", nn.Flatten(*(options or [0]), **kwargs), rules)  # type: ignore[return-value]
    return _module_rule(function.__name__, module(*options, **kwargs), rules)  # type: ignore[return-value]


def _module_rule(name: str, module: nn.Module, rules: ModuleType) -> Layer | None:
    match module:
        case nn.Conv2d():
            return rules.Conv2d(name, module)
        case nn.Linear():
            return rules.Linear(name, module.bias is not None)
        case nn.ReLU():
            return layers.ReLU()
        case nn.MaxPool2d():
            options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            return rules.MaxPool2d(*options, module.return_indices)
        case nn.AvgPool2d():
            return rules.avg_pool2d(module)
        case nn.LocalResponseNorm():
            return rules.local_response_norm(module)
        case nn.GroupNorm():
            return rules.group_norm(module, (f"{name}.weight", f"{name}.bias") if module.affine else ())
        case nn.Flatten() if (module.start_dim, module.end_dim) == (1, -1):
            return rules.flatten()
        case nn.modules.dropout._DropoutNd() | nn.Identity():
            return None  # dropout is off everywhere (Section S-1)
        case _ if type(module) in layers.ELEMENTWISE_MODULES:
            return layers.Differentiated(module)
    raise UnsupportedLayerError(f"{name} ({type(module).__name__})")


def batched_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for J networks at once: by layers, where the network has rules for them, else with `vmap`.

    Raises:
        ValueError: the network cannot be batched; naming the engine that can.
    """
    name = type(network).__name__
    try:
        return _tried(StackedGradient(network), theta, images)
    except UnsupportedLayerError as reason:
        log.info(f"{name} is batched with vmap, as there is no faster rule for {reason}")
    batched = AutogradGradient(network, batched=True)
    try:
        with torch.no_grad(), training_without_dropout(network):
            batched.logits(theta, images)
    except (RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"network {name} cannot be batched over initial weights ({message}); "
            "use unroll=functional, unroll=adjoint, or unroll=recompute unroll.batched=false"
        ) from error
    return batched


def single_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for one network after the other: by layers, where there are rules for them, else by autograd."""
    try:
        return _tried(PlainGradient(network), theta, images)
    except UnsupportedLayerError as reason:
        log.debug(f"{type(network).__name__} is differentiated by autograd, as there is no faster rule for {reason}")
        return AutogradGradient(network, batched=False)


def first_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest where each network has its own images and nothing but ∇ℓ is wanted.

    Convolutions that are narrow leave torch's own kernels for a CPU half empty; products over patches do not.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if images.device.type == "cpu" and all(module.out_channels <= LANES // 2 for module in convolutions):
        with suppress(UnsupportedLayerError):
            return _tried(StackedGradient(network), theta, images)
    return single_gradient(network, theta, images)


def _tried(gradient: LayeredGradient, theta: Weights, images: Images) -> StepGradient:
    """The same, if one network's gradient is that of autograd: a forward may do what its layers do not show.

    Raises:
        UnsupportedLayerError: it is not.
    """
    single = {name: weight[:1] for name, weight in theta.items()}
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    expected, _ = AutogradGradient(gradient.network, batched=False)(single, images, labels, again=False)
    try:
        found, _ = gradient(single, images, labels, again=False)
        error = sum((found[name] - value).square().sum() for name, value in expected.items())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError) as reason:
        raise UnsupportedLayerError(f"layers that are put together unusually ({type(reason).__name__})") from reason
    if not error <= 1e-6 * sum(value.square().sum() for value in expected.values()):
        raise UnsupportedLayerError("a forward that does more than its layers")
    return gradient
