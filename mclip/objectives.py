"""What a step minimises, as a dict of named loss terms: the student's own loss, alone or with distillation."""

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
        """The student's tensors that the terms are computed from. Gradient norms are taken at them."""
        return [output["image_features"], output["text_features"]]

    def _original(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        embeddings_and_scale = output["image_features"], output["text_features"], output["logit_scale"]
        if self.config.task == "siglip":
            return losses.siglip(*embeddings_and_scale, output["logit_bias"])
        loss = losses.jsd if self.config.task == "jsd" else losses.info_nce
        return loss(*embeddings_and_scale)


class Distillation(Contrastive):
    """The student's own loss, and the terms that compare the student with the teacher's cached embeddings.

    Args:
        config: which terms there are and in which form.
        widths: widths of the student's tensors that feature distillation aligns: (image, text).
        teacher_width: width of the teacher's embeddings. Several teachers lie side by side: one width each.
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
        # Embeddings that lie side by side were shortened to one unit vector, each cosine to its share.
        self.teacher_logit_scales = [scale * len(scales) for scale in scales]
        joined = sum(self.teacher_widths)
        if config.feature_weight:
            kinds = [
                config.aligner if config.aligner != "auto" else "identity" if width == joined else "mlp"
                for width in widths
            ]
            self.image_aligner = losses.Aligner(widths[0], joined, kinds[0])
            self.text_aligner = losses.Aligner(widths[1], joined, kinds[1])
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
        source = "penultimate" if self.config.feature_source == "penultimate" else "features"
        image = self.image_aligner(output[f"image_{source}"])
        text = self.text_aligner(output[f"text_{source}"])
        form = self.config.feature_form
        if form == "mse":
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        image_loss = losses.feature(image, batch.teacher_image, form)
        text_loss = losses.feature(text, batch.teacher_text, form)
        return self.config.img_distill_weight * image_loss + self.config.txt_distill_weight * text_loss

    def _response(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        teacher_images, teacher_texts = (
            rows.split(self.teacher_widths, dim=1) for rows in (batch.teacher_image, batch.teacher_text)
        )
        student = output["image_features"], output["text_features"]
        scales = output["logit_scale"], self.teacher_logit_scales
        return losses.response(*student, teacher_images, teacher_texts, *scales, temperature)

    def _similarity(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        student = output["image_features"], output["text_features"]
        return losses.similarity(*student, batch.teacher_image, batch.teacher_text)

    def _icl(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        student, scale = (output["image_features"], output["text_features"]), output["logit_scale"]
        return losses.icl(*student, batch.teacher_image, batch.teacher_text, scale)
