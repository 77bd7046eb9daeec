"""What a program runs on: packages, processor, servers; as findings for a bug report, without secrets."""

import os
import platform
import re
import socket
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from dd_lightning.system.words import counted

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
Found = tuple[str, str]  # one of these, and what was found

EXTRAS = ("hydra-optuna-sweeper", "mlflow", "mlflow-skinny", "hydra-joblib-launcher", "hydra-submitit-launcher")
WAIT = 5  # seconds for a server
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)


def python() -> Found:
    return OK, f"{platform.python_version()} at {sys.executable}; {platform.platform(terse=True)}"


def packages() -> Found:
    """The required packages; one that is missing, or of another version than is asked for, is broken."""
    asked = [Requirement(line) for line in requires("dd_lightning") or []]
    wrong, there = [], [f"dd_lightning {version('dd_lightning')}"]
    for one in asked:
        if one.marker is not None and not one.marker.evaluate():  # of an extra
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        there.append(f"{one.name} {found}")
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found} is not {one.specifier}")
    return (BROKEN, "; ".join(wrong)) if wrong else (OK, ", ".join(there))


def machine() -> Found:
    """Cores, how busy they are, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    text = f"{counted(cores, 'core')} for this process of {os.cpu_count()}, load {load:.1f}"
    info = Path("/proc/meminfo")
    if info.exists():
        kib = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text(encoding="utf-8")))
        text += f"; {int(kib['MemAvailable']) / 2**20:.1f} of {int(kib['MemTotal']) / 2**20:.1f} GiB of memory free"
    busy = load > (os.cpu_count() or 1)
    return (NOTE, text + "; busy, where threads=1 is often fastest") if busy else (OK, text)


def weights_and_biases() -> Found:
    """Whether its server can be reached, and whether there is a key; never the key."""
    mode = os.environ.get("WANDB_MODE", "online")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc().authenticators(host) is not None
    except (OSError, NetrcParseError):
        known = False
    key = "a key is set" if known or "WANDB_API_KEY" in os.environ else "no key is set (`wandb login`)"
    if mode != "online":
        return OK, f"WANDB_MODE={mode}; {key}"
    try:
        socket.create_connection((host, 443), timeout=WAIT).close()
    except OSError as error:
        return NOTE, f"{host} cannot be reached ({error}): logger=wandb goes on offline; {key}"
    return (OK if "no key" not in key else NOTE), f"{host} can be reached; {key}"


def extras() -> Found:
    """Which of the packages that nothing needs unless it is asked for."""
    there = []
    for name in EXTRAS:
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return OK, ", ".join(there) or "none"


def without_secrets(text: str) -> str:
    """The text without what the environment keeps secret, passwords in addresses, and the user's name in paths."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
