"""What the trained networks θ_T should do on real data: the outer loss."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Classification:
    """Correct classification: the mean cross entropy over sampled networks and real images (Algorithm 1, line 7)."""

    def __call__(self, logits: Float[Tensor, "init batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
