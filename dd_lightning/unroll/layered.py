"""The gradient of one GD step by rules for a network's layers, without autograd."""

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from dd_lightning.networks import Tracer, Weights, channels_last, frozen, stack, unstack
from dd_lightning.unroll import plain, stacked
from dd_lightning.unroll.gradients import Images, Labels, StepGradient, of_all
from dd_lightning.unroll.layers import Layer, UnsupportedLayerError
from dd_lightning.unroll.rules import rule


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
                layer = rule(node, modules, rules)
                if layer is None:
                    activation[node] = activation[node.all_input_nodes[0]]
                    continue
                # By argument: `all_input_nodes` names what is taken twice, as in y + y, once.
                self._layers.append((layer, [activation[n] for n in node.args if isinstance(n, fx.Node)]))
                activation[node] = len(self._layers)

    def _gradient(self, theta: Weights, x: Tensor, labels: Tensor, again: bool) -> tuple[Weights, Any]:
        """∇ℓ for x as the first layer takes it.

        Args:
            labels: classes [batch], or real numbers [batch, classes].
        """
        logits, saved = self._forward(theta, x)
        probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        wrong, total, images = _errors(probabilities, labels)
        gradient, adjoints = self._backward(theta, saved, (wrong / images).to(logits.dtype), again=again)
        fixed = frozen(self.network)
        tape = (theta, fixed, saved, adjoints, probabilities, total, images) if again else None
        return of_all(theta, gradient, fixed), tape

    def _forward(self, theta: Weights, x: Tensor) -> tuple[Tensor, list[Any]]:
        """Logits, and what each layer keeps."""
        activations, saved = [x], []
        for layer, inputs in self._layers:
            y, kept = layer.forward([theta[n] for n in layer.names], [activations[i] for i in inputs])
            activations.append(y)
            saved.append(kept)
        return activations[self._output], saved

    def _backward(
        self, theta: Weights, saved: list[Any], adjoint: Tensor, wanted: bool = False, again: bool = True
    ) -> tuple[Weights, list[Tensor | None]]:
        """The adjoints of weights and activations, the images among them if wanted, from that of the logits.

        Unless it is wanted `again`, what a layer keeps is let go on the way.
        """
        adjoints: list[Tensor | None] = [None] * (len(self._layers) + 1)
        adjoints[self._output] = adjoint
        gradient: Weights = {}
        for index in reversed(range(len(self._layers))):
            layer, inputs = self._layers[index]
            dy = adjoints[index + 1]
            assert dy is not None
            found, w_adjoints = layer.backward(
                [theta[n] for n in layer.names], saved[index], dy, wanted or inputs != [0]
            )
            _accumulate(adjoints, inputs, found)
            _collect(gradient, layer.names, w_adjoints)
            if not again:
                saved[index] = adjoints[index + 1] = None
        return gradient, adjoints

    def _derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Tensor, Tensor | None]:
        """∇²ℓ v, ∂⟨∇ℓ, v⟩/∂x and, of labels that are real numbers, ∂⟨∇ℓ, v⟩/∂y."""
        theta, fixed, saved, adjoints, probabilities, total, images = tape
        direction = of_all(theta, direction, fixed)
        tangents: list[Tensor | None] = [None] * len(adjoints)
        tsaved = []
        for index, (layer, inputs) in enumerate(self._layers):
            w, v = [theta[n] for n in layer.names], [direction[n] for n in layer.names]
            tangents[index + 1], kept = layer.tangent(w, saved[index], v, [tangents[i] for i in inputs])
            tsaved.append(kept)
        moved = probabilities * tangents[self._output]
        mean = moved.sum(-1, keepdim=True)
        moved = moved - probabilities * mean
        grad_labels = None if total is None else (mean - tangents[self._output]) / images
        eadjoints: list[Tensor | None] = [None] * len(adjoints)
        eadjoints[self._output] = (moved if total is None else moved * total) / images
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
        return of_all(theta, hessian, fixed), grad_x, grad_labels


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
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images, Tensor | None]:
        hessian, grad_x, grad_labels = self._derivative(tape, direction)
        # Of vectors, what follows the images, each network's own.
        return hessian, grad_x.sum(0)[:, 0].permute(3, 0, 1, 2), None if grad_labels is None else grad_labels.sum(0)


class PlainGradient(LayeredGradient):
    """One network after the other, by torch's own kernels; on a CPU in channels last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, plain)

    def prepared(self, theta: Weights) -> Weights:
        return {name: channels_last(weight) for name, weight in theta.items()}

    @torch.no_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        found = [self._gradient(single, channels_last(images), labels, again) for single in unstack(theta)]
        gradients, tapes = zip(*found, strict=True)
        return stack(list(gradients)), tapes

    @torch.no_grad()
    def of_loss(
        self, single: dict[str, Tensor], images: Images, loss: Callable[[Tensor], Tensor], wanted: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Any loss of one network's logits, and its gradient with respect to the weights and, if wanted, the images."""
        logits, saved = self._forward(single, images)
        with torch.enable_grad():
            value = loss(logits.requires_grad_())
        (adjoint,) = torch.autograd.grad(value, logits)
        gradient, adjoints = self._backward(single, saved, adjoint, wanted, again=False)
        return value.detach(), of_all(single, gradient), adjoints[0]

    @torch.no_grad()
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images, Tensor | None]:
        found = [self._derivative(one, v) for one, v in zip(tape, unstack(direction), strict=True)]
        hessians, grads_x, grads_y = zip(*found, strict=True)
        grad_labels = None if grads_y[0] is None else torch.stack(grads_y).sum(0)
        return stack(list(hessians)), torch.stack(grads_x).sum(0), grad_labels


def _errors(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """p Σy − y, which is ∂ℓ/∂logits times the number of images; Σy of labels that are real numbers; that number."""
    if labels.is_floating_point():
        total = labels.sum(-1, keepdim=True)
        return probabilities * total - labels, total, len(labels)
    classes = torch.arange(probabilities.shape[-1], device=labels.device)
    truth = labels[:, None] == classes
    return probabilities - truth.to(probabilities.dtype), None, len(labels)


def _accumulate(adjoints: list[Tensor | None], inputs: list[int], found: list[Tensor | None]) -> None:
    for index, adjoint in zip(inputs, found, strict=True):
        before = adjoints[index]
        adjoints[index] = adjoint if before is None else before if adjoint is None else before + adjoint


def _collect(gradient: Weights, names: tuple[str, ...], found: list[Tensor]) -> None:
    for name, value in zip(names, found, strict=True):
        gradient[name] = gradient[name] + value if name in gradient else value
