"""Zip archives from elsewhere (`.npz`, checkpoints): what they claim to hold is held against the file first."""

import math
import zipfile
from pathlib import Path

import numpy as np

DEFLATE = 1032  # the highest ratio that deflate reaches


def check_archive(path: Path) -> None:
    """Refuses an archive that claims more than its file can hold.

    Raises:
        ValueError: saying which member does.
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


def check_arrays(path: Path) -> None:
    """Refuses an `.npz` file whose arrays claim another size than they have, or hold objects.

    Raises:
        ValueError: saying which array.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    check_archive(path)
    headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)[0]
                if version not in headers:
                    raise ValueError(f"{member.filename} is of an unknown version")
                shape, _, dtype = headers[version](file)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} holds Python objects")
                if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                    raise ValueError(f"{member.filename} claims another size, {list(shape)}, than it has")
