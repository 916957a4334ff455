"""How much a run does: smoke for tests, cpu for a laptop, gpu for full size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import TrainConfig, closest, require
from .teacher import SHIPPED


@dataclass(frozen=True)
class Profile:
    """How much a run does: ``pictures`` of scenes, passes over them, and pictures in each test set.

    Every run is shown ``views`` random crops of each picture; at equal samples they gain more than whole pictures do.
    """

    pictures: int
    max_epochs: int
    batch_size: int
    test_pictures: int
    learning_rate: float = 3e-3
    crop_scale: float = 0.6
    views: int = 4
    preset: str = "course"
    teacher: str = SHIPPED
    teacher_pretrained: str | None = None

    def training(self, **changes: Any) -> TrainConfig:
        """The settings of a run of this size; ``changes`` replace some."""
        return TrainConfig(**({key: getattr(self, key) for key in TRAINING} | changes))


TRAINING = ("max_epochs", "batch_size", "learning_rate", "crop_scale", "views")
"""What a profile decides of a run's settings."""

PROFILES = {
    "smoke": Profile(pictures=256, max_epochs=1, batch_size=64, test_pictures=128),
    "cpu": Profile(pictures=10_000, max_epochs=7, batch_size=64, test_pictures=2000),
    "gpu": Profile(100_000, 30, 512, 5000, 1e-3, preset="mobile-256", teacher="ViT-B-32", teacher_pretrained="openai"),
}


def get_profile(name: str) -> Profile:
    """The profile called ``name``; ConfigError with the nearest names for another."""
    require(name in PROFILES, "profile", name, closest(name, PROFILES))
    return PROFILES[name]
