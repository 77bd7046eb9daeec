"""Which rule is that of a node of a traced forward."""

import operator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dd_lightning.unroll import layers, plain
from dd_lightning.unroll.layers import Layer, UnsupportedLayerError


def rule(node: fx.Node, modules: dict[str, nn.Module], rules: ModuleType) -> Layer | None:
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
            # What a layer takes is kept for its other passes, and never changed in place.
            kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
            return layers.Differentiated(partial(function, **kwargs) if kwargs else function)
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
            return layers.Linear(name, module.bias is not None)
        case nn.ReLU():
            return layers.ReLU()
        case nn.MaxPool2d():
            options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            return rules.MaxPool2d(*options, module.return_indices)
        case nn.AvgPool2d():
            return rules.avg_pool2d(module)
        case nn.AdaptiveAvgPool2d() if rules is plain:
            return layers.Differentiated(module)
        case nn.LocalResponseNorm():
            return rules.local_response_norm(module)
        case nn.GroupNorm():
            return rules.group_norm(module, (f"{name}.weight", f"{name}.bias") if module.affine else ())
        case nn.Flatten() if (module.start_dim, module.end_dim) == (1, -1):
            return rules.flatten()
        case nn.modules.dropout._DropoutNd() | nn.Identity():
            return None  # dropout is off everywhere (Section S-1)
        case _ if type(module) in layers.ELEMENTWISE_MODULES:
            inplace = getattr(module, "inplace", False)
            return layers.Differentiated((lambda x: module(x.clone())) if inplace else module)
    raise UnsupportedLayerError(f"{name} ({type(module).__name__})")
