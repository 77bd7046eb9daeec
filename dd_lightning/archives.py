"""Zip archives from elsewhere (`.npz`, checkpoints): what they claim to hold is held against the file first."""

import zipfile
from pathlib import Path

DEFLATE = 1032  # the highest ratio that deflate reaches


def check_archive(path: Path) -> None:
    """Refuses an archive that claims more than its file can hold, or whose content was damaged.

    Raises:
        ValueError: saying which member.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > size:
            raise ValueError("its members are larger than the file")
        for member in members:
            stored = member.compress_type == zipfile.ZIP_STORED
            if member.file_size > member.compress_size * (1 if stored else DEFLATE):
                raise ValueError(f"{member.filename} claims {member.file_size} bytes, more than the file can hold")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")
