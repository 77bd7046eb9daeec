"""dd-report on made-up runs whose numbers are known."""

import csv
import json
import os
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image

from dd_lightning.commands.report import PAPER
from dd_lightning.distilled import DistilledData
from dd_lightning.report.figures import many_beat_one, rises, rises_and_levels_off
from dd_lightning.report.runs import Measured, Run, find_runs, measured, other_kinds
from dd_lightning.report.tables import latex, make_table, markdown

GREY = {"channels": 1, "image_size": 28, "mean": [0.1], "std": [0.3]}


def write_run(
    folder, accuracies, name="evaluate", row=None, column=None, seed=0, images=0, measures=None, counts=None, **config
):
    """A run's folder as the commands leave it, with made-up accuracies; `counts` of networks, which old ones lack."""
    (folder / ".hydra").mkdir(parents=True)
    test = {"accuracies": accuracies, "accuracy_mean": sum(accuracies) / len(accuracies), "accuracy_std": 0.0}
    result = {
        "name": name,
        "row": row,
        "column": column,
        "test": test | {"accuracy_before": 10.0, "measures": measures or {}} | (counts or {}),
        "hardware": "made up CPU, 1 thread",
        "versions": {"python": "3.11", "torch": "2.15"},
        "seconds": 90.0,
        "card": {"preprocessing": GREY},
    }
    if column and column.endswith("real"):
        chosen = {"learning_rate": "learned", "epochs": 3, "validation": 70.0, "test": 71.0}
        result["use"] = {"choice": "grid", "chosen": chosen, "gap": 0.4}
    if column:
        result["stored_numbers"] = 78430
    (folder / "result.json").write_text(json.dumps(result))
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": seed, **config}))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"experiment={name}", f"seed={seed}"]))
    if images:
        labels = torch.arange(10).expand(images, -1)
        data = DistilledData.create(torch.randn(images, 10, 1, 28, 28), labels, 3)
        data.card["preprocessing"] = GREY
        data.save(folder / "distilled.safetensors")
        Image.new("L", (900, 300)).save(folder / "distilled.png")
    return folder


def write_everything(runs):
    """Runs for every number but those of CIFAR10 and of SVHN → MNIST, and for every figure."""
    paper = yaml.safe_load(PAPER.read_text())
    for table in paper["tables"].values():
        for row, of_row in table["rows"].items():
            for column, cell in of_row["cells"].items():
                if row in ("cifar10", "s2m"):
                    continue
                values = [cell["mean"] - 2, cell["mean"] + 3]
                name = cell.get("experiment", "evaluate")
                place = {} if "experiment" in cell else {"row": row, "column": column}
                counts = {"networks": 8, "networks_chose": 2} if column in ("kmeans", "random") else None
                values = values[: 2 if "std" in cell else 1]
                write_run(runs / f"{row}_{column}", values, name, images=2, counts=counts, **place)
    for entry in paper["images"].values():
        counts = {"networks": 1, "networks_chose": 1}
        write_run(runs / entry["experiment"] / "1", [93.0], entry["experiment"], images=1, counts=counts)
    for i, steps in enumerate((2, 5, 10)):
        mnist = {"dataset": {"name": "mnist"}}
        common = {"name": "fig4a_steps", "distilled": {"steps": steps, "epochs": 2}, **mnist}
        write_run(runs / f"a{steps}", [60 + 9 * i, 62 + 9 * i], **common)
        common = {"name": "fig4b_epochs", "distilled": {"steps": 10, "epochs": i + 1}, **mnist}
        write_run(runs / f"b{steps}", [70 + 9 * min(i, 1) + i, 72 + 9 * min(i, 1)], **common)
        for arrangement in (1, steps):
            settings = {"distilled": {"steps": arrangement}, "per_class": steps, **mnist}
            write_run(runs / f"five{i}_{arrangement}", [50 + 5 * arrangement], "fig5_steps_vs_batch", **settings)
    for column, value in {"random_real": 80, "optimized_real": 82, "kmeans": 84, "average_real": 81, None: 86}.items():
        measures = {n: {"before": 0, "after": value} for n in ("accuracy_modified_labels", "attack_share")}
        name, place = ("evaluate", {"row": "fig6_mnist", "column": column}) if column else ("fig6_mnist_poison", {})
        write_run(runs / f"six_{column}", [value, value + 1], name, measures=measures, **place)


def test_runs_of_other_seeds_are_taken_together_and_those_of_other_settings_are_not(tmp_path):
    for age, (seed, steps, value) in enumerate([(1, 100, 90.0), (2, 100, 92.0), (2, 100, 70.0), (3, 50, 10.0)]):
        folder = write_run(tmp_path / str(age), [value], "x", seed=seed, trainer={"max_steps": steps})
        os.utime(folder / "result.json", (1000 - age, 1000 - age))
    found = measured(find_runs([tmp_path]))
    assert found is not None
    assert found.accuracies == [90.0, 92.0]
    assert (found.mean, found.std) == (91, pytest.approx(2**0.5))
    assert measured([]) is None


def test_a_table_holds_ours_beside_the_papers(tmp_path):
    counts = {"networks": 200, "networks_chose": 20}
    write_run(tmp_path / "a", [76.0, 80.0], row="mnist", column="kmeans", counts=counts)
    write_run(tmp_path / "b", [95.0], "table1_mnist_fixed")
    table = make_table("table1", yaml.safe_load(PAPER.read_text())["tables"]["table1"], find_runs([tmp_path]))
    cell = table.cells["mnist", "kmeans"]
    assert (cell.ours_text, cell.paper_text, cell.difference_text) == ("78.0 ± 2.8", "76.4 ± 9.5", "+1.6")
    assert table.cells["mnist", "fixed"].difference_text == "−1.6"
    assert len(table.missing) == 14
    text = markdown(table)
    line = next(line for line in text.splitlines() if line.startswith("| k-means |"))
    empty = "`dd-evaluate sweep=table1_baselines row=cifar10 column=kmeans`"
    ours = "78.0 ± 2.8 | 76.4 ± 9.5 | +1.6 | 200 (20 chose) | 78,430"
    assert line == f"| k-means | {ours} | {empty} | 22.5 ± 3.1 |  |  |  |"
    assert "Networks: how many were tested, and in brackets how many others chose" in text
    tex = latex(table)
    ours = r"k-means & 78.0 $\pm$ 2.8 & 76.4 $\pm$ 9.5 & +1.6 & 200 (20 chose) & 78,430 &"
    assert rf"{ours}  & 22.5 $\pm$ 3.1 &  &  &  \\" in tex
    assert "% cifar10, kmeans is missing: dd-evaluate" in tex
    assert all(line.count("&") == 10 for line in tex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line)


def test_a_number_of_other_pictures_or_another_network_says_so(tmp_path):
    folder = write_run(tmp_path / "a", [50.0], "table3_voc")
    instead = [
        "experiment=table3_voc",
        "dataset=folder",
        "dataset.path=x",
        "network=torchvision",
        "network.name=resnet18",
    ]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(instead))
    table = make_table("table3", yaml.safe_load(PAPER.read_text())["tables"]["table3"], find_runs([tmp_path]))
    expected = "50.0 (dataset=folder, network=torchvision, network.name=resnet18)"
    assert table.cells["voc", "fixed"].ours_text == expected


def test_counts_of_networks_are_shown_where_they_are_known():
    """Results of before have no `networks_chose`, and those of sets count values as networks."""

    def text(test, **result):
        return Measured([Run("", {"test": test, **result})]).networks_text

    assert text({"networks": 6, "networks_chose": 2}, use={}) == "6 (2 chose)"
    assert text({"networks": 6, "networks_chose": None}, use={}) == "6"
    assert text({"networks": None, "networks_chose": None}, use={}) == ""  # K-NN
    assert text({"networks": 200}) == "200"  # an older run of dd-distill
    assert text({"networks": 2000}, use={}) == ""  # an older run of dd-evaluate
    assert text({}) == ""


def test_the_papers_numbers_are_the_papers():
    """Every mean and std of Tables 1 to 3, column by column, as printed."""
    tables = yaml.safe_load(PAPER.read_text())["tables"]
    printed = {
        ("table1", "mnist"): "96.6 79.5±8.1 68.6±9.8 73.0±7.6 76.4±9.5 77.1±2.7 71.5±2.1 92.2±0.1",
        ("table1", "cifar10"): "54.0 36.8±1.2 21.3±1.5 23.4±1.3 22.5±3.1 22.3±0.7 18.8±1.3 29.4±0.3",
        ("table2", "m2u"): "97.9 95.4±1.8 94.9±0.8 95.2±0.7 92.2±1.6 93.9±0.8 96.7±0.5 90.4±3.0 97.3±0.3",
        ("table2", "u2m"): "93.2 92.7±1.4 87.1±2.9 87.6±2.1 85.6±3.1 78.4±5.0 89.2±2.4 67.5±3.9 98.6±0.5",
        ("table2", "s2m"): "96.2 85.2±4.7 84.6±2.1 85.2±1.2 85.8±1.2 74.9±2.6 74.0±1.5 51.6±2.8 98.6±0.5",
        ("table3", "voc"): "70.75 19.41±3.73 23.82±3.66 9.94 75.57±0.18",
        ("table3", "cub"): "38.76 7.11±0.66 7.23±0.78 2.88 41.21±0.51",
    }
    for (table, row), text in printed.items():
        cells = tables[table]["rows"][row]["cells"]
        assert list(cells) == list(tables[table]["columns"])
        assert " ".join(f"{c['mean']}" + (f"±{c['std']}" if "std" in c else "") for c in cells.values()) == text


def line(*values):
    return {float(x): Measured([Run("", {"test": {"accuracies": [v]}})]) for x, v in enumerate(values)}


def test_claims_hold_or_the_report_says_they_do_not():
    assert rises({"A": line(50, 60, 70), "B": line(70, 60)}) == {
        "A": "it rises (50.0 to 70.0)",
        "B": "it does not rise (70.0 to 60.0)",
    }
    levels = rises_and_levels_off({"A": line(50, 60, 62), "B": line(50, 52, 62), "C": line(50, 50)})
    assert "levels off" in levels["A"]
    assert "does not level off" in levels["B"]
    assert "does not rise" in levels["C"]
    five = {"M, one step": line(50, 60), "M, many steps": line(70, 60)}
    assert many_beat_one(five) == {"M": "many steps beat one at 1 of 2 numbers of images"}


class Checker(HTMLParser):
    """Collects what a screen reader and a machine without a network need."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.figures, self.captions, self.tables, self.ids, self.links = [], 0, 0, 0, 0, [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "img":
            self.images += 1
            assert attributes["alt"]
            assert attributes["src"].startswith("data:image/png;base64,")
        assert tag not in ("script", "link", "iframe")
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"
        self.tables += tag == "caption"
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "colgroup")
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command_writes_tables_figures_and_a_page_that_needs_nothing_else(run, tmp_path):
    write_everything(tmp_path / "runs")
    code, error, _ = run("report")
    assert (code, error) == (0, "")
    folder = tmp_path / "runs" / "report"
    for key in ("fig2a", "fig2b", "fig3a", "fig3b", "fig4a", "fig4b", "fig5", "fig6"):
        assert (folder / f"{key}.png").stat().st_size > 1000
        assert (folder / f"{key}.pdf").read_bytes().startswith(b"%PDF")
    with (folder / "table2.csv").open() as file:
        rows = {(r["row"], r["column"]): r for r in csv.DictReader(file)}
    assert float(rows["m2u", "kmeans"]["difference"]) == pytest.approx(0.5)
    assert (rows["m2u", "kmeans"]["networks"], rows["m2u", "kmeans"]["networks_chose"]) == ("8", "2")
    assert rows["m2u", "kmeans"]["stored_numbers"] == "78430"
    assert rows["m2u", "random_real"]["networks_chose"] == rows["s2m", "kmeans"]["mean"] == ""
    text = (folder / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.images == checker.figures == checker.captions > 8
    assert checker.tables == 7 + 5  # of the paper, and of the field
    assert len(set(checker.ids)) == len(checker.ids)
    assert {link[1:] for link in checker.links} <= set(checker.ids)
    assert "://" not in text
    assert "dd-evaluate sweep=table2_baselines row=s2m column=kmeans" in text
    assert '<td class="count">8 (2\u00a0chose)</td><td>78,430</td>' in text
    assert "<dt>Stored numbers</dt><dd>15,686</dd>" in text  # of a result that does not say, counted in its file
    assert "<dt>Networks</dt><dd>8 (2 chose)</dd>" in text
    assert "Networks: 1 (1 chose).</figcaption>" in text
    assert "learning rate learned, epochs 3; chosen on the test set: +0.4" in text


def test_a_report_of_nothing_names_every_command(run, tmp_path):
    (tmp_path / "runs").mkdir()
    code, error, _ = run("report")
    assert (code, error) == (0, "")
    text = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "0 of 53 numbers" in text
    for sweep in ("table1_baselines", "table2_baselines", "fig4a_steps", "fig4b_epochs", "fig5_steps_vs_batch"):
        assert f"sweep={sweep}" in text


@pytest.mark.parametrize("wrong", ["nowhere", "truncated"])
def test_wrong_folders_in_one_line(run, tmp_path, wrong):
    if wrong == "truncated":
        (write_run(tmp_path / "runs" / "a", [1.0]) / "result.json").write_text('{"test":')
    code, error, _ = run("report", *(["folders=[nowhere]"] if wrong == "nowhere" else []))
    assert code == 1
    assert error.startswith("dd-report: error: ")
    assert ("nowhere" if wrong == "nowhere" else "result.json is truncated") in error
    assert "Traceback" not in error


def test_stored_numbers_are_of_what_was_tested(tmp_path):
    """The card of a part of a set is that of the whole, and older results of parts do not say how large they are."""

    def numbers(**result):
        return Run(tmp_path, {"test": {}, **result}).stored_numbers

    assert numbers(card={"stored_numbers": 10}) == 10
    assert numbers(card={"stored_numbers": 10}, use={"choice": "training"}) is None
    assert numbers(card={"stored_numbers": 10}, use={"choice": "training"}, stored_numbers=2) == 2
    assert numbers(card={"stored_numbers": 10}, use={"choice": "ordinary", "stored_numbers": 3}) == 3


CONTROL = {"accuracy_mean": 50.0, "accuracy_std": 1.0, "images": 10, "stored_numbers": 7840}
ORDINARY = {
    "choice": "ordinary",
    "images": 10,
    "stored_numbers": 7841,
    "labels": "hard",
    "controls": {"random": CONTROL},
}
ORDINARY |= {"protocol": {"optimizer": "sgd", "epochs": 3}, "learning_rate": 0.01}
ODD_USES: list[dict] = [{"images": "ten"}, {"protocol": 3}, {"along": {"accuracy": 3}}, {"sets_chosen": {"of": "all"}}]
ODD_USES += [{"controls": {"random": entry}} for entry in (3, CONTROL | {"accuracy_mean": "high"}, {"images": 10})]
ODD_USES += [{"along": {"epochs": [0, 1], "accuracy": [10.0, 50.0]}}]  # which the control lacks


def test_a_result_as_a_run_writes_it_is_none_of_these():
    assert other_kinds({"name": "a", "test": {"accuracies": [1.0]}, "use": ORDINARY}) == []
    assert other_kinds({"name": "a", "test": {"accuracies": [1.0]}, "use": {"choice": "ordinary"}}) == [
        f"use.{key}" for key in ("images", "stored_numbers", "labels", "protocol", "controls")
    ]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("test", 3),
        ("test", {"accuracies": []}),
        ("test", {"accuracies": [1.0, "text"]}),
        ("test", {"accuracies": [float("nan")]}),
        ("name", None),
        ("card", []),
        ("use", "grid"),
        ("outer_steps", "many"),
        ("set", 3),
        ("prefixes", 3),
        ("prefixes", True),
        ("prefixes", [3]),
        ("prefixes", [{"images_per_class": 1, "networks": 2, "accuracy_mean": "high", "accuracy_std": 1.0}]),
        ("settings", None),
        ("seconds", "long"),
        ("row", ["mnist"]),
        ("card", {"dataset": "mnist"}),
        ("test", {"accuracies": [1.0], "measures": 3}),
        *(("use", ORDINARY | changed) for changed in ODD_USES),
    ],
)
def test_a_result_that_no_run_writes_is_left_out_by_name(tmp_path, caplog, part, value):
    kept = write_run(tmp_path / "kept", [50.0])
    path = write_run(tmp_path / "odd", [60.0]) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    assert [run.folder for run in find_runs([tmp_path])] == [kept]
    assert f"{path} is left out: {part}" in caplog.text


@pytest.mark.parametrize("file", ["config", "overrides"])
@pytest.mark.parametrize("content", ["[", "3"])
def test_a_record_that_is_none_is_named(tmp_path, file, content):
    folder = write_run(tmp_path / "odd", [60.0])
    path = folder / ".hydra" / f"{file}.yaml"
    path.write_text(content)
    (run,) = find_runs([tmp_path])
    with pytest.raises(ValueError, match="is not what a run writes") as error:
        _ = run.config, run.overrides
    assert str(path) in str(error.value)
