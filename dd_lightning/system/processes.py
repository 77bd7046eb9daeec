"""Several processes: which of them this one is, and that none outlives those it works for."""

import os
import threading
import time

from pytorch_lightning.utilities import rank_zero_only


def rank() -> int:
    """The index of this process among those that distil together."""
    return rank_zero_only.rank or 0


def end_with(parent: int) -> None:
    """However process `parent` ends, this one does not go on without it."""

    def watch() -> None:
        # A process that waits for others, such as inside a collective, notices their end late, or never.
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
