"""Reference column of Table 3: a network trained on all target pictures, from the weights that the data start from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dd_lightning.data import Pictures, RealData
from dd_lightning.evaluation.evaluator import Evaluation, Learner, Outcome, held_out_result
from dd_lightning.evaluation.grid import check_different, choice
from dd_lightning.evaluation.ordinary import Protocol, judged_at, trained_on
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, derive_seed
from dd_lightning.system.workers import Pieces, Result


class FineTuning:
    """Trains on all training pictures, several times, at the best of several learning rates.

    The rate is chosen by one run on validation pictures; what choosing on the test set would have brought is told as
    `gap`. Runs differ in the order of the minibatches and their augmentation, and in the network where the init has
    several.

    Args:
        learning_rates: to choose from.
        runs: that are tested.
        seed: of the runs.
        **protocol: as in `Protocol`.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    def __init__(self, learning_rates: Sequence[float], runs: int = 10, seed: int = 0, **protocol: Any) -> None:
        check_different(learning_rates=learning_rates)
        check_positive(**{f"learning_rates[{i}]": rate for i, rate in enumerate(learning_rates)})
        check_count(runs=runs)
        self.learning_rates, self.runs = list(learning_rates), runs
        self.protocol = Protocol(seed=seed, **protocol)

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        common = (evaluation.learner, evaluation.data, self.protocol)
        details: dict[str, Any] = {}
        rate, chose = self.learning_rates[0], None
        if len(self.learning_rates) > 1:
            pictures, chose = [evaluation.data.validation, evaluation.data.test], 1
            pieces: Pieces = {
                f"rate{rate}": (*common, rate, 0, 1, Stream.HELD_OUT_VALIDATION, pictures)
                for rate in self.learning_rates
            }
            results = evaluation.workers.map("choosing the rate", fine_tune, pieces).values()
            means = [next(iter(result.values()))[:, 0, -1] for result in results]
            validation, test = ({"accuracy": np.array([mean[part] for mean in means])} for part in (0, 1))
            index, details = choice([{"learning_rate": rate} for rate in self.learning_rates], validation, test)
            rate = self.learning_rates[index]
            details |= {"networks_chose": 1, "pictures_chose": len(evaluation.data.validation)}
        networks = evaluation.learner.init.num_distinct(self.runs, evaluation.stream)
        pieces = {
            f"run{run}": (*common, rate, run, networks, evaluation.stream, [evaluation.pictures])
            for run in range(self.runs)
        }
        results = evaluation.workers.map("fine-tuning", fine_tune, pieces)
        result = held_out_result({run: {name: v[0] for name, v in found.items()} for run, found in results.items()})
        details |= {"runs": self.runs, "learning_rate": rate, "protocol": vars(self.protocol)}
        return Outcome(result, details, [], networks, chose)


def fine_tune(
    learner: Learner,
    data: RealData,
    protocol: Protocol,
    learning_rate: float,
    run: int,
    networks: int,
    stream: Stream,
    parts_of_pictures: list[Pictures],
) -> Result:
    """A network judged before and after it was trained on all training pictures; runs take the networks in turn.

    Returns:
        Each measure in %, [pictures, network, point], of the one network.
    """
    index = run % networks
    (theta,) = learner.held_out(networks, stream, slice(index, index + 1))
    own = data.reseeded(derive_seed(protocol.seed, Stream.ORDINARY, int(stream), run))
    own.batch_size = protocol.batch_size
    per_epoch = own.batches_per_epoch
    first = data.preprocessing(data.train[torch.arange(2)].images.to(data.train.labels.device))
    after = trained_on(
        learner.network,
        theta,
        lambda epoch: own.minibatches(epoch * per_epoch, (epoch + 1) * per_epoch),
        first,
        learning_rate,
        protocol,
    )
    return judged_at(learner, [theta, after], parts_of_pictures)
