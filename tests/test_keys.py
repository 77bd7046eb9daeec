"""Names and kinds of settings, before anything is made of them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dd_lightning.commands.keys import check_sections, check_taken
from dd_lightning.data import Packed
from dd_lightning.parametrisation import Bases
from dd_lightning.system.checks import check_betas, check_not_negative
from dd_lightning.training import Growing
from dd_lightning.unroll import Adam, Momentum, ShuffledOrder

CONF = Path(__file__).parents[1] / "conf"
OTHER_KINDS = [
    ("images/bases", "coefficient_decay", "text", "must be a number, not 'text'"),
    ("images/bases", "count", [1], "must be a number, not [1]"),
    ("images/bases", "scale", None, "cannot be null"),
    ("grow/stages", "fraction", True, "must be a number, not True"),
    ("grow/stages", "stages", None, "cannot be null"),
    ("grow/stages", "stages", {"a": 1}, "must be a list"),
    ("order/shuffled", "inner_steps", None, "cannot be null"),
    ("order/shuffled", "inner_steps", {"a": 1}, "must be a number"),
    ("augment/dsa", "strategies", None, "cannot be null"),
    ("augment/flip_rotate", "degrees", "text", "must be a number, not 'text'"),
    ("unroll/adjoint", "recompute", "text", "must be true or false"),
    ("network/lenet", "num_classes", "text", "must be a number, not 'text'"),
    ("init/random_pretrained", "population", 3, "must be a text, not 3; in quotes: group.population='\"3\"'"),
    ("optimizer/sgd", "weight_decay", "text", "must be a number, not 'text'"),
    ("optimizer/sgd", "momentum", float("nan"), "must be finite, not nan"),
    ("optimizer/adam", "betas", [0.5, float("inf")], "must be finite"),
    ("schedule/cosine", "T_max", [3], "must be a number, not [3]"),
    ("schedule/step", "gamma", float("inf"), "must be finite, not inf"),
    ("use/ordinary", "learning_rates", 0.1, "must be a list"),
]


@pytest.mark.parametrize(("option", "key", "value", "message"), OTHER_KINDS)
def test_a_value_of_another_kind_is_refused_by_name(option, key, value, message):
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"), resolve=False)
    check_taken({"group": node})
    with pytest.raises(ValueError, match=f"group: {key} ") as caught:
        check_taken({"group": node | {key: value}})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (3, "budget has settings, such as budget.images_per_class, and cannot be 3"),
        (None, "budget has settings, such as budget.images_per_class, and cannot be None"),
        ({"number": 3}, "budget.number is no setting of dd-distill; did you mean budget.numbers?"),
    ],
)
def test_a_section_of_a_command_has_its_own_settings_alone(budget, message):
    check_sections({"budget": {"images_per_class": None, "numbers": 3}}, CONF, "distill")
    with pytest.raises(ValueError, match="budget") as caught:
        check_sections({"budget": budget}, CONF, "distill")
    assert str(caught.value) == message


ODD = [float("nan"), float("inf"), -1, "text", None, True, [0.5]]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: check_not_negative(value=value),
        lambda value: check_betas([0.5, value]),
        lambda value: check_betas(value),
        lambda value: Bases(coefficient_decay=value),
        lambda value: Growing([1, 2], fraction=value),
        lambda value: Momentum(value),
        lambda value: Adam(betas=(value, 0.9)),
        lambda value: ShuffledOrder(value),
    ],
)
def test_numbers_that_are_none_or_not_finite_are_refused(make, value):
    with pytest.raises(ValueError, match=r"must|cannot"):
        make(value)


@pytest.mark.parametrize(
    ("mean", "std"), [([None], [1.0]), (["text"], [1.0]), ([{"a": 1}], [1.0]), ([0.5], []), ({}, [1])]
)
def test_mean_and_std_are_lists_of_numbers(mean, std):
    with pytest.raises(ValueError, match="mean and std must be"):
        Packed("x.npz", mean=mean, std=std)
