"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709), over the global batch.

Every one of the 2B embeddings of a global batch is an anchor: its positive, the other view of the same image, is
scored by cosine similarity over temperature against all 2B - 1 other embeddings. A rank computes the mean over its own
anchors; the wrappers' average over ranks is then the loss of the global batch, with gradients through the gathered
keys as `scaler.collectives` describes.

Shapes: a anchors of this rank (both views), n keys of all ranks, d channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaler.collectives import World

_SCORES = 1 << 24  # scores held at a time: 64 MiB in fp32, whatever the batch


class NTXent(NamedTuple):
    """Scalars: `loss`, differentiable; `accuracy`, the share of anchors whose positive scores highest, ties not
    counted; `embedding_std`, √d times the mean deviation of a normalised embedding's channels: 1 spread, 0 collapsed.
    """

    loss: Tensor
    accuracy: Tensor
    embedding_std: Tensor


def nt_xent(embeddings: Tensor, *, temperature: float, world: World) -> NTXent:
    """The loss of this rank's anchors against the keys of all ranks.

    Args:
        embeddings: [2m, d], the first view of m images and then, in the same order, the second; every rank has the
            same m. Computed in fp32 or wider, with at most a fixed number of scores at a time.
        temperature: divides the cosine similarities.
        world: the ranks that share the global batch.

    Raises:
        ValueError: a global batch of one image, which leaves no negatives.
    """
    a = embeddings.shape[0]
    assert a % 2 == 0, "embeddings are two views, one after the other"
    if a * world.size < 4:
        raise ValueError(f"a global batch of {a * world.size // 2} image has no negatives; NT-Xent needs at least 2")
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        keys = world.all_gather(z)  # rank-major
        rows = torch.arange(a, device=z.device) + world.rank * a
        positives = rows.view(2, a // 2).flip(0).flatten()
        loss, accuracy = _CrossEntropy.apply(z, keys, rows, positives, temperature)
        std = keys.detach().std(dim=0, correction=0).mean() * keys.shape[1] ** 0.5
    return NTXent(loss, accuracy, std)


class _CrossEntropy(torch.autograd.Function):
    """Mean over anchors z [a, d] of -log softmax(z · keys / temperature)[positive], without the anchor itself.

    Anchors are taken in chunks; a chunk's scores turn into its share of the gradient before the next chunk begins, so
    that what stays for the backward pass is as large as z and keys.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, keys: Tensor, rows: Tensor, positives: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        a, n = z.shape[0], keys.shape[0]
        differentiable = any(ctx.needs_input_grad)
        grad_z, grad_keys = (torch.zeros_like(x) if differentiable else None for x in (z, keys))
        loss, hits = z.new_zeros(()), z.new_zeros(())
        size = max(1, _SCORES // n)
        for start in range(0, a, size):
            part, row, positive = (x[start : start + size] for x in (z, rows, positives))
            scores = (part @ keys.mT).div_(temperature)
            scores.scatter_(1, row[:, None], -torch.inf)
            own = scores.gather(1, positive[:, None])
            total = scores.logsumexp(dim=1, keepdim=True)
            loss += (total - own).sum()
            hits += ((scores >= own).sum(dim=1) == 1).sum()
            if grad_z is not None and grad_keys is not None:
                # d loss / d scores = softmax - one at the positive
                delta = scores.sub_(total).exp_()
                delta.scatter_add_(1, positive[:, None], torch.full_like(own, -1.0))
                torch.mm(delta, keys, out=grad_z[start : start + size])
                grad_keys.addmm_(delta.mT, part)
        if grad_z is not None and grad_keys is not None:
            ctx.save_for_backward(grad_z.div_(a * temperature), grad_keys.div_(a * temperature))
        accuracy = hits / a
        ctx.mark_non_differentiable(accuracy)
        return loss / a, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:
        grad_z, grad_keys = ctx.saved_tensors
        return grad_z * grad, grad_keys * grad, None, None, None
