"""Captions as people write them: attributes dropped, paraphrased, and now and then taken from the wrong picture."""

from __future__ import annotations

import numpy as np

from mclip.scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, TEXTURES

SHAPE_NAMES, COLOUR_NAMES, BACKGROUND_NAMES = tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS)
RELATIONS = ("to the left of", "to the right of", "above", "below")
Table = dict[str, np.ndarray]
SHAPE_WORDS = {
    "circle": ("disc", "round shape"),
    "square": ("box",),
    "star": ("five-pointed star",),
    "cross": ("plus sign",),
    "ring": ("hoop",),
    "moon": ("crescent",),
    "drop": ("teardrop",),
    "flower": ("blossom",),
}
COLOUR_WORDS = {
    "red": ("crimson", "scarlet"),
    "yellow": ("golden",),
    "blue": ("navy",),
    "purple": ("violet",),
    "pink": ("rosy",),
    "black": ("dark",),
    "green": ("emerald",),
    "brown": ("chocolate",),
}
TEXTURE_WORDS = {"striped": ("stripy",), "dotted": ("spotted",), "checkered": ("chequered",)}
BACKGROUND_PHRASES = {
    "grass": ("on grass", "in the grass", "on a lawn"),
    "sand": ("on sand", "on the beach"),
    "water": ("on water", "in the sea"),
    "snow": ("on snow", "in the snow"),
    "bricks": ("on bricks", "on a brick wall"),
    "wood": ("on wood", "on a wooden table"),
    "paper": ("on paper", "on a white page"),
    "night sky": ("in the night sky", "among the stars at night"),
}
ONE_OBJECT = ("{a} {where}", "a picture of {a} {where}", "{a} {where}, seen from above", "there is {a} {where}", "{a}")
TWO_OBJECTS = (
    "{a} {relation} {b} {where}",
    "{a} {relation} {b}",
    "a picture of {a} {relation} {b}",
    "{a} and {b} {where}",
)


def _word(rng: np.random.Generator, name: str, others: dict[str, tuple[str, ...]], share: float) -> str:
    options = others.get(name, ())
    return options[rng.integers(len(options))] if options and rng.uniform() < share else name


def _noun_phrase(
    rng: np.random.Generator, table: Table, row: int, slot: int, keep: dict[str, float], other: float
) -> str:
    """One object, such as "a small striped red star"; ``keep`` gives each attribute's chance of being named."""
    named = {key: rng.uniform() < share for key, share in keep.items()}
    words = []
    if named["size"]:
        words.append(("small", "large")[int(table["large"][row, slot])])
    if named["texture"]:
        words.append(_word(rng, TEXTURES[table["texture"][row, slot]], TEXTURE_WORDS, other))
    if named["colour"]:
        words.append(_word(rng, COLOUR_NAMES[table["colour"][row, slot]], COLOUR_WORDS, other))
    shape = _word(rng, SHAPE_NAMES[table["shape"][row, slot]], SHAPE_WORDS, other)
    words.append(shape if named["shape"] else ("shape", "thing", "object")[rng.integers(3)])
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


CAPTION_STYLES: dict[str, tuple[dict[str, float], float, float]] = {
    "human": ({"size": 0.25, "texture": 0.35, "colour": 0.75, "shape": 0.6}, 0.25, 0.5),
    "clean": ({"size": 0.2, "texture": 0.5, "colour": 0.65, "shape": 1.0}, 0.2, 0.4),
}
"""Of each style: the chance that an attribute is named, that a paraphrase is used, that the background is named."""


def write_captions(table: Table, style: str, noise: float, rng: np.random.Generator) -> list[list[str]]:
    """Five captions a picture; a share ``noise`` of them is taken from other pictures."""
    keep, other, where_share = CAPTION_STYLES[style]
    size = len(table["background"])
    captions = []
    for row in range(size):
        lines = []
        for _ in range(5):
            phrases = BACKGROUND_PHRASES[BACKGROUND_NAMES[table["background"][row]]]
            where = phrases[rng.integers(len(phrases))] if rng.uniform() < where_share else ""
            two = table["relation"][row] >= 0
            template = (TWO_OBJECTS if two else ONE_OBJECT)[rng.integers(4 if two else 5)]
            line = template.format(
                a=_noun_phrase(rng, table, row, 0, keep, other),
                where=where,
                b=_noun_phrase(rng, table, row, 1, keep, other) if two else "",
                relation=RELATIONS[table["relation"][row]] if two else "",
            )
            lines.append(" ".join(line.split()).replace(" ,", ","))
        captions.append(lines)
    wrong = rng.uniform(size=(size, 5)) < noise
    donors = (np.arange(size)[:, None] + rng.integers(1, max(2, size), (size, 5))) % size
    return [[captions[donors[i, j]][j] if wrong[i, j] else captions[i][j] for j in range(5)] for i in range(size)]
