"""Published data sets of photographs: downloaded once, unpacked, and read as files."""

import shutil
import xml.etree.ElementTree as ElementTree
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dd_lightning.data.decoding import Box
from dd_lightning.data.files import Listing, PictureFiles
from dd_lightning.data.store import Source
from dd_lightning.system.archives import unpack_tar
from dd_lightning.system.locking import locked


class Downloaded(PictureFiles):
    """Picture files that are downloaded into `<data_dir>/download/<name>`, whole or not at all.

    Args:
        **form: as in `PictureFiles`.
    """

    tree: str  # the folder that is unpacked
    archives: tuple[str, ...]

    def __init__(self, name: str, data_dir: str, **form: Any) -> None:
        super().__init__(name, data_dir, **form)
        self.download = Path(data_dir).expanduser() / "download" / name

    def listing(self) -> Listing:
        tree, incoming = self.download / self.tree, self.download / "incoming"
        with locked(self.download / ".lock", wait=True):  # of several processes one downloads
            if not tree.is_dir():
                incoming.mkdir(exist_ok=True)
                self._fetch(incoming)
                (incoming / self.tree).rename(tree)
                shutil.rmtree(incoming)
        try:
            return self.listed(tree)
        except (LookupError, OSError, ValueError, ElementTree.ParseError) as error:
            raise ValueError(
                f"data set {self.name}: what is in {tree} is incomplete or damaged ({' '.join(str(error).split())}); "
                "delete that folder, and the same command downloads it again"
            ) from error

    def _fetch(self, incoming: Path) -> None:
        try:
            self.fetch(incoming)
        except Exception as error:  # of a connection, or an archive that is not the published one
            raise FileNotFoundError(
                f"data set {self.name} could not be downloaded and unpacked ({' '.join(str(error).split())}); put "
                f"{' and '.join(self.archives)} into {incoming}, and the same command goes on"
            ) from error

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Downloads and unpacks into a folder."""

    @abstractmethod
    def listed(self, tree: Path) -> Listing:
        """The pictures in what was unpacked."""


class Voc2007(Downloaded):
    """Single objects of PASCAL VOC 2007, cut from its pictures by their boxes, as the files give them.

    All objects of trainval are for training, all of test for the test: difficult and truncated ones, too.
    """

    tree = "VOCdevkit"
    archives = ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar")

    def fetch(self, folder: Path) -> None:
        from torchvision.datasets import VOCDetection

        for part in ("trainval", "test"):
            VOCDetection(str(folder), "2007", part, download=True)

    def listed(self, tree: Path) -> Listing:
        from torchvision.datasets import VOCDetection

        found = {}
        for part in ("trainval", "test"):
            pictures = VOCDetection(str(tree.parent), "2007", part)
            pairs = zip(pictures.images, pictures.annotations, strict=True)
            found[part] = [(Path(image), name, box) for image, xml in pairs for name, box in _objects(Path(xml))]
        names = sorted({name for _, name, _ in found["trainval"]})
        labels = {name: label for label, name in enumerate(names)}
        train, test = ([Source(path, labels[name], box) for path, name, box in of_part] for of_part in found.values())
        return Listing(tree, names, train, test)


def _objects(path: Path) -> Iterator[tuple[str, Box]]:
    """The class and the box of each object in an annotation."""
    for one in ElementTree.parse(path).getroot().findall("object"):
        name, box = one.findtext("name", "").strip(), one.find("bndbox")
        if not name or box is None:
            raise ValueError(f"{path} has an object without a name or a box")
        left, upper, right, lower = (int(float(box.findtext(k, ""))) for k in ("xmin", "ymin", "xmax", "ymax"))
        yield name, (left, upper, right, lower)


class Cub200(Downloaded):
    """CUB-200-2011: 200 kinds of birds, whole pictures, in the official split."""

    tree = "CUB_200_2011"
    archives = ("CUB_200_2011.tgz",)
    url = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
    md5 = "97eceeb196236b17998738112f37df78"

    def fetch(self, folder: Path) -> None:
        from torchvision.datasets.utils import download_url

        (archive,) = self.archives
        download_url(self.url, str(folder), archive, self.md5)
        unpack_tar(folder / archive, folder)

    def listed(self, tree: Path) -> Listing:
        classes, images, labels, training = (
            dict(line.split(maxsplit=1) for line in (tree / f"{name}.txt").read_text(encoding="utf-8").splitlines())
            for name in ("classes", "images", "image_class_labels", "train_test_split")
        )
        numbers = {number: label for label, number in enumerate(classes)}
        names = [name.partition(".")[2].replace("_", " ") for name in classes.values()]
        parts: dict[str, list[Source]] = {"1": [], "0": []}
        for image, path in images.items():
            parts[training[image].strip()].append(Source(tree / "images" / path, numbers[labels[image].strip()]))
        return Listing(tree, names, parts["1"], parts["0"])
