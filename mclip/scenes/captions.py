"""Captions as people write them: attributes are left out or paraphrased, and a few captions are of another picture."""

import numpy as np

from mclip.scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, WORDS

SHAPE_NAMES, COLOUR_NAMES, BACKGROUND_NAMES = tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS)
RELATIONS = ("to the left of", "to the right of", "above", "below")
SHAPE_WORDS, COLOUR_WORDS, TEXTURE_WORDS = (WORDS[f"{kind}_words"] for kind in ("shape", "colour", "texture"))
BACKGROUND_PHRASES: dict[str, list[str]] = WORDS["background_phrases"]
CAPTION_STYLES: dict[str, list] = WORDS["caption_styles"]
"""Of each style: the chance that an attribute is named, that a paraphrase is used, that the background is named."""
Table = dict[str, np.ndarray]


def _noun_phrase(rng: np.random.Generator, table: Table, row: int, slot: int, style: str) -> str:
    """One object, such as "a small striped red star"."""
    chances, paraphrase, _ = CAPTION_STYLES[style]

    def word(name: str, paraphrases: dict[str, list[str]]) -> str:
        options = paraphrases.get(name, ())
        return options[rng.integers(len(options))] if options and rng.uniform() < paraphrase else name

    named = {attribute: rng.uniform() < chance for attribute, chance in chances.items()}
    words = []
    if named["size"]:
        words.append(("small", "large")[int(table["large"][row, slot])])
    if named["texture"]:
        words.append(word(TEXTURES[table["texture"][row, slot]], TEXTURE_WORDS))
    if named["colour"]:
        words.append(word(COLOUR_NAMES[table["colour"][row, slot]], COLOUR_WORDS))
    shape = word(SHAPE_NAMES[table["shape"][row, slot]], SHAPE_WORDS)
    words.append(shape if named["shape"] else ("shape", "thing", "object")[rng.integers(3)])
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _caption(rng: np.random.Generator, table: Table, row: int, style: str) -> str:
    phrases = BACKGROUND_PHRASES[BACKGROUND_NAMES[table["background"][row]]]
    where = phrases[rng.integers(len(phrases))] if rng.uniform() < CAPTION_STYLES[style][2] else ""
    two = table["relation"][row] >= 0
    templates = WORDS["two_objects" if two else "one_object"]
    template = templates[rng.integers(len(templates))]
    a = _noun_phrase(rng, table, row, 0, style)
    b = _noun_phrase(rng, table, row, 1, style) if two else ""
    caption = template.format(a=a, b=b, where=where, relation=RELATIONS[table["relation"][row]])
    return " ".join(caption.split()).replace(" ,", ",")


def write_captions(table: Table, style: str, noise: float, rng: np.random.Generator) -> list[list[str]]:
    """Five captions a picture; a share ``noise`` of them is taken from other pictures."""
    size = len(table["background"])
    captions = [[_caption(rng, table, row, style) for _ in range(5)] for row in range(size)]
    wrong = rng.uniform(size=(size, 5)) < noise
    donors = (np.arange(size)[:, None] + rng.integers(1, max(2, size), (size, 5))) % size
    return [[captions[donors[i, j]][j] if wrong[i, j] else captions[i][j] for j in range(5)] for i in range(size)]
