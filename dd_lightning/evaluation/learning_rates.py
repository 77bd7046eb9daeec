"""Learning rates alone, by the outer loop that learns images (Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dd_lightning.data import RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.init import Init
from dd_lightning.networks import predict
from dd_lightning.objectives import Objective
from dd_lightning.system.workers import Result
from dd_lightning.unroll import Draws, Unroll


def learn_rates(
    sets: Sequence[DistilledData],
    network: nn.Module,
    init: Init,
    unroll: Unroll,
    objective: Objective,
    data: RealData,
    outer_steps: int,
    step_size: float,
) -> Result:
    """The η̃ that suit all sets: Algorithm 1 with the images left as they are, every outer step on the next set.

    Args:
        sets: their learning rates are the start.
        step_size: of Adam on the raw learning rates, brought down to zero along a cosine.

    Returns:
        `raw`, [epoch, step]: the learning rates before the softplus, their mean over the second half of the outer
        steps. The best rates lie close to those that diverge, where a single network can throw the last ones off.
    """
    device = data.train.labels.device
    raw = sets[0].raw_learning_rates.to(device, copy=True).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=step_size, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, outer_steps)
    late = []
    for step in range(outer_steps):
        images, labels = data.minibatch(step)  # x_t, line 3
        distilled = replace(sets[step % len(sets)].to(device), raw_learning_rates=raw)
        theta_T = unroll(network, init.sample(network, step), distilled.steps(Draws(0, (step,))))  # line 6
        loss = objective(predict(network, theta_T, images), labels)  # line 7
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the outer loss is {loss.item()} while learning rates, at outer step {step}")
        optimizer.zero_grad()
        loss.backward(inputs=[raw])
        nn.utils.clip_grad_norm_(raw, 1.0)
        optimizer.step()
        schedule.step()
        if 2 * step + 1 >= outer_steps:
            late.append(raw.detach().clone())
    return {"raw": torch.stack(late).mean(0).cpu().numpy()}
