"""How good distilled data are for ordinary training, beside controls that had the same training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dd_lightning.data import Pictures
from dd_lightning.evaluation.controls import CONTROLS, OWN, Contender, contenders, entry
from dd_lightning.evaluation.evaluator import Evaluation, Outcome, held_out_result
from dd_lightning.evaluation.grid import check_different, choice, share
from dd_lightning.evaluation.heldout import HeldOutResult, count_choosing
from dd_lightning.evaluation.ordinary import ALONG, Protocol, judge_trained
from dd_lightning.evaluation.scores import scores
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_choice, check_count, check_positive
from dd_lightning.system.seeding import Stream
from dd_lightning.system.workers import Pieces, Result

SEEN = 1000  # validation pictures on which accuracy during training is measured
Chosen = tuple[float, dict[str, Any]]  # a learning rate, and what `result.json` says of all


class Ordinary:
    """Images as ordinary training data of fresh networks, at the best of several learning rates, beside controls.

    The rate is chosen on validation pictures, with networks held out for it; what choosing on the test set would have
    brought, as in published numbers, is told as `gap`. Every control chooses its own rate in the same way. Networks
    are dealt over the sets, and so are those that choose. The accuracy during training is told as `along`, on
    validation pictures.

    Args:
        learning_rates: to choose from.
        choosing: networks that choose; with one learning rate there is nothing to choose.
        controls: which stand beside the number: `random` (as many random real images as their numbers are stored, in
            five sets), `hard` (the same images with their classes, where labels were learned), `whole` (all training
            pictures: costly), `unaugmented` (own and random without augmentation, where there is one).
        whole_epochs: of the control `whole`.
        seed: of minibatches, augmentation and random images.
        **protocol: as in `Protocol`.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    def __init__(
        self,
        learning_rates: Sequence[float] = (0.01,),
        choosing: int = 5,
        controls: Sequence[str] = ("random", "hard"),
        whole_epochs: int = 30,
        seed: int = 0,
        **protocol: Any,
    ) -> None:
        check_different(learning_rates=learning_rates)
        check_positive(**{f"learning_rates[{i}]": rate for i, rate in enumerate(learning_rates)})
        check_count(choosing=choosing, whole_epochs=whole_epochs)
        if isinstance(controls, str):
            raise ValueError(f"controls must be a list, such as [{controls}], not {controls}")
        for control in controls:
            check_choice("control", control, CONTROLS)
        self.learning_rates, self.choosing, self.controls = list(learning_rates), choosing, list(controls)
        self.protocol = Protocol(seed=seed, **protocol)
        self.whole = replace(self.protocol, epochs=whole_epochs)

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        if evaluation.learner.init.fixed:
            raise ValueError("use=ordinary trains fresh networks, and here is one fixed network: add init=random")
        if sets.keep is not None or not sets.members:
            raise ValueError(
                "use=ordinary takes all sets that there are: distilled=random_real or kmeans, for instance"
            )
        compared = contenders(evaluation, sets.members, self.controls, self.protocol, self.whole)
        chosen, chose = self.choose(evaluation, compared)
        results, along = self.test(evaluation, compared, {name: rate for name, (rate, _) in chosen.items()})
        entries = {name: about(one, results[name], chosen[name], along[name]) for name, one in compared.items()}
        means = {name: one["accuracy_mean"] for name, one in entries.items()}
        own, soft = entries.pop(OWN), sets.members[0].soft_labels is not None
        if not soft:
            means["hard"] = means[OWN]
        details = {
            "sets": len(sets.members),
            "protocol": vars(self.protocol),
            "images": own["images"],
            "labels": "soft" if soft else "hard",
            "stored_numbers": own["stored_numbers"],
            "learning_rate": own["learning_rate"],
            "along": own["along"],
            "controls": entries,
            "scores": scores(means),
        }
        if chose is not None:
            choosing = {"networks_chose": chose, "pictures_chose": len(evaluation.data.validation)}
            details |= chosen[OWN][1] | choosing
        return Outcome(results[OWN], details, sets.members, evaluation.tested, chose)

    def choose(self, evaluation: Evaluation, compared: dict[str, Contender]) -> tuple[dict[str, Chosen], int | None]:
        """The best rate of each contender on validation pictures, and how many networks chose."""
        if len(self.learning_rates) == 1:
            return {name: (self.learning_rates[0], {}) for name in compared}, None
        networks = count_choosing(evaluation.learner.init, self.choosing, "the learning rate")
        pictures = [evaluation.data.validation, evaluation.data.test]
        pieces: Pieces = {}
        for name, one in compared.items():
            for rate in self.learning_rates:
                common = (self.choosing, Stream.HELD_OUT_VALIDATION, pictures)
                pieces |= pieces_of(evaluation, name, one, rate, networks, *common)
        results = evaluation.workers.map("choosing rates", judge_trained, pieces)
        names = [{"learning_rate": rate} for rate in self.learning_rates]
        found = {}
        for name in compared:
            means = [accuracy_after(results, name, rate) for rate in self.learning_rates]
            validation, test = ({"accuracy": np.array([mean[part] for mean in means])} for part in (0, 1))
            index, details = choice(names, validation, test)
            found[name] = self.learning_rates[index], details
        return found, networks

    def test(
        self, evaluation: Evaluation, compared: dict[str, Contender], rates: dict[str, float]
    ) -> tuple[dict[str, HeldOutResult], dict[str, list[float]]]:
        """Every contender at its rate; and the mean accuracy of its networks along their training."""
        pieces: Pieces = {}
        for name, one in compared.items():
            common = (evaluation.networks, evaluation.stream, [evaluation.pictures])
            more = (*common, share(evaluation.data.validation, 0, SEEN))
            pieces |= pieces_of(evaluation, name, one, rates[name], one.networks, *more)
        results = evaluation.workers.map("training", judge_trained, pieces)
        found, along = {}, {}
        for name in compared:
            of_one = {piece: result for piece, result in results.items() if piece.startswith(f"{name}_rate")}
            along[name] = np.concatenate([result.pop(ALONG)[0] for result in of_one.values()]).mean(0).tolist()
            found[name] = held_out_result(
                {piece: {measure: values[0] for measure, values in result.items()} for piece, result in of_one.items()}
            )
        return found, along


def pieces_of(
    evaluation: Evaluation,
    name: str,
    contender: Contender,
    rate: float,
    count: int,
    networks: int,
    stream: Stream,
    pictures: list[Pictures],
    along: Pictures | None = None,
) -> Pieces:
    """A piece for each of the first `count` of so many networks, dealt over the sets."""
    found: Pieces = {}
    for index in range(count):
        examples = contender.sets[index % len(contender.sets)]
        training = (evaluation.learner, examples, rate, contender.protocol)
        found[f"{name}_rate{rate}_network{index}"] = (*training, index, networks, stream, pictures, along)
    return found


def accuracy_after(results: dict[str, Result], name: str, rate: float) -> Float[np.ndarray, " pictures"]:
    """Mean accuracy in % of a contender's networks at a rate, on each part of the pictures."""
    of_rate = [result for piece, result in results.items() if piece.startswith(f"{name}_rate{rate}_")]
    return np.concatenate([next(iter(result.values()))[:, :, -1] for result in of_rate], axis=1).mean(1)


def about(contender: Contender, result: HeldOutResult, chosen: Chosen, along: list[float]) -> dict[str, Any]:
    """What `result.json` says of a contender."""
    rate, details = chosen
    common = entry(contender.words, result, len(contender.sets), len(contender.sets[0]), contender.numbers)
    return common | {
        "networks": len(result.accuracies),
        "epochs": contender.protocol.epochs,
        "learning_rate": rate,
        "along": {"epochs": contender.protocol.judged, "accuracy": along},
        **({"gap": details["gap"]} if details else {}),
    }
