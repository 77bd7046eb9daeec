"""Networks that torchvision publishes: last layer, gradients, weights of files, and data for them."""

import json
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models._api import BUILTIN_MODELS

from dd_lightning.distilled import OTHERS, DistilledData
from dd_lightning.evaluation import FineTuning
from dd_lightning.init import FixedInit, FixedPretrainedInit
from dd_lightning.networks import TorchvisionNetwork, check_network, predict, unstack
from dd_lightning.sources import Sets
from dd_lightning.system.seeding import Stream
from dd_lightning.unroll import AdjointUnroll, FunctionalUnroll, HigherUnroll
from dd_lightning.unroll.choice import single_gradient
from dd_lightning.unroll.layered import PlainGradient

ENGINES = [
    FunctionalUnroll,
    pytest.param(AdjointUnroll, id="batched"),
    pytest.param(lambda: AdjointUnroll(batched=False), id="looped"),
    pytest.param(lambda: AdjointUnroll(batched=False, recompute=True), id="recompute"),
]


class SmallAlexNet(nn.Module):
    """AlexNet as torchvision lays it out, an eighth as wide."""

    def __init__(self):
        super().__init__()
        pool, relu = lambda: nn.MaxPool2d(3, 2), lambda: nn.ReLU(inplace=True)
        first = nn.Conv2d(3, 8, 11, 4, 2), relu(), pool(), nn.Conv2d(8, 24, 5, padding=2), relu(), pool()
        last = nn.Conv2d(24, 48, 3, padding=1), relu(), nn.Conv2d(48, 32, 3, padding=1), relu(), pool()
        self.features, self.avgpool = nn.Sequential(*first, *last), nn.AdaptiveAvgPool2d(2)
        layers = nn.Dropout(), nn.Linear(128, 32), relu(), nn.Dropout(), nn.Linear(32, 32), relu(), nn.Linear(32, 1000)
        self.classifier = nn.Sequential(*layers)

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@pytest.fixture(autouse=True)
def small_alexnet(monkeypatch):
    """torchvision knows it as its own."""

    def build(weights=None):
        return SmallAlexNet()

    build.__module__ = f"{models.__name__}.alexnet"
    monkeypatch.setitem(BUILTIN_MODELS, "small_alexnet", build)


def made(name, tmp_path, classes=3, size=64):
    """A network with weights from a file, drawn as torchvision does but for BatchNorm's statistics."""
    torch.manual_seed(0)
    published = models.get_model(name, weights=None)
    for module in published.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / f"{name}.safetensors"
    save_file(published.state_dict(), path)
    return TorchvisionNetwork(name, str(path), 3, size, classes), published, path


def data_of(network, size=64, classes=3, rate=0.1):
    """θ₀, and three steps on an image a class."""
    theta = FixedPretrainedInit(None).sample(network, 0)
    images = torch.randn(1, classes, 3, size, size, generator=torch.Generator().manual_seed(1))
    return theta, DistilledData.create(images.to(next(iter(theta.values()))), torch.arange(classes)[None], 3, rate)


NETWORKS = [("small_alexnet", 64, "module.classifier.6"), ("squeezenet1_1", 32, "module.classifier.1")]
NETWORKS += [("shufflenet_v2_x0_5", 32, "module.fc")]


@pytest.mark.parametrize(("name", "size", "head"), NETWORKS)
def test_a_new_last_layer_says_nothing_and_is_all_that_the_first_step_moves(name, size, head, tmp_path):
    network, published, _ = made(name, tmp_path, 5, size)
    assert network.head == head
    assert torch.equal(network(torch.randn(2, 3, size, size)), torch.ones(2, 5))
    theta, data = data_of(network, size, 5)
    (first, second, _) = (unstack(theta)[0] for theta in FunctionalUnroll().trajectory(network, theta, data.steps()))
    start = unstack(theta)[0]
    of_head = {f"{head}.weight", f"{head}.bias"}
    # One image a class: biases that are equal stay so.
    torch.testing.assert_close(first[f"{head}.bias"], start[f"{head}.bias"])
    assert {n for n, value in first.items() if not torch.equal(value, start[n])} - {f"{head}.bias"} == {
        f"{head}.weight"
    }
    assert {n for n, value in second.items() if not torch.equal(value, first[n])} - of_head
    state = published.state_dict()
    for parameter, value in start.items():
        if parameter not in of_head:
            assert torch.equal(value, state[parameter.removeprefix("module.")])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "size"), [one[:2] for one in NETWORKS])
def test_every_engine_has_the_gradient_of_higher(engine, name, size, tmp_path):
    network = made(name, tmp_path, 3, size)[0].double()
    theta, data = data_of(network, size)
    pictures = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [data.images.requires_grad_(), data.raw_learning_rates.requires_grad_()]
    before = {n: value.clone() for n, value in network.state_dict().items()}

    def gradients(engine):
        logits = predict(network, engine(network, theta, data.steps()), pictures)[0]
        return torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])), parameters)

    for one, other in zip(gradients(engine()), gradients(HigherUnroll()), strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-8 * other.norm()
    assert all(torch.equal(value, before[n]) for n, value in network.state_dict().items())


def test_alexnet_is_unrolled_by_rules_for_its_layers(tmp_path):
    network = made("small_alexnet", tmp_path)[0]
    theta, data = data_of(network)
    assert isinstance(single_gradient(network, theta, data.images[0]), PlainGradient)


def test_statistics_are_frozen_and_nothing_drops_out(tmp_path):
    network, published, _ = made("shufflenet_v2_x0_5", tmp_path, 1000, 32)
    with torch.no_grad():
        network.get_submodule(network.head).load_state_dict(published.fc.state_dict())
    check_network(network, (3, 32, 32), 1000)  # which refuses what training changes
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(network.train()(x), published.eval()(x))
    assert not network.module.conv1[1].training
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("last", ["published", "of 7 classes", "none"])
def test_weights_of_a_file_with_any_last_layer(suffix, last, tmp_path):
    published = SmallAlexNet()
    if last == "of 7 classes":
        published.classifier[6] = nn.Linear(32, 7)
    state = published.state_dict()
    if last == "none":
        state = {name: value for name, value in state.items() if not name.startswith("classifier.6")}
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    network = TorchvisionNetwork("small_alexnet", str(path), 3, 64, 3)
    assert torch.equal(network.module.classifier[1].weight, published.classifier[1].weight)
    assert network.module.classifier[6].weight.shape == (3, 32)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_files_that_are_no_weights_of_this_network(tmp_path, capsys):
    path = tmp_path / "weights.pt"

    def refused(content):
        torch.save(content, path)
        with pytest.raises(ValueError, match="weights") as caught:
            TorchvisionNetwork("small_alexnet", str(path), 3, 64, 3)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "another network than small_alexnet: it lacks conv1.weight" in refused({"conv1.weight": torch.ones(1)})
    state = SmallAlexNet().state_dict()
    state["features.0.weight"] = torch.ones(8, 3, 3, 3)
    assert "features.0.weight is [8, 3, 3, 3], and [8, 3, 11, 11] here" in refused(state)
    del state["features.0.weight"]
    assert "it has, and they lack, features.0.weight" in refused(state)
    assert "no state dictionary of tensors" in refused({"epoch": 3})
    assert "no state dictionary, or would run code" in refused({"x": Evil()})
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="no state dictionary"):
        TorchvisionNetwork("small_alexnet", str(path), 3, 64, 3)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no file of weights at nowhere"):
        TorchvisionNetwork("small_alexnet", "nowhere", 3, 64, 3)


def test_weights_without_the_statistics_of_batch_norm_are_refused(tmp_path):
    _, published, path = made("shufflenet_v2_x0_5", tmp_path, 3, 32)
    state = {name: value for name, value in published.state_dict().items() if "running_var" not in name}
    save_file(state, path)
    with pytest.raises(ValueError, match=r"it has, and they lack, conv1\.1\.running_var"):
        TorchvisionNetwork("shufflenet_v2_x0_5", str(path), 3, 32, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "alexnett"}, r"no classifier 'alexnett'; did you mean alexnet\?"),
        ({"name": 3}, "no classifier 3"),
        ({"name": "squeezenet1_1", "image_size": 8}, "squeezenet1_1 does not take pictures of 8 pixels"),
        ({"name": "squeezenet1_1", "in_channels": 1}, "takes pictures of 3 channels, not 1: dataset.channels=3"),
    ],
)
def test_networks_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionNetwork(**{"weights": None, "image_size": 64, "num_classes": 3} | settings)


def test_published_weights_come_from_torchvisions_cache_or_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"squeezenet1_1 could not be downloaded.*no route.*network.weights=FILE"
    ):
        TorchvisionNetwork("squeezenet1_1", num_classes=3, image_size=32)
    _, published, _ = made("squeezenet1_1", tmp_path, 3, 32)
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    network = TorchvisionNetwork("squeezenet1_1", num_classes=3, image_size=32)
    assert torch.equal(network.module.features[0].weight, published.features[0].weight)
    assert network.source == "squeezenet1_1 with weights default"


def test_the_last_layer_of_a_pretrained_network_may_be_drawn(tmp_path):
    network, _, _ = made("small_alexnet", tmp_path)
    weight = f"{network.head}.weight"
    zeros, one, again, other = (
        FixedPretrainedInit(None, **settings).weights(network)
        for settings in ({}, {"head": "random"}, {"head": "random"}, {"head": "random", "seed": 1})
    )
    assert not zeros[weight].any()
    assert torch.equal(one[weight], again[weight])
    assert one[weight].std().item() == pytest.approx((2 / (32 + 3)) ** 0.5, rel=0.3)
    assert not torch.equal(one[weight], other[weight])
    assert all(torch.equal(zeros[name], one[name]) for name in zeros if name != weight)
    assert not network.get_parameter(weight).any()
    held_out = list(FixedPretrainedInit(None, head="random").held_out(network, 9, Stream.HELD_OUT_TEST))
    assert len(held_out) == 1


def test_what_a_pretrained_init_refuses(tmp_path):
    init = FixedPretrainedInit(None)
    with pytest.raises(ValueError, match=r"init\.population=NAME_OR_PATH"):
        init.check(SmallAlexNet(), (3, 64, 64), 3)
    with pytest.raises(ValueError, match=r"network\.weights=null brings no weights"):
        init.check(TorchvisionNetwork("small_alexnet", None, 3, 64, 3), (3, 64, 64), 3)
    with pytest.raises(ValueError, match="unknown head 'ones'; choose one of zeros, random"):
        FixedPretrainedInit(None, head="ones")


def test_data_name_the_weights_that_they_start_from_and_keep_the_last_layer_alone(tmp_path):
    network, _, path = made("small_alexnet", tmp_path)
    _, data = data_of(network)
    init = FixedPretrainedInit(None, head="random")
    kept, others = init.kept(network)
    assert set(kept) == network.of_head
    assert others["of"] == f"small_alexnet with weights {path.name}"
    data = DistilledData(data.images, data.labels, data.raw_learning_rates, {OTHERS: others}, kept)
    data.save(tmp_path / "distilled.safetensors")
    loaded = DistilledData.load(tmp_path)
    expected = unstack(FunctionalUnroll()(network, init.sample(network, 0), data.steps()))[0]
    again = TorchvisionNetwork("small_alexnet", str(path), 3, 64, 3)
    trained = dict(loaded.train(again).named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value)
    restored = FixedInit(weights=loaded.initial_weights, others=loaded.card[OTHERS])
    fresh = TorchvisionNetwork("small_alexnet", str(path), 3, 64, 3)
    restored.check(fresh, (3, 64, 64), 3)
    assert all(torch.equal(value, init.weights(network)[name]) for name, value in restored.weights(fresh).items())
    for wrong in (again, TorchvisionNetwork("small_alexnet", None, 3, 64, 3)):
        with pytest.raises(ValueError, match=r"start from small_alexnet with weights .* has other weights"):
            loaded.train(wrong)
        with pytest.raises(ValueError, match="has other weights"):
            FixedInit(weights=loaded.initial_weights, others=loaded.card[OTHERS]).check(wrong, (3, 64, 64), 3)


@pytest.fixture
def photos(packed, tmp_path, monkeypatch):
    """What commands need: pictures of 32 pixels, and squeezenet1_1 with weights of a file."""
    monkeypatch.chdir(tmp_path)
    packed("photos", size=32, channels=3)
    made("squeezenet1_1", tmp_path, 3, 32)
    network = ("network=torchvision", "network.name=squeezenet1_1", "network.weights=squeezenet1_1.safetensors")
    return ("dataset=packed", "dataset.path=photos.npz", "dataset.validation=10", *network, "init=fixed_pretrained")


def other_weights(path):
    torch.manual_seed(1)
    save_file(models.squeezenet1_1().state_dict(), path)


SHORT = ("unroll=functional", "trainer.max_steps=1", "batch_size=8", "distilled.learning_rate=0.001")


def test_data_of_a_run_say_which_weights_they_are_for(run, photos, tmp_path):
    code, error, folder = run("distill", *photos, *SHORT, "piece=3", "init.head=random")
    assert (code, error) == (0, "")
    data = DistilledData.load(folder)
    assert data.initial_weights is not None
    assert set(data.initial_weights) == {"module.classifier.1.weight", "module.classifier.1.bias"}
    assert data.card[OTHERS]["of"] == "squeezenet1_1 with weights squeezenet1_1.safetensors"
    result = json.loads((folder / "result.json").read_text())["test"]
    code, error, again = run("evaluate", f"distilled.path={folder}", "use.controls=[]")
    assert (code, error) == (0, "")
    assert json.loads((again / "result.json").read_text())["test"] == result
    (tmp_path / "squeezenet1_1.safetensors").rename("elsewhere.safetensors")
    code, error, _ = run("evaluate", f"distilled.path={folder}")
    assert (code, "no file of weights at squeezenet1_1.safetensors" in error) == (1, True)
    line = (f"distilled.path={folder}", "use.controls=[]", *photos[3:5], "network.weights=elsewhere.safetensors")
    code, error, again = run("evaluate", *line)
    assert (code, error) == (0, "")
    assert json.loads((again / "result.json").read_text())["test"] == result
    other_weights("elsewhere.safetensors")
    code, error, _ = run("evaluate", *line)
    assert code == 1
    assert "from squeezenet1_1 with weights squeezenet1_1.safetensors, and this network has other weights" in error
    assert error.count("\n") <= 1


def test_data_name_the_file_of_weights_and_no_folder(run, photos, tmp_path):
    elsewhere = tmp_path / "of the owner"
    elsewhere.mkdir()
    Path("squeezenet1_1.safetensors").rename(elsewhere / "squeezenet1_1.safetensors")
    where = f"network.weights='{elsewhere}/squeezenet1_1.safetensors'"
    code, error, folder = run("distill", *photos, *SHORT, where)
    assert (code, error) == (0, "")
    assert DistilledData.load(folder).card["network"]["weights"] == "squeezenet1_1.safetensors"
    assert b"of the owner" not in (folder / "distilled.safetensors").read_bytes()
    code, error, _ = run("evaluate", f"distilled.path={folder}", "use.controls=[]")
    assert code == 1
    assert (
        "no file of weights at squeezenet1_1.safetensors; say where it is: network=torchvision network.name=" in error
    )
    assert run("evaluate", f"distilled.path={folder}", "use.controls=[]", *photos[3:5], where)[:2] == (0, "")


def test_a_run_goes_on_with_the_same_weights_alone(run, photos):
    code, error, folder = run("distill", *photos, *SHORT)
    assert (code, error) == (0, "")
    Path("squeezenet1_1.safetensors").rename("same.safetensors")
    line = (*photos, *SHORT, "trainer.max_steps=2", f"resume={folder}", "network.weights=same.safetensors")
    other_weights("other.safetensors")
    code, error, _ = run("distill", *line[:-1], "network.weights=other.safetensors")
    assert (code, "another config: network.weights" in error) == (1, True)
    code, error, _ = run("distill", *line)
    assert (code, error) == (0, "")


BAD = {
    "network.name=squeezenet1_2": "torchvision has no classifier 'squeezenet1_2'; did you mean squeezenet1_",
    "network.name=alexnet dataset.image_size=64": "holds the weights of another network than alexnet: it lacks",
    "network.weights=photos.npz": "photos.npz is no state dictionary",
    "network.weights=null": "network.weights=null brings no weights to start from",
    "dataset.image_size=8": "squeezenet1_1 does not take pictures of 8 pixels",
    "dataset.channels=1": "squeezenet1_1 takes pictures of 3 channels, not 1: dataset.channels=3",
    "init.head=ones": "init: unknown head 'ones'; choose one of zeros, random",
    "piece=0": "piece must be a whole number of at least 1, not 0",
    "network=lenet": "say which trained networks: init.population=NAME_OR_PATH",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_in_one_line(run, photos, overrides):
    line = [o for o in photos if not (overrides == "network=lenet" and o.startswith("network"))]
    code, error, _ = run("distill", *line, *SHORT, *overrides.split())
    assert code == 1
    assert BAD[overrides] in error
    assert error.startswith("dd-distill: error: ")
    assert error.count("\n") <= 1


def test_fine_tuning_trains_on_all_pictures_at_the_best_rate(evaluation):
    fine_tuning = FineTuning([0.0001, 0.1], runs=2, epochs=2, batch_size=8)
    outcome, again = (fine_tuning(evaluation, Sets([])) for _ in range(2))
    assert outcome.details["learning_rate"] == 0.1
    assert (outcome.networks, outcome.networks_chose) == (2, 1)
    assert outcome.result.accuracies.shape == (2, 2)
    assert outcome.result.mean > outcome.result.before + 20
    assert torch.equal(outcome.result.accuracies, again.result.accuracies)
    alone = FineTuning([0.1], runs=1)(evaluation, Sets([]))
    assert (alone.networks_chose, "chosen" in alone.details) == (None, False)


def test_runs_of_one_network_differ_in_their_minibatches(run, photos):
    line = ("distilled=none", "use=fine_tuning", "use.runs=3", "use.epochs=2", "use.learning_rates=[0.01]")
    code, error, folder = run("evaluate", *photos, *line, "use.batch_size=8")
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert (len(result["test"]["accuracies"]), result["test"]["networks"]) == (3, 1)
    assert result["use"]["runs"] == 3
