"""Every loss of the course, as a pure function of tensors.

``image`` u and ``text`` v are the student's L2-normalised embeddings (B, d), row i of each from pair i;
``logit_scale`` s is its learned scale. ``teacher_image`` U, ``teacher_text`` V (B, D) and ``teacher_logit_scale`` S
are the teacher's. Each function returns a scalar, averaged over the batch.

All losses but ``feature`` know pairs by position alone. Two pictures with the same caption are therefore each other's
negatives in ``info_nce``, ``siglip``, ``jsd`` and ``icl``, which puts a floor under these losses. ``response`` and
``similarity`` have none: their targets come from the teacher, who gives duplicates equal scores.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mclip.config import require

Scale = Tensor | float


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All cosines (B, B) of two sets of normalised embeddings (B, d), in float32 or better.

    Mixed precision is switched off here: bfloat16 rounds a cosine near 1 by up to 0.002, or 0.2 at a scale of 100.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings {tuple(a.shape)} and {tuple(b.shape)} differ in shape: both are (B, d)")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype).T


def info_nce(image: Tensor, text: Tensor, logit_scale: Scale) -> Tensor:
    """Symmetric cross-entropy of s u v^T with the diagonal (Radford et al. 2021, figure 3); log B at chance."""
    logits = logit_scale * cosines(image, text)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Scale, logit_bias: Scale) -> Tensor:
    """Each of the B x B pairs as its own yes-or-no question, with a bias (Zhai et al. 2023, algorithm 1)."""
    logits = logit_scale * cosines(image, text) + logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    # Divided by B, not B x B, as in the paper: in a large batch the positives keep their weight.
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def jsd(image: Tensor, text: Tensor, logit_scale: Scale) -> Tensor:
    """CLIP-Lite's Jensen-Shannon bound in softplus form (Shrivastava et al. 2023), critic T = s u v^T.

    Mean softplus(-T) over the positives, on the diagonal, plus mean softplus(T) over the negatives, off it: a pair is
    never both. The paper draws one negative for each positive; this averages over all B - 1, the same in expectation.
    """
    logits = logit_scale * cosines(image, text)
    if len(logits) < 2:
        raise ValueError("jsd needs at least 2 pairs: a batch of one has no negatives")
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return F.softplus(-logits[diagonal]).mean() + F.softplus(logits[~diagonal]).mean()


def feature(student: Tensor, teacher: Tensor, form: Literal["cosine", "mse"] = "cosine") -> Tensor:
    """Distance of the aligned student features (B, D) from the teacher's (B, D), for one modality.

    "cosine" is 1 - cos, in [0, 2], blind to length. "mse" is the squared error SUMMED over the dimensions and averaged
    over the batch, 2 (1 - cos) for unit vectors. The mean over D = 512 would be too weak beside a contrastive term.
    """
    if student.shape != teacher.shape:
        remedy = f"give the student an Aligner({student.shape[-1]}, {teacher.shape[-1]})"
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ: {remedy}")
    if form == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    require(form == "mse", "form", form, "use 'cosine' or 'mse'")
    return F.mse_loss(student, teacher, reduction="none").sum(-1).mean()


def response(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Scale,
    teacher_logit_scale: Scale,
    temperature: float = 1.0,
) -> Tensor:
    """KL(softmax(S U V^T / T) || softmax(s u v^T / T)) T^2, images to texts and texts to images averaged.

    Over the student's own similarity matrix, the one that inference uses. A true divergence: 0 where the distributions
    are equal. The T^2 keeps the size of the gradients as T changes (Hinton et al. 2015, section 2; for CLIP: Yang et
    al. 2024, CLIP-KD). The widths d and D may differ.
    """
    _same_batch(image, teacher_image)
    student = logit_scale * cosines(image, text) / temperature
    teacher = teacher_logit_scale * cosines(teacher_image, teacher_text) / temperature
    form = {"reduction": "batchmean", "log_target": True}
    to_texts = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), **form)
    to_images = F.kl_div(student.T.log_softmax(1), teacher.T.log_softmax(1), **form)
    return temperature**2 * torch.stack([to_texts, to_images]).mean()


def similarity(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Mean squared difference of teacher's and student's cosines, within and across modalities (Tung and Mori 2019)."""
    _same_batch(image, teacher_image)
    images = F.mse_loss(cosines(image, image), cosines(teacher_image, teacher_image))
    texts = F.mse_loss(cosines(text, text), cosines(teacher_text, teacher_text))
    across = F.mse_loss(cosines(image, text), cosines(teacher_image, teacher_text))
    return torch.stack([images, texts, across]).mean()


def icl(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, logit_scale: Scale) -> Tensor:
    """Interactive contrastive learning (Yang et al. 2024, CLIP-KD): the student's anchors find the teacher's pairs.

    Images over the teacher's texts and texts over its images, averaged. Both embed into the same width.
    """
    target = torch.arange(len(image), device=image.device)
    from_images = F.cross_entropy(logit_scale * cosines(image, teacher_text), target)
    from_texts = F.cross_entropy(logit_scale * cosines(text, teacher_image), target)
    return (from_images + from_texts) / 2


def _same_batch(student: Tensor, teacher: Tensor) -> None:
    # Without this check a teacher batch of one would broadcast over the student's.
    if len(student) != len(teacher):
        raise ValueError(f"the student's batch has {len(student)} pairs, the teacher's {len(teacher)}")


class Aligner(nn.Sequential):
    """Brings student features (B, in_features) to the teacher's width (B, out_features) for ``feature``.

    "mlp" is used in training and then thrown away. "identity" has no parameters: the student's own embedding has to lie
    where the teacher's does. ConfigError for another kind, and for "identity" between different widths.
    """

    def __init__(self, in_features: int, out_features: int, kind: Literal["mlp", "identity"] = "mlp") -> None:
        require(kind in ("mlp", "identity"), "aligner", kind, "use 'mlp' or 'identity'")
        remedy = f"student width {in_features}, teacher width {out_features}; use 'auto' or 'mlp'"
        require(kind == "mlp" or in_features == out_features, "aligner", kind, remedy)
        first, last = (in_features, out_features), (out_features, out_features)
        super().__init__(*[nn.Linear(*first), nn.ReLU(), nn.Dropout(0.1), nn.Linear(*last)] if kind == "mlp" else [])
