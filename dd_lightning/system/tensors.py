"""One file of tensors and a card that describes them: safetensors, read without executing code."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from dd_lightning.system.atomic import write_bytes


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Writes them whole or not at all."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(contiguous, metadata={"card": json.dumps(card)}))


def read_tensors(
    path: Path, kind: str, what: str, check: Callable[[dict[str, Any]], None] = lambda card: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors of a file.

    Args:
        kind: the `format` that its card must name.
        what: it holds, for people.
        check: refuses a card, with a ValueError.

    Raises:
        ValueError: the file is truncated, not safetensors, of another kind, or its card is refused.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("card", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if not isinstance(card, dict) or card.get("format") != kind:
        raise ValueError(f"{path} is a safetensors file, but holds no {what}")
    try:
        check(card)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return card, tensors
