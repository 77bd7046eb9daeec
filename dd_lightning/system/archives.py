"""Archives from elsewhere (`.npz`, checkpoints, tar): what they claim to hold is looked at first."""

import math
import tarfile
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


def unpack_tar(path: Path, folder: Path) -> None:
    """Unpacks the files and folders of a tar archive, which holds nothing else, into a folder.

    Raises:
        ValueError: a member would lie outside, or is a link or a device; nothing was unpacked.
        OSError, tarfile.TarError: it cannot be read.
    """
    root = folder.resolve()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        for member in members:
            if not (member.isreg() or member.isdir()):
                raise ValueError(f"{path}: {member.name} is a link or a device")
            if not (root / member.name).resolve().is_relative_to(root):
                raise ValueError(f"{path}: {member.name} leads out of the folder")
        for member in members:
            member.mode = 0o755 if member.isdir() else 0o644
            archive.extract(member, root, set_attrs=False)
