"""Published data sets of photographs, from tiny archives of their layout."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dd_lightning.data import Cub200, RealData, Voc2007
from dd_lightning.system.archives import unpack_tar

SMALL = {"image_size": 6, "workers": 0, "validation": 1, "mean": [0.5], "std": [0.5]}


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return path


def png(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../outside.txt", b"x"),
        ("/tmp/outside.txt", b"x"),
        ("a/../../outside.txt", b"x"),
        ("link", (tarfile.SYMTYPE, "/etc")),
        ("link", (tarfile.LNKTYPE, "inside.txt")),
        ("device", (tarfile.CHRTYPE, "")),
    ],
)
def test_an_archive_that_leads_outside_is_refused(tmp_path, name, content):
    path = write_tar(tmp_path / "a.tar", {"inside.txt": b"x", name: content})
    with pytest.raises(ValueError, match=r"leads out of the folder|is a link or a device"):
        unpack_tar(path, tmp_path / "there")
    assert {one.name for one in tmp_path.iterdir()} == {"a.tar"}


def test_an_archive_is_unpacked(tmp_path):
    unpack_tar(write_tar(tmp_path / "a.tar", {"a/b.txt": b"x", "c.txt": b"y"}), tmp_path / "there")
    assert (tmp_path / "there" / "a" / "b.txt").read_bytes() == b"x"


# PASCAL VOC


def annotation(objects):
    """An XML file like VOC's, whose persons have parts with names and boxes of their own."""
    text = "<annotation><size><width>40</width></size>"
    for name, box, *flags in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        extra = "".join(f"<{flag}>1</{flag}>" for flag in flags)
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>" if name == "person" else ""
        text += f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox>{part}</object>"
    return (text + "</annotation>").encode()


OBJECTS = {
    "trainval": {
        "000001": [("person", (0, 0, 10, 20)), ("cat", (10, 0, 20, 20), "difficult")],
        "000002": [("cat", (5, 5, 15, 10), "truncated"), ("train", (20, 10, 40, 30))],
        "000003": [("train", (0, 0, 40, 30)), ("person", (2, 3, 4, 5))],
    },
    "test": {"000004": [("train", (0, 0, 5, 5)), ("cat", (0, 0, 9, 9)), ("person", (30, 20, 40, 30))]},
}


def shades(number):
    """Every pixel says where it is."""
    rows, columns = np.mgrid[:30, :40]
    return np.stack([6 * columns, 8 * rows, np.full((30, 40), 10 * int(number))], 2).astype(np.uint8)


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """VOC 2007 in small, in two archives that torchvision "downloads"."""
    archives = tmp_path / "archives"
    archives.mkdir()
    for part, pictures in OBJECTS.items():
        root, files = "VOCdevkit/VOC2007", {}
        files[f"{root}/ImageSets/Main/{part}.txt"] = "".join(f"{number}\n" for number in pictures).encode()
        for number, objects in pictures.items():
            files[f"{root}/JPEGImages/{number}.jpg"] = png(shades(number), "JPEG")
            files[f"{root}/Annotations/{number}.xml"] = annotation(objects)
        write_tar(archives / f"VOC{part}_06-Nov-2007.tar", files)

    def download(url, root, filename, md5):
        from torchvision.datasets.utils import extract_archive

        extract_archive(archives / filename, root)

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", download)
    return lambda **form: Voc2007("voc2007", str(tmp_path / "data"), **SMALL | form)


def test_every_object_of_voc_is_an_example(voc, tmp_path):
    data = RealData(voc())
    data.setup()
    assert data.class_names == ["cat", "person", "train"]
    assert (len(data.train) + len(data.validation), len(data.test)) == (6, 3)
    stored = data.test.store
    for source, image in zip(stored.sources, stored.images, strict=True):
        left, upper, right, lower = source.box
        number = int(source.path.stem)
        expected = np.array([6 * (left + right - 1) / 2, 8 * (upper + lower - 1) / 2, 10 * number])
        assert np.abs(image.float().mean((1, 2)).numpy() - expected).max() < 6
    assert [s.box for s in stored.sources[6:]] == [box for _, box in OBJECTS["test"]["000004"]]
    again = RealData(voc())  # without a download
    again.setup()
    assert again.content == data.content


def test_voc_that_is_incomplete_says_so(voc, tmp_path):
    voc().prepare()
    tree = tmp_path / "data" / "download" / "voc2007" / "VOCdevkit"
    (tree / "VOC2007" / "Annotations" / "000002.xml").write_text("<annotation><object></object></annotation>")
    with pytest.raises(ValueError, match=r"incomplete or damaged .*without a name or a box.*delete that folder"):
        voc().prepare()
    (tree / "VOC2007" / "Annotations" / "000002.xml").write_text("<annot")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        voc().prepare()


def test_an_object_without_area_is_named(voc, tmp_path):
    voc().prepare()
    path = tmp_path / "data/download/voc2007/VOCdevkit/VOC2007/Annotations/000002.xml"
    path.write_bytes(annotation([("cat", (5, 5, 5, 10)), ("train", (20, 10, 40, 30))]))
    with pytest.raises(ValueError, match=r"000002.jpg is no picture that can be read \(its part .* is empty\)"):
        voc().prepare()


# CUB-200-2011


@pytest.fixture
def cub(tmp_path, monkeypatch):
    """CUB-200-2011 in small: its archive lies where a user without a connection puts it."""
    files, lines = {}, {name: [] for name in ("classes", "images", "image_class_labels", "train_test_split")}
    for label, name in enumerate(("001.Black_footed_Albatross", "002.Rock_Wren"), 1):
        lines["classes"].append(f"{label} {name}")
        for i in range(4):
            number = 4 * label + i - 3
            path = f"{name}/{i}.jpg"
            files[f"CUB_200_2011/images/{path}"] = png(np.full((9 + i, 12, 3), 20 * number, np.uint8), "JPEG")
            lines["images"].append(f"{number} {path}")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(i < 3)}")
    files |= {f"CUB_200_2011/{name}.txt": "\n".join(of_file).encode() for name, of_file in lines.items()}
    incoming = tmp_path / "data/download/cub200_2011/incoming"
    incoming.mkdir(parents=True)
    archive = write_tar(incoming / "CUB_200_2011.tgz", files | {"attributes.txt": b"x"}, "w:gz")
    monkeypatch.setattr(Cub200, "url", "http://127.0.0.1:9/CUB_200_2011.tgz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Cub200, "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return lambda **form: Cub200("cub200_2011", str(tmp_path / "data"), **SMALL | form)


def test_cub_has_its_official_split(cub, tmp_path):
    data = RealData(cub())
    data.setup()
    assert data.class_names == ["Black footed Albatross", "Rock Wren"]
    assert (len(data.train) + len(data.validation), len(data.test)) == (6, 2)
    assert [int(image.float().mean().round()) for image in data.test.images] == [80, 160]
    assert data.test.labels.tolist() == [0, 1]
    assert not (tmp_path / "data/download/cub200_2011/incoming").exists()


def test_another_archive_than_the_published_one_is_refused(cub, monkeypatch, tmp_path):
    monkeypatch.setattr(Cub200, "md5", 32 * "0")
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*put CUB_200_2011.tgz into .*incoming"):
        cub().prepare()
    assert not (tmp_path / "data/download/cub200_2011/CUB_200_2011").exists()
