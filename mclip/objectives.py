"""What a step minimises, as a dict of named loss terms: the student's own loss, alone or with distillation."""

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from mclip import losses
from mclip.config import DistillConfig
from mclip.pairs import Batch

Output = dict[str, Tensor]


def embeddings(output: Output, kind: str = "features") -> list[Tensor]:
    """The student's two tensors of a kind, "features" or "penultimate": (B, d) of pictures and of captions."""
    return [output[f"image_{kind}"], output[f"text_{kind}"]]


def own_pairs(batch: Batch, *sides: Tensor) -> list[Tensor]:
    """The rows of ``sides`` whose caption is the picture's own: what a loss that looks for the pair can read."""
    return [side if batch.paired is None else side[batch.paired] for side in sides]


class Contrastive(nn.Module):
    """The student's own loss on its pairs: the term "original"."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.aligned = "penultimate" if config.feature_source == "penultimate" else "features"

    def forward(self, output: Output, batch: Batch, names: Collection[str], temperature: float) -> dict[str, Tensor]:
        """The scalar terms called ``names``; ``output`` is what the student's forward returned for ``batch``."""
        return {name: getattr(self, f"_{name}")(output, batch, temperature) for name in names}

    def student_tensors(self, output: Output) -> list[Tensor]:
        """The student's tensors that the terms are computed from. Gradient norms are taken at them."""
        return embeddings(output) + (embeddings(output, self.aligned) if self.aligned == "penultimate" else [])

    def _original(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        student = *own_pairs(batch, *embeddings(output)), output["logit_scale"]
        if self.config.task == "siglip":
            return losses.siglip(*student, output["logit_bias"])
        return losses.jsd(*student) if self.config.task == "jsd" else losses.info_nce(*student)


class Distillation(Contrastive):
    """The student's own loss, and the terms that compare the student with the teacher's cached embeddings.

    ``widths`` are those of the student's tensors that feature distillation aligns (image, text).
    """

    def __init__(
        self, config: DistillConfig, widths: tuple[int, int], teacher_width: int, teacher_logit_scale: float
    ) -> None:
        super().__init__(config)
        self.teacher_logit_scale = teacher_logit_scale
        if config.feature_weight or config.icl_weight:
            fitting = ["identity" if width == teacher_width else "mlp" for width in widths]
            kinds = fitting if config.aligner == "auto" else [config.aligner] * 2
            self.image_aligner = losses.Aligner(widths[0], teacher_width, kinds[0])
            self.text_aligner = losses.Aligner(widths[1], teacher_width, kinds[1])
            self.unit_length = self.aligned == "features" and set(kinds) == {"identity"}

    def _in_teacher_space(self, output: Output) -> tuple[Tensor, Tensor]:
        """The student's pictures and captions, aligned and of length 1: (B, D) each."""
        image, text = embeddings(output, self.aligned)
        image, text = self.image_aligner(image), self.text_aligner(text)
        return (image, text) if self.unit_length else (F.normalize(image, dim=-1), F.normalize(text, dim=-1))

    def _feature(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        image, text = self._in_teacher_space(output)
        image_loss = losses.feature(image, batch.teacher_image, self.config.feature_form)
        text_loss = losses.feature(text, batch.teacher_text, self.config.feature_form)
        return self.config.img_distill_weight * image_loss + self.config.txt_distill_weight * text_loss

    def _response(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        scales = output["logit_scale"], self.teacher_logit_scale
        return losses.response(*embeddings(output), batch.teacher_image, batch.teacher_text, *scales, temperature)

    def _similarity(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        return losses.similarity(*embeddings(output), batch.teacher_image, batch.teacher_text)

    def _icl(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        sides = own_pairs(batch, *self._in_teacher_space(output), batch.teacher_image, batch.teacher_text)
        return losses.icl(*sides, output["logit_scale"])
