"""What rows of the table try that no setting says: a function of the package is replaced while a row runs."""

from typing import Any

from torch import Tensor, nn

from mclip import evaluate, locked_image, train
from mclip.balancing import Balancer
from mclip.config import DistillConfig, TrainConfig
from mclip.study.defects import Patch
from mclip.teacher import load_teacher

rate_as_it_is, weights_as_it_is, embed_as_it_is = train.learning_rate, Balancer.weights, evaluate.embed_texts
Shares = tuple[float, float, float]


def rates(shares: Shares) -> Patch:
    """Each phase, at its default bounds, has its own share of the learning rate."""

    def rate(step: int, total: int, config: TrainConfig) -> float:
        phase = sum(step >= bound * total for bound in DistillConfig().phases[:2])
        return shares[phase] * rate_as_it_is(step, total, config)

    return train, "learning_rate", rate


def feature_priors(shares: Shares) -> Patch:
    """In each phase, "feature" has its own share of its prior."""

    def weights(self: Balancer, terms: Any, active: Any, step: int, embeddings: Any) -> Any:
        phase = ("response" in active) + ("original" in active)
        own = {name: ramp * (shares[phase] if name == "feature" else 1) for name, ramp in active.items()}
        return weights_as_it_is(self, terms, own, step, embeddings)

    return Balancer, "weights", weights


def of_the_teacher(model: nn.Module, tokenizer: Any, texts: Any, *size: int) -> Tensor:
    """Texts as the teacher embeds them: its text tower judges in the place of the student's."""
    teacher = load_teacher()
    return embed_as_it_is(teacher.model, teacher.tokenize, texts, *size)


def class_shares(known: float, means: float) -> Patch:
    """The teacher of photographs hears this much of classes: rows of either kind for each captioned picture."""
    return locked_image, "CLASS_SHARES", (known, means)


TRIALS: dict[str, Patch] = {
    "rate-falls": rates((1.0, 0.5, 0.25)),
    "rate-rises": rates((1.0, 1.5, 2.0)),
    "feature-fades": feature_priors((1.0, 0.5, 0.25)),
    "feature-grows": feature_priors((1.0, 2.0, 4.0)),
    "teacher-texts": (evaluate, "embed_texts", of_the_teacher),
    "captions-alone": class_shares(0.0, 0.0),
    "known-alone": class_shares(2.5, 0.0),
    "means-alone": class_shares(0.0, 2.5),
}
"""What each trial replaces, by its name in experiments.yaml."""
