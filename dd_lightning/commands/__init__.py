"""The command lines: Hydra, wiring and exit codes."""

from dd_lightning.system.threads import yield_soon

yield_soon()
