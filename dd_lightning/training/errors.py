"""What a user can do about errors from around a run."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.training.callbacks import LastGood, of_kind
from dd_lightning.training.processes import is_lost_process
from dd_lightning.training.resuming import Restored

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def explained(trainer: pl.Trainer) -> Iterator[None]:
    """Errors in the block that the machine causes say what a user can do about them.

    Raises:
        ConnectionError: another process ended.
        OSError: nothing can be written.
        MemoryError: memory is out.
        ValueError: the checkpoint is not what this run writes.
    """
    try:
        yield
    except Exception as error:
        told = _explanation(error, trainer)
        if told is None:
            raise
        raise told from error


def _explanation(error: Exception, trainer: pl.Trainer) -> Exception | None:
    """None for other errors."""
    at = f"at outer step {trainer.global_step}"
    if is_lost_process(error):
        return ConnectionError("another process of this run ended; the same command goes on")
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return OSError(
            f"cannot write to {trainer.default_root_dir} ({error.strerror}) {at}; "
            "once there is room, the same command goes on from the last checkpoint"
        )
    if is_out_of_memory(error):
        last_good = of_kind(trainer, LastGood)
        kept = last_good.kept(trainer) if last_good else "nothing was kept"
        return MemoryError(
            f"out of memory {at} ({' '.join(str(error).split())[:120]}); {kept}; "
            "a chunk of networks, unroll=recompute, a smaller init.per_step, pieces of the real images (piece=64) "
            "or a smaller batch_size takes less"
        )
    restored = of_kind(trainer, Restored)
    if restored and restored.checkpoint and not restored.begun and not isinstance(error, OSError):
        reason = " ".join((f"it lacks {error}" if isinstance(error, KeyError) else str(error)).split())
        return ValueError(f"cannot go on from {restored.checkpoint}: {reason}; resume=null starts a new run")
    return None
