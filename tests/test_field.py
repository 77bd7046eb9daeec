"""Sets against architectures, and ours beside the methods that followed the paper, on made-up runs."""

import csv
import json
from dataclasses import replace

import pytest
import torch
import yaml
from test_report import write_run

from dd_lightning import DistilledData
from dd_lightning.commands.report import PAPER
from dd_lightning.report import field
from dd_lightning.report.along import training
from dd_lightning.report.architectures import comma_separated, heat_map, matrix_of, short
from dd_lightning.report.budgets import budget, growth
from dd_lightning.report.field import Protocol, field_tables
from dd_lightning.report.gallery import gallery
from dd_lightning.report.runs import find_runs
from dd_lightning.report.searches import searches

FIELD = yaml.safe_load(PAPER.read_text())["field"]
NETWORK = {"_target_": "dd_lightning.networks.ConvNet", "width": 32, "norm": "instance"}
PROTOCOL = {"optimizer": "sgd", "epochs": 300}


def write_ordinary(folder, of, network, accuracies, random=50.0, name="evaluate", images=100):
    config = {"dataset": {"name": "mnist", "num_classes": 10}, "network": NETWORK}
    write_run(folder, accuracies, name, **config)
    result = json.loads((folder / "result.json").read_text())
    control = {"accuracy_mean": random, "accuracy_std": 1.0, "images": images, "stored_numbers": 784 * images}
    use = {"choice": "ordinary", "protocol": PROTOCOL, "labels": "soft", "images": images, "chosen": {}}
    use |= {"stored_numbers": 784 * images + 1000, "learning_rate": 0.01, "controls": {"random": control}}
    result |= {"set": of, "network": network, "use": use, "card": {"augment": {"choice": "dsa"}}}
    (folder / "result.json").write_text(json.dumps(result))


def test_sets_stand_against_architectures(tmp_path):
    places = {("gallery:any", "LeNet"): 90.0, ("gallery:any", "MLP"): 80.0, ("runs/fig3a/2026-01-01_x", "LeNet"): 60.0}
    for i, ((of, network), value) in enumerate(places.items()):
        write_ordinary(tmp_path / str(i), of, network, [value - 1, value + 1], name="architectures")
    matrix = matrix_of(find_runs([tmp_path]))
    assert (matrix.rows, matrix.columns) == (["fig3a", "gallery:any"], ["LeNet", "MLP"])
    assert matrix.text("gallery:any", "MLP") == "80.0 ± 1.4"
    assert matrix.text("fig3a", "MLP") == ""
    rows = list(csv.DictReader(comma_separated(matrix).splitlines()))
    assert [(row["set"], row["stored_numbers"], row["network"], float(row["mean"])) for row in rows] == [
        ("fig3a", "79400", "LeNet", 60.0),
        ("gallery:any", "79400", "LeNet", 90.0),
        ("gallery:any", "79400", "MLP", 80.0),
    ]
    assert matrix.numbers_text("fig3a") == "79,400"
    figure = heat_map(matrix)
    assert figure.drawing is not None
    assert "gallery:any: LeNet 90.0 ± 1.4, MLP 80.0 ± 1.4" in figure.words
    assert heat_map(matrix_of([])).commands == ["dd-evaluate -m sweep=architectures 'distilled.path=RUN,gallery:NAME'"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/any_mnist/2026-11-27_20-23-25_d6711d2f", "any_mnist"),
        ("runs/any_mnist/2026-11-27_20-23-25_d6711d2f/distilled.safetensors", "any_mnist"),
        ("gallery:any", "gallery:any"),
        ("random_real", "random_real"),
        ("mine/run", "run"),
    ],
)
def test_sets_are_called_by_their_run(path, name):
    assert short(path) == name


def test_ours_stand_beside_published_numbers(tmp_path):
    write_ordinary(tmp_path / "a", "gallery:any", "ConvNet", [96.0, 98.0], random=90.0)
    write_ordinary(tmp_path / "b", "gallery:any", "LeNet", [96.0, 98.0])  # another network
    write_ordinary(tmp_path / "c", "gallery:any", "ConvNet", [88.0, 90.0], random=60.0, images=10)
    tables = {table.key: table for table in field_tables(FIELD, find_runs([tmp_path]))}
    assert list(tables) == ["mnist", "fashion_mnist", "svhn", "cifar10", "cifar100"]
    table = tables["mnist"]
    assert table.columns == [1, 10, 50]
    lines = {line.title: line for line in table.lines}
    assert lines["gallery:any"].texts == {1: "89.0 ± 1.4", 10: "97.0 ± 1.4"}
    assert lines["Random real images"].texts == {1: "60.0 ± 1.0", 10: "90.0 ± 1.0"}
    training, chosen = "sgd, 300 epochs, augmentation dsa", "validation pictures: rate"
    made = Protocol("ConvNet, width 32, instance norm", "soft", training, chosen)
    assert lines["gallery:any"].protocol == made
    assert lines["Random real images"].protocol == replace(made, labels="hard")
    assert lines["gallery:any"].numbers == {1: 8840, 10: 79400}
    assert lines["Random real images"].numbers == {1: 7840, 10: 78400}
    assert lines["DC"].texts == {1: "91.7", 10: "97.4", 50: "98.8"}
    assert lines["DC"].numbers == {1: 7840, 10: 78400, 50: 392000}
    assert lines["KIP → finite network"].numbers[1] == 7840 + 10 * 10  # with learned labels
    assert lines["KIP → finite network"].protocol == Protocol("ConvNet, width 1024", "learned", *["not known"] * 2)
    rows = list(csv.DictReader(field.comma_separated(tables.values()).splitlines()))
    assert rows[0]["method"] == "gallery:any"
    assert (rows[0]["stored_numbers"], rows[0]["chosen"], rows[0]["source"]) == ("8840", chosen, "here")
    assert [line.ours for line in table.lines[:3]] == [True, True, False]


def test_published_numbers_have_a_source_and_a_protocol():
    for method in FIELD["methods"].values():
        assert method["source"]
        assert method.get("labels") in ("hard", "soft", "learned", None)
        assert set(method["cells"]) <= set(FIELD["sets"])
    printed = {
        key: list(method["cells"]["cifar10"].values())
        for key, method in FIELD["methods"].items()
        if "cifar10" in method["cells"]
    }
    assert printed == {
        "dc": [28.3, 44.9, 53.9],
        "dsa": [28.8, 52.1, 60.6],
        "idc": [50.0, 67.5, 74.5],
        "kip": [50.0, 62.7, 68.4],
        "mtt": [46.2, 65.4, 71.6],
        "datm": [46.9, 66.8, 76.1],
        "frepo": [46.8, 65.5, 71.7],
        "frepo_convnet": [45.6, 63.5, 70.7],
        "rat_bptt": [53.2, 69.4, 75.3],
        "ncfm": [49.5, 71.8, 77.4],
    }


def test_accuracy_stands_over_stored_numbers(tmp_path):
    for images in (10, 100):
        write_ordinary(tmp_path / str(images), "gallery:any", "ConvNet", [80.0 + images / 10], images=images)
    write_ordinary(tmp_path / "sweep", "gallery:other", "ConvNet", [20.0], images=20, name="architectures")
    figure = budget(find_runs([tmp_path]))
    assert "MNIST, ConvNet: 81.0 at 1 (8,840), 90.0 at 10 (79,400)" in figure.words
    assert "MNIST, ConvNet, random real: 50.0 ± 1.0 at 1 (7,840), 50.0 ± 1.0 at 10 (78,400)" in figure.words
    assert figure.drawing is not None
    by_images, by_numbers = figure.drawing.axes
    found = [[list(line.lines[0].get_xdata()) for line in axis.containers] for axis in (by_images, by_numbers)]
    assert found == [[[1, 10], [1, 10]], [[8840, 79400], [7840, 78400]]]
    assert budget([]).drawing is None


def test_the_gallery_has_a_picture_of_each_set():
    for one in gallery():
        assert one.png.startswith(b"\x89PNG")
        assert one.made["command"].startswith("dd-distill")


def test_the_sweep_fills_the_matrix(run, packed, tmp_path):
    packed()
    for name in ("one", "other"):
        random = torch.Generator().manual_seed(len(name))
        data = DistilledData.create(torch.randn(1, 3, 1, 12, 12, generator=random), torch.arange(3)[None])
        data.card["dataset"] = {"choice": "packed", "target": "dd_lightning.data.Packed", "path": "toy.npz"}
        data.card["dataset"] |= {"validation": 10}
        (tmp_path / name).mkdir()
        data.save(tmp_path / name / "distilled.safetensors")
    few = ("networks=2", "use.epochs=2", "use.choosing=2", "use.learning_rates=[0.01,0.1]", "processes=1")
    line = ("-m", "sweep=architectures", "distilled.path=one,other", "network=mlp,convnet", *few)
    code, error, _ = run("evaluate", *line)
    assert (code, error) == (0, "")
    matrix = matrix_of(find_runs([tmp_path / "runs"]))
    assert (matrix.rows, matrix.columns) == (["one", "other"], ["ConvNet", "MLP"])
    assert len(matrix.cells) == 4
    for cell in matrix.cells.values():
        (one,) = cell.runs
        assert one.setting("init.scheme") == "default"
        assert len(one.accuracies) == 2
        assert one.result["use"]["controls"]["random"]["networks"] == 2
    assert run("report")[0] == 0
    text = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "Sets against architectures" in text
    assert (tmp_path / "runs" / "report" / "architectures.png").stat().st_size > 1000


def write_result(folder, **entries):
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_prefixes_stand_beside_random_images_and_sets_for_their_budget(tmp_path):
    of_set = {"dataset": {"name": "mnist"}, "network": NETWORK, "order": {"_target_": "ShuffledOrder"}}
    grown = [{"images_per_class": n, "accuracy_mean": 60.0 + n, "accuracy_std": 1.0, "networks": 2} for n in (1, 2)]
    write_run(tmp_path / "grown", [62.0], "grow_mnist", **of_set)
    write_result(
        tmp_path / "grown", prefixes=[one | {"stored_numbers": 7841 * one["images_per_class"]} for one in grown]
    )
    for n, mean in ((1, 40.0), (2, 50.0)):
        source = {"_target_": "sources.random_subsets", "images_per_class": n}
        write_run(tmp_path / f"random{n}", [mean], **{**of_set, "distilled": source})
        use = {"use": {"choice": "training"}, "set": "runs/any_mnist", "stored_numbers": 7841 * n}
        write_result(tmp_path / f"random{n}", **use)
        settings = {**of_set, "distilled": {"images_per_class": n}}
        write_run(tmp_path / f"made{n}", [60.5 + n], f"any_mnist_{n}", **settings)
        write_result(tmp_path / f"made{n}", card={"stored_numbers": 7841 * n})
    other = {**of_set, "dataset": {"name": "usps"}, "distilled": {"images_per_class": 1}}
    write_run(tmp_path / "other", [99.0], "any_usps_1", **other)
    figure = growth(find_runs([tmp_path]))
    assert figure.words.endswith(
        "MNIST, ConvNet: made for each budget: 61.5 at 1 (7,841), 62.5 at 2 (15,682); "
        "MNIST, ConvNet: prefixes of grow_mnist: 61.0 ± 1.0 at 1 (7,841), 62.0 ± 1.0 at 2 (15,682); "
        "MNIST, ConvNet: random images of any_mnist: 40.0 at 1 (7,841), 50.0 at 2 (15,682)."
    )
    assert figure.drawing is not None
    assert growth([]).commands[0] == "dd-distill experiment=grow_mnist"


def test_accuracy_during_training_has_a_panel_for_each_network(tmp_path):
    for network in ("ConvNet", "LeNet"):
        write_ordinary(tmp_path / network, "gallery:any", network, [90.0])
        result = json.loads((tmp_path / network / "result.json").read_text())
        result["use"]["along"] = {"epochs": [0, 5, 10], "accuracy": [10.0, 80.0, 90.0]}
        result["use"]["controls"]["random"]["along"] = {"epochs": [0, 5, 10], "accuracy": [10.0, 40.0, 50.0]}
        write_result(tmp_path / network, use=result["use"])
    figure = training(find_runs([tmp_path]))
    assert "MNIST, LeNet: gallery:any 10.0, 80.0, 90.0; gallery:any, random 10.0, 40.0, 50.0" in figure.words
    assert figure.drawing is not None
    assert [axis.get_title() for axis in figure.drawing.axes] == ["MNIST, ConvNet", "MNIST, LeNet"]
    assert [list(line.get_ydata()) for line in figure.drawing.axes[0].lines] == [[10, 80, 90], [10, 40, 50]]
    assert training([]).drawing is None


def test_searches_are_figures_of_the_page(tmp_path):
    trials = [{"number": n, "value": v, "settings": {"optimizer.lr": n / 10}} for n, v in ((0, 70.0), (2, 90.0))]
    (tmp_path / "search_demo").mkdir()
    path = tmp_path / "search_demo" / "search.json"
    path.write_text(json.dumps({"trials": trials, "of": 3, "importances": {"optimizer.lr": 1.0}}))
    (figure,) = searches([tmp_path])
    assert figure.words.startswith("Best of 3 trials: 90.00 % on validation pictures, with optimizer.lr 0.2.")
    assert figure.drawing is not None
    path.write_text("{")
    with pytest.raises(ValueError, match=r"search\.json is truncated"):
        searches([tmp_path])
