"""A network, run with weights that are not its own."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


def run_with(
    network: nn.Module, weights: dict[str, Tensor], images: Float[Tensor, "batch c h w"]
) -> Float[Tensor, "batch classes"]:
    """Logits of a network with these weights, in the mode it is in; those that are missing are its own.

    A weight that several modules share goes by the first of its names, and so does a module that has several.
    """
    first: dict[int, str] = {}
    shared = {}
    # Each module once: torch's own way to shared weights puts them into a module once for each of its names, and
    # leaves the network with the last of them.
    for prefix, module in network.named_modules():
        for own, parameter in module._parameters.items():
            name = f"{prefix}.{own}" if prefix else own
            known = first.setdefault(id(parameter), name)
            if parameter is not None and known != name and known in weights:
                shared[name] = weights[known]
    return functional_call(network, weights | shared, (images,), tie_weights=False)
