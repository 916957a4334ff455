"""What a step minimises, as a dict of named loss terms: the student's own loss, with distillation or without."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mclip import losses
from mclip.config import DistillConfig, require
from mclip.pairs import Batch

Output = dict[str, Tensor]


class Contrastive(nn.Module):
    """The student's own loss on its pairs: the term "original"."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, output: Output, batch: Batch, names: Collection[str], temperature: float) -> dict[str, Tensor]:
        """The scalar terms called ``names``; ``output`` is what the student's forward returned for ``batch``."""
        return {name: getattr(self, f"_{name}")(output, batch, temperature) for name in names}

    def student_tensors(self, output: Output) -> list[Tensor]:
        """The student's tensors that the terms are computed from; gradient norms are taken at them."""
        return [output["image_features"], output["text_features"]]

    def _original(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        image, text, scale = output["image_features"], output["text_features"], output["logit_scale"]
        if self.config.task == "siglip":
            return losses.siglip(image, text, scale, output["logit_bias"])
        return losses.jsd(image, text, scale) if self.config.task == "jsd" else losses.info_nce(image, text, scale)


class Distillation(Contrastive):
    """The student's own loss and the terms that compare it with the teacher's cached embeddings.

    Args:
        config: which terms there are and in which form.
        widths: of the student's tensors that feature distillation aligns: (image, text).
        teacher_width: of the teacher's embeddings; of several teachers, which lie side by side, one each.
        teacher_logit_scale: the teacher's exp(logit_scale), or one each.
    """

    def __init__(
        self,
        config: DistillConfig,
        widths: tuple[int, int],
        teacher_width: int | Sequence[int],
        teacher_logit_scale: float | Sequence[float],
    ) -> None:
        super().__init__(config)
        self.teacher_widths = [teacher_width] if isinstance(teacher_width, int) else list(teacher_width)
        scales = [teacher_logit_scale] if isinstance(teacher_logit_scale, float | int) else list(teacher_logit_scale)
        # What lies side by side was shortened to a unit vector together.
        self.teacher_logit_scales = [scale * len(scales) for scale in scales]
        joined = sum(self.teacher_widths)
        if config.feature_weight:
            self.image_aligner, self.text_aligner = (_aligner(width, joined, config.aligner) for width in widths)
        remedy = f"the student's embedding {widths} must be as wide as the teacher's {joined}"
        fits = config.feature_source == "penultimate" or widths == (joined,) * 2
        require(config.icl_weight == 0 or fits, "icl_weight", config.icl_weight, remedy)

    def student_tensors(self, output: Output) -> list[Tensor]:
        """The embeddings, and the penultimate features where feature distillation reads them."""
        tensors = super().student_tensors(output)
        if self.config.feature_weight and self.config.feature_source == "penultimate":
            tensors += [output["image_penultimate"], output["text_penultimate"]]
        return tensors

    def _feature(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        source = {"embedding": "features", "penultimate": "penultimate"}[self.config.feature_source]
        image, text = (
            aligner(output[f"{modality}_{source}"])
            for modality, aligner in (("image", self.image_aligner), ("text", self.text_aligner))
        )
        if self.config.feature_form == "mse":
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        form = self.config.feature_form
        images, texts = (
            losses.feature(a, b, form) for a, b in ((image, batch.teacher_image), (text, batch.teacher_text))
        )
        return self.config.img_distill_weight * images + self.config.txt_distill_weight * texts

    def _response(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        return losses.response(
            output["image_features"],
            output["text_features"],
            batch.teacher_image.split(self.teacher_widths, dim=1),
            batch.teacher_text.split(self.teacher_widths, dim=1),
            output["logit_scale"],
            self.teacher_logit_scales,
            temperature,
        )

    def _similarity(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        return losses.similarity(
            output["image_features"], output["text_features"], batch.teacher_image, batch.teacher_text
        )

    def _icl(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        return losses.icl(
            output["image_features"],
            output["text_features"],
            batch.teacher_image,
            batch.teacher_text,
            output["logit_scale"],
        )


def _aligner(width: int, teacher_width: int, kind: str) -> losses.Aligner:
    chosen = ("identity" if width == teacher_width else "mlp") if kind == "auto" else kind
    return losses.Aligner(width, teacher_width, chosen)
