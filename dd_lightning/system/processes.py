"""Several processes: which of them this one is, and that none outlives those it works for."""

import os
import threading
import time

from lightning_utilities.core.rank_zero import rank_zero_only

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning reads it when it is imported


def rank() -> int:
    """The index of this process among those that distil together."""
    known = getattr(rank_zero_only, "rank", None)
    return int(next((os.environ[name] for name in RANKS if name in os.environ), 0)) if known is None else known


def end_with(parent: int) -> None:
    """However process `parent` ends, this one does not go on without it."""

    def watch() -> None:
        # A process that waits for others, such as inside a collective, notices their end late, or never.
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
