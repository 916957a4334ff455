"""Draw scenes from signed distance functions, many at a time.

A signed distance function gives each point its distance to a shape's outline, negative inside. A renderer needs
nothing else: smooth edges, outlines and shadows follow from the distance, at any resolution. The formulas are Inigo
Quilez's (iquilezles.org/articles/distfunctions2d).

Coordinates: a picture spans [0, 1] x [0, 1], y downwards; a shape lives in its own frame of radius about 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Array = np.ndarray


def _box(x: Array, y: Array, w: float, h: float) -> Array:
    qx, qy = np.abs(x) - w, np.abs(y) - h
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact distance to a closed polygon, by crossing number."""
    distance = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.square(wx - ex * t) + np.square(wy - ey * t))
        inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / (ey if ey else 1e-9) + ax)
    return np.sqrt(distance) * np.where(inside, -1, 1).astype(np.float32)


def _regular(count: int, outer: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon pointing up; with ``inner``, of a star."""
    radii = [outer] * count if inner is None else [outer, inner] * count
    angles = [-np.pi / 2 + 2 * np.pi * i / len(radii) for i in range(len(radii))]
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart(x: Array, y: Array) -> Array:
    x, y = np.abs(x) / 1.7, (0.85 - y) / 1.7
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    half = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return 1.7 * np.where(x + y > 1, lobe, tip)


ARROW_HEAD, DROP_TIP = [(1.0, 0.0), (0.1, -0.75), (0.1, 0.75)], [(0, -1.0), (0.52, 0.05), (-0.52, 0.05)]
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.88,
    "square": lambda x, y: _box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: _polygon(x, y, _regular(3, 1.05)),
    "pentagon": lambda x, y: _polygon(x, y, _regular(5, 0.98)),
    "star": lambda x, y: _polygon(x, y, _regular(5, 1.05, 0.45)),
    "heart": _heart,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.92, 0.3), _box(x, y, 0.3, 0.92)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.22,
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y + 0.1)),
    "arrow": lambda x, y: np.minimum(_box(x + 0.4, y, 0.55, 0.22), _polygon(x, y, ARROW_HEAD)),
    "drop": lambda x, y: np.minimum(np.hypot(x, y - 0.35) - 0.6, _polygon(x, y, DROP_TIP)),
    "flower": lambda x, y: 0.8 * (np.hypot(x, y) - 0.72 - 0.24 * np.cos(6 * np.arctan2(y, x))),
}

TEXTURES = ("plain", "striped", "dotted", "checkered")
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
COLOURS: dict[str, list[float]] = WORDS["colours"]
BACKGROUNDS: dict[str, list[list[float]]] = WORDS["backgrounds"]


def _texture(kind: int, x: Array, y: Array, softness: Array) -> Array:
    """Pattern in [0, 1] in a shape's own coordinates; 1 is the second tone. ``softness`` smooths its edges."""
    if TEXTURES[kind] == "plain":
        return np.zeros_like(x)
    if TEXTURES[kind] == "striped":
        return np.clip(0.5 + (np.abs((x * 1.8 + 0.25) % 1 - 0.5) - 0.25) / softness / 1.8, 0, 1)
    if TEXTURES[kind] == "dotted":
        u, v = (x * 1.9) % 1 - 0.5, (y * 1.9) % 1 - 0.5
        return np.clip(0.5 - (np.hypot(u, v) - 0.28) / softness / 1.9, 0, 1)
    wave = np.abs((x * 1.15) % 1 - 0.5) - 0.25, np.abs((y * 1.15) % 1 - 0.5) - 0.25
    first, second = (np.clip(0.5 + w / softness / 1.15, 0, 1) for w in wave)
    return first * (1 - second) + second * (1 - first)


def _smooth_noise(rng: np.random.Generator, count: int, cells: int, size: int) -> Array:
    """(count, size, size) bilinear noise in [-1, 1] with ``cells`` cells a side."""
    grid = rng.uniform(-1, 1, (count, cells + 1, cells + 1)).astype(np.float32)
    position = (np.arange(size, dtype=np.float32) + 0.5) / size * cells
    cell = position.astype(int)
    t = position - cell
    t = t * t * (3 - 2 * t)
    rows = grid[:, cell] * (1 - t)[None, :, None] + grid[:, cell + 1] * t[None, :, None]
    return rows[:, :, cell] * (1 - t) + rows[:, :, cell + 1] * t


def draw_backgrounds(kinds: Array, rng: np.random.Generator, size: int) -> Array:
    """(N, size, size, 3) floats: a vertical gradient, soft noise, and the marks that tell the kinds apart."""
    count, names = len(kinds), list(BACKGROUNDS)
    ends = np.array(list(BACKGROUNDS.values()), dtype=np.float32)[kinds]
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    soft, fine = _smooth_noise(rng, count, 5, size), _smooth_noise(rng, count, 28, size)
    shift = rng.uniform(0, 1, (count, 1, 1)).astype(np.float32)
    blend = np.clip(y[None] + 0.25 * soft, 0, 1)[..., None]
    picture = ends[:, None, None, 0] * (1 - blend) + ends[:, None, None, 1] * blend
    roughness = {"grass": 0.16, "sand": 0.08, "bricks": 0.07, "paper": 0.015}
    strength = np.array([roughness.get(name, 0.03) for name in names])
    mark = strength[kinds].astype(np.float32)[:, None, None] * fine
    for index, name in enumerate(names):
        chosen = kinds == index
        s, ripple = shift[chosen], soft[chosen]
        if name == "water":
            mark[chosen] += 0.09 * np.sin(2 * np.pi * (9 * y + 0.5 * np.sin(2 * np.pi * (2 * x + s)) + ripple))
        elif name == "wood":
            mark[chosen] += 0.07 * np.sin(2 * np.pi * (7 * (x + s) + 0.8 * ripple + 0.3 * np.sin(5 * y)))
        elif name == "bricks":
            row = np.floor(y * 8)
            u, v = (x * 4 + 0.5 * (row % 2) + s) % 1, (y * 8) % 1
            joint = np.maximum(np.abs(u - 0.5) - 0.46, (np.abs(v - 0.5) - 0.42) * 0.6)
            mark[chosen] += 0.28 * np.clip(joint * 40, 0, 1)
        elif name == "night sky":
            mark[chosen] += 0.8 * (np.clip(fine[chosen] - 0.8, 0, 0.2) * 5) ** 2
    return np.clip(picture + mark[..., None], 0, 1)


def draw_clutter(picture: Array, rng: np.random.Generator) -> None:
    """Strew up to three small faint blobs and sticks over each background, in place: nothing that captions name."""
    count, size = picture.shape[:2]
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size

    def draw(low: float, high: float, *channels: int) -> Array:
        return rng.uniform(low, high, (count, 1, 1, *channels)).astype(np.float32)

    for _ in range(3):
        cx, cy, angle = draw(0, 1), draw(0, 1), draw(0, np.pi)
        long, wide = draw(0.01, 0.09), draw(0.008, 0.022)
        tone = draw(0, 1, 3)
        opacity = draw(0, 0.75) * (rng.uniform(size=(count, 1, 1)) < 0.6)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
        cover = np.clip(0.5 - (np.hypot(np.maximum(np.abs(u) - long, 0), v) - wide) * size, 0, 1) * opacity
        picture += cover[..., None] * (tone - picture)


def object_distance(
    shape: int, cx: Array, cy: Array, radius: Array, angle: Array, size: int
) -> tuple[Array, Array, Array]:
    """Distance (in picture units) and the shape's own coordinates, each (N, size, size), for N objects of one shape."""
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    cx, cy, radius, angle = (v.astype(np.float32)[:, None, None] for v in (cx, cy, radius, angle))
    u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / radius
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / radius
    return list(SHAPES.values())[shape](u, v) * radius, u, v


def draw_objects(picture: Array, shape: int, texture: Array, colour: Array, geometry: tuple[Array, ...]) -> None:
    """Draw one object of kind ``shape`` on each picture, in place: shadow, body with texture and shading, outline."""
    size, (cx, cy, radius, angle) = picture.shape[1], geometry
    pixel = np.float32(1 / size)
    shadow, _, _ = object_distance(shape, cx + 0.015, cy + 0.03, radius, angle, size)
    picture *= (1 - 0.35 * np.clip(0.5 - shadow / 0.05, 0, 1))[..., None]
    distance, u, v = object_distance(shape, cx, cy, radius, angle, size)
    softness = (pixel / radius.astype(np.float32))[:, None, None]
    pattern = np.zeros_like(u)
    for kind in np.unique(texture):
        chosen = texture == kind
        pattern[chosen] = _texture(kind, u[chosen], v[chosen], softness[chosen])
    base = colour.astype(np.float32)[:, None, None, :]
    bright = base.mean(-1, keepdims=True)
    # The second tone stays in the colour's own family: light colours get a darker partner, dark ones a lighter.
    second = np.where(bright > 0.55, base * 0.55, base + (1 - base) * 0.5)
    body = base + pattern[..., None] * (second - base)
    body = body * (1.08 - 0.16 * np.clip(0.5 + 0.5 * v, 0, 1))[..., None]
    edge = np.clip(0.5 - (np.abs(distance) - 0.006) / pixel, 0, 1)[..., None]
    body = body * (1 - 0.65 * edge)
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    picture += cover * (np.clip(body, 0, 1) - picture)
