"""Names of settings: those that nothing reads are refused, with the nearest that something does."""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from dd_lightning.commands.resolvers import task_overrides
from dd_lightning.system.checks import nearest


def check_dashes(program: str, arguments: list[str]) -> None:
    """Ends the program where a setting is written as an option, or an option is unknown."""
    parser = get_args_parser()
    parser.error = lambda message: sys.exit(f"{program}: error: {message}")  # type: ignore[method-assign]
    for unknown in parser.parse_known_args(arguments)[1]:
        name, _, value = unknown.lstrip("-").partition("=")
        parser.error(f"{unknown} is no option; a setting is written without dashes: {name}={value or 'VALUE'}")


def check_known(cfg: DictConfig, conf: Path, config_name: str) -> None:
    """Refuses settings that neither the command nor another setting reads, nor the class they are for.

    Raises:
        ValueError: naming the setting and the nearest that is read.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    read = top_level(conf, config_name) | set(re.findall(r"\$\{(?:oc\.select:)?(\w+)", str(plain)))
    said = {o.lstrip("+").partition("=")[0].partition(".")[0] for o in task_overrides()}
    for key in (plain.keys() - read) & said:  # what rows of tables set is for their columns
        known = [name for name in names_of(plain) if name.partition(".")[0] in read]
        raise ValueError(f"{key} is no setting of dd-{config_name}{nearest(key, known)}")
    check_taken(plain)


def check_taken(node: dict[str, Any], prefix: str = "") -> None:
    """Refuses settings that their `_target_` does not take.

    Raises:
        ValueError: naming the setting.
    """
    for key, value in node.items():
        if isinstance(value, dict):
            check_taken(value, f"{prefix}{key}.")
    target, at = node.get("_target_"), prefix.removesuffix(".")
    try:
        made = get_object(target) if isinstance(target, str) and "${" not in target else None
        parameters = inspect.signature(made).parameters if made is not None else {}  # type: ignore[arg-type]
    except (ImportError, AttributeError, ValueError, TypeError, HydraException):
        return  # what is wrong with the target is said when it is used
    if made is None or any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return
    for key, value in node.items():
        if key in parameters and wants(parameters[key].annotation, bool) and "${" not in str(value):
            if not isinstance(value, bool | None):
                raise ValueError(f"{at}: {key} must be true or false, not {value!r}")
        elif key in parameters and wants(parameters[key].annotation, list, tuple, Sequence) and "${" not in str(value):
            if isinstance(value, str | int | float):
                raise ValueError(f"{at}: {key} must be a list, such as {at}.{key}=[{value}], not {value}")
        elif key not in parameters and not str(key).startswith("_"):
            meant = nearest(str(key), (name for name in parameters if name != "data"))
            name = getattr(made, "__name__", target)
            raise ValueError(f"{at}: {name} takes no setting {key!r}; leave it out with ~{at}.{key}{meant}")


def wants(annotation: Any, *kinds: type) -> bool:
    """Whether an argument is of one of these kinds, or nothing."""
    either = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = {get_origin(one) or one for one in either} - {NoneType}
    return bool(found) and found.issubset(kinds)


def top_level(conf: Path, config_name: str) -> set[str]:
    """The groups and keys at the top of a command's configuration."""
    content = yaml.safe_load((conf / f"{config_name}.yaml").read_text(encoding="utf-8"))
    keys = set(content)
    for default in content["defaults"]:
        if default in ("_self_",):
            continue
        keys |= top_level(conf, default) if isinstance(default, str) else {str(group) for group in default}
    return keys


def names_of(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all groups and values."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from names_of(value, f"{prefix}{key}.")


def meant(key: str, conf: Path, config_name: str, overrides: list[str]) -> str:
    """A question for the setting that is most likely meant by one that does not exist; or nothing."""
    chosen = [o for o in overrides if re.fullmatch(r"[\w@/]+=\w+", o)]
    for given in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf), version_base="1.3"):
                composed: Any = OmegaConf.to_container(compose(config_name, overrides=given), resolve=False)
                return nearest(key, names_of(composed))
        except HydraException:
            continue
    return ""
