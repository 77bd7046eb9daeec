"""The command lines: Hydra, wiring and exit codes."""
