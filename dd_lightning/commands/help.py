"""What `--help` shows, on one screen: the options of each group, and the settings that belong to no group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

WIDTH = 120
_INDENT = " " * 15


def register_help(conf: Path) -> None:
    """Makes `${options:GROUP,TEXT}` and `${settings:FILE}` known to the texts in `conf/hydra/help`."""
    helps: dict[str, Callable[..., str]] = {
        "options": lambda group, text: options(conf, group, text),
        "settings": lambda name: settings(conf, name),
    }
    for name, resolver in helps.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


@contextmanager
def unlisted() -> Iterator[None]:
    """Spares Hydra its own listing of all groups, for which our texts have no place: more than half of the time."""
    listing = Hydra.format_config_groups
    Hydra.format_config_groups = lambda *_, **__: ""  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.format_config_groups = listing  # type: ignore[method-assign]


def options(conf: Path, group: str, text: str) -> str:
    """A config group: what it is, and what can be chosen of it."""
    names = ", ".join(together(sorted(path.stem for path in (conf / group).glob("*.yaml"))))
    return fill(f"  {group:13}{text}: {names}", WIDTH, subsequent_indent=_INDENT, break_on_hyphens=False)


def together(names: list[str]) -> list[str]:
    """Names that differ in a number at their end alone as a shell writes them: any_mnist_{1,10,50}."""
    ends: dict[str, list[str]] = {}
    for name in names:
        stem, _, end = name.rpartition("_")
        stem, end = (f"{stem}_", end) if end.isdigit() else (name, "")
        ends.setdefault(stem, []).append(end)
    return [stem + (f"{{{','.join(sorted(e, key=int))}}}" if len(e) > 1 else e[0]) for stem, e in ends.items()]


def settings(conf: Path, name: str) -> str:
    """The settings in a command's own file, with their comments; of a larger section, its name."""
    lines = (conf / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    own, inside = [], False
    for line in lines:
        if line[:1].isalpha():  # a new key at the top
            inside = line.partition(":")[0] not in ("defaults", "hydra")
        if inside and line.strip() and "_target_" not in line and not line.strip().startswith("#"):
            own.append(f"  {line}")
    return "\n".join(own).replace("$", "$$")  # Hydra takes $ for a place to fill in
