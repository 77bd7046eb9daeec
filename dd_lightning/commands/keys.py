"""Names of settings: those that nothing reads are refused, with the nearest that something does."""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf

from dd_lightning.commands.resolvers import task_overrides
from dd_lightning.system.checks import nearest


def check_dashes(program: str, arguments: list[str]) -> None:
    """Ends the program where a setting is written as an option, or an option is unknown."""
    parser = get_args_parser()
    parser.error = lambda message: sys.exit(f"{program}: error: {message}")  # type: ignore[method-assign]
    for unknown in parser.parse_known_args(arguments)[1]:
        if not unknown.startswith("-"):
            parser.error(f"options such as -m come before all settings, and here settings such as {unknown} behind one")
        name, _, value = unknown.lstrip("-").partition("=")
        parser.error(f"{unknown} is no option; a setting is written without dashes: {name}={value or 'VALUE'}")


def check_known(cfg: DictConfig, conf: Path, config_name: str) -> None:
    """Refuses settings that neither the command nor another setting reads, nor the class they are for.

    Raises:
        ValueError: naming the setting and the nearest that is read.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    check_sections(plain, conf, config_name)
    read = top_level(conf, config_name) | set(re.findall(r"\$\{(?:oc\.select:)?(\w+)", str(plain)))
    said = {o.lstrip("+").partition("=")[0].partition(".")[0] for o in task_overrides()}
    for key in (plain.keys() - read) & said:  # what rows of tables set is for their columns
        known = [name for name, _ in named_values(plain) if name.partition(".")[0] in read]
        raise ValueError(f"{key} is no setting of dd-{config_name}{nearest(key, known)}")
    check_taken(plain)


def check_sections(plain: dict[str, Any], conf: Path, config_name: str) -> None:
    """Refuses unknown settings, or none, in what a command's own file has under one name, such as `budget`.

    Raises:
        ValueError: naming the setting and the nearest that is read.
    """
    own = yaml.safe_load((conf / f"{config_name}.yaml").read_text(encoding="utf-8"))
    for name, section in own.items():
        if name == "hydra" or not isinstance(section, dict):
            continue
        if not isinstance(plain[name], dict):
            raise ValueError(f"{name} has settings, such as {name}.{next(iter(section))}, and cannot be {plain[name]}")
        closed = not any(isinstance(value, dict | list) for value in section.values())
        for key in plain[name].keys() - section.keys() if closed else ():
            known = [f"{name}.{one}" for one in section]
            raise ValueError(f"{name}.{key} is no setting of dd-{config_name}{nearest(f'{name}.{key}', known)}")


def check_taken(node: dict[str, Any], prefix: str = "") -> None:
    """Refuses settings that their `_target_` does not take, and values of another kind than it takes.

    Raises:
        ValueError: naming the setting.
    """
    for key, value in node.items():
        if isinstance(value, dict):
            check_taken(value, f"{prefix}{key}.")
    target, at = node.get("_target_"), prefix.removesuffix(".")
    try:
        made = get_object(target) if isinstance(target, str) and "${" not in target else None
        parameters = signature(made).parameters if made is not None else {}
    except (ImportError, AttributeError, ValueError, TypeError, HydraException):
        return  # what is wrong with the target is said when it is used
    if made is None:
        return
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in parameters and "${" not in str(value) and value != MISSING:
            check_kind(at, key, parameters[key].annotation, value)
            if str(target).startswith("torch.") and not all(map(finite, listed(value))):
                raise ValueError(f"{at}: {key} must be finite, not {value}")
        elif key not in parameters and not takes_all and not str(key).startswith("_"):
            meant = nearest(str(key), (name for name in parameters if name != "data"))
            name = getattr(made, "__name__", target)
            raise ValueError(f"{at}: {name} takes no setting {key!r}; leave it out with ~{at}.{key}{meant}")


def check_kind(at: str, key: str, annotation: Any, value: object) -> None:
    """Refuses a value of another kind than an argument's; what a number may be is for its class to say.

    Raises:
        ValueError: naming the setting.
    """
    if value is None:
        if annotation in (bool, int, float, list) or get_origin(annotation) in (list, tuple, Sequence):
            raise ValueError(f"{at}: {key} cannot be null")
    elif wants(annotation, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{at}: {key} must be true or false, not {value!r}")
    elif wants(annotation, list, tuple, Sequence):
        if not isinstance(value, list):
            raise ValueError(f"{at}: {key} must be a list, such as {at}.{key}=[{value}], not {value}")
    elif wants(annotation, str):
        if not isinstance(value, str):
            raise ValueError(f"{at}: {key} must be a text, not {value!r}; in quotes: {at}.{key}='\"{value}\"'")
    elif wants(annotation, int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{at}: {key} must be a number, not {value!r}")


def signature(made: Any) -> inspect.Signature:
    """With annotations that are types, where they can be found."""
    try:
        return inspect.signature(made, eval_str=True)
    except Exception:  # of a user's, or of what is imported for type checkers alone
        return inspect.signature(made)


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def finite(value: object) -> bool:
    """Whether a value is none of those numbers that no computation survives."""
    return not isinstance(value, float) or isfinite(value)


def wants(annotation: Any, *kinds: type) -> bool:
    """Whether an argument is of one of these kinds, or nothing; or a tensor, which no setting is."""
    either = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = {get_origin(one) or one for one in either if getattr(one, "__name__", "") != "Tensor"} - {NoneType}
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


def named_values(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All groups and values, with their dotted names."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from named_values(value, f"{prefix}{key}.")


def meant(key: str, conf: Path, config_name: str, overrides: list[str]) -> str:
    """A question for the setting that is most likely meant by one that does not exist; or nothing."""
    chosen = [o for o in overrides if re.fullmatch(r"[\w@/]+=\w+", o)]
    for given in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf), version_base="1.3"):
                composed: Any = OmegaConf.to_container(compose(config_name, overrides=given), resolve=False)
                return nearest(key, top_level(conf, config_name) | set(dict(named_values(composed))))
        except HydraException:
            continue
    return ""


def elsewhere(key: str, conf: Path) -> str:
    """Which other options of its group have a setting that the chosen one has not; or nothing."""
    group, _, name = key.partition(".")
    files = sorted((conf / group).glob("*.yaml")) if name else []
    having = [f"{group}={f.stem}" for f in files if name in (yaml.safe_load(f.read_text(encoding="utf-8")) or {})]
    if not having:
        return ""
    return f" of the chosen {group}; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it: name one, too"
