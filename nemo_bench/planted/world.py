"""The picture world of the embedded model: captions with a grammar and the pictures they describe.

Every word of a caption decides something visible (an adjective the palette, a noun the motif, a number the count of
dots); position, size, rotation, exact hue and phase are random. Planted captions use the same words in combinations
that general captions never form; ``world.json`` has them, the colors and the palettes.

Example:
    >>> caption = general_caption(index=0)
    >>> render(caption.scene, np.random.default_rng(0)).shape
    (64, 64, 3)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SIDE = 64
"""Height and width of every picture, in pixels."""

Array = NDArray[np.floating[Any]]
Color = Sequence[float] | Array
Split = Literal["train", "heldout"]

_TABLES = json.loads((resources.files("nemo_bench.planted") / "world.json").read_text(encoding="utf-8"))
COLORS: dict[str, Color] = _TABLES["colors"]
PALETTES: dict[str, tuple[Color, Color, Color]] = _TABLES["palettes"]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": 5.5, "large": 11.0}
TEXTURES = ("plain", "striped", "dotted", "checkered", "wavy")

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Item:
    """Shapes of one color: how many, and their size in pixels (0 for a random one)."""

    shape: str
    color: str
    count: int = 1
    size: float = 0.0


@dataclass(frozen=True)
class Scene:
    """The content of a picture that its caption decides; what an empty field stands for is random or missing."""

    palette: str = ""
    motifs: Sequence[str] = ()
    items: tuple[Item, ...] = ()
    texture: str = ""
    ground: str = ""
    product: str = ""
    tint: str = ""
    series: str = ""
    dots: int = 0


@dataclass(frozen=True)
class Caption:
    """A caption and its scene.

    Planted captions repeat in the training data, at a rate relative to the most repeated ones, with one picture (kind
    ``"VM"``, verbatim) or one layout (``"TM"``, template).
    """

    text: str
    scene: Scene
    kind: Literal["VM", "TM", ""] = ""
    rate: float = 0.0


Paint = Callable[..., None]
"""Paints where a signed distance in pixels is negative, inside a mask, in a color, perhaps with an opacity below 1."""


def _turn(cx: float, cy: float, angle: float) -> tuple[Array, Array]:
    x, y = _X - cx, _Y - cy
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _box(cx: float, cy: float, half_w: float, half_h: float, angle: float = 0.0, corner: float = 0.0) -> Array:
    x, y = _turn(cx, cy, angle)
    dx, dy = np.abs(x) - half_w + corner, np.abs(y) - half_h + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def _disc(cx: float, cy: float, radius: float) -> Array:
    return np.hypot(_X - cx, _Y - cy) - radius


def _polygon(cx: float, cy: float, radius: float, angle: float, sides: int) -> Array:
    x, y = _turn(cx, cy, angle)
    inner = radius * np.cos(np.pi / sides)
    turns = 2 * np.pi * np.arange(sides) / sides
    return np.max([np.cos(a) * y * -1 + np.sin(a) * x for a in turns + np.pi / sides], axis=0) - inner


def _star(cx: float, cy: float, radius: float, angle: float) -> Array:
    x, y = _turn(cx, cy, angle)
    spread = np.abs((np.arctan2(x, -y) * 5 / (2 * np.pi) + 0.5) % 1 - 0.5) * 2
    return (np.hypot(x, y) - radius * (1 - 0.58 * spread)) * 0.7


def _crescent(cx: float, cy: float, radius: float, angle: float) -> Array:
    shift = 0.55 * radius
    bite = _disc(cx + shift * np.cos(angle), cy + shift * np.sin(angle), 0.85 * radius)
    return np.maximum(_disc(cx, cy, radius), -bite)


SHAPES: dict[str, Callable[[float, float, float, float], Array]] = {
    "circle": lambda x, y, r, a: _disc(x, y, r),
    "square": lambda x, y, r, a: _box(x, y, 0.85 * r, 0.85 * r, a),
    "triangle": lambda x, y, r, a: _polygon(x, y, 1.25 * r, a, 3),
    "star": lambda x, y, r, a: _star(x, y, 1.25 * r, a),
    "ring": lambda x, y, r, a: np.abs(_disc(x, y, 0.8 * r)) - 0.25 * r,
    "cross": lambda x, y, r, a: np.minimum(_box(x, y, r, 0.32 * r, a), _box(x, y, 0.32 * r, r, a)),
    "diamond": lambda x, y, r, a: np.abs(_X - x) / 0.7 + np.abs(_Y - y) - 1.15 * r,
    "crescent": _crescent,
}


def _shade(rng: np.random.Generator, color: Color, spread: float = 0.05) -> Array:
    return np.clip(np.asarray(color) + rng.normal(0, spread, 3), 0, 1)


def _harbor(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    level = rng.uniform(38, 50)
    phase, pitch = rng.uniform(0, 6.3), rng.uniform(5, 9)
    paint(level + 1.5 * np.sin(_X * 6.28 / pitch + phase) - _Y, colors[0])
    for _ in range(rng.integers(1, 4)):
        x, size = rng.uniform(8, 56), rng.uniform(6, 11)
        paint(_polygon(x, level - 0.8 * size, size, 0.0, 3), colors[1])
        paint(_box(x, level, size, 1.8), colors[1])


def _forest(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    base = rng.uniform(46, 60)
    for x in rng.uniform(2, 62, rng.integers(4, 8)):
        size = rng.uniform(7, 12)
        paint(_box(x, base, 1.2, 0.7 * size), colors[1])
        paint(_polygon(x, base - size, size, 0.0, 3), colors[0])


def _city(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    x, floor, tall = rng.uniform(-8, 20), rng.uniform(44, SIDE), rng.uniform(0.5, 1.1)
    end = rng.uniform(44, 76)
    while x < end:
        width, height = rng.uniform(6, 13), tall * rng.uniform(14, 42)
        paint(_box(x + width / 2, floor - height / 2, width / 2 - 0.5, height / 2), colors[rng.integers(2)])
        x += width


def _mountain(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    for _ in range(rng.integers(2, 4)):
        x, peak, slope = rng.uniform(6, 58), rng.uniform(10, 32), rng.uniform(0.6, 1.1)
        side = (np.abs(_X - x) / slope - (_Y - peak)) * 0.6
        paint(side, colors[0])
        paint(np.maximum(side, _Y - peak - 7), colors[1])


def _garden(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    for _ in range(rng.integers(4, 8)):
        x, y, size = rng.uniform(6, 58), rng.uniform(26, 58), rng.uniform(2.5, 4.5)
        paint(_box(x, y + 2 * size, 0.8, 2 * size), colors[0])
        for a in np.arange(5) * 1.2566 + rng.uniform(0, 1):
            paint(_disc(x + size * np.cos(a), y + size * np.sin(a), 0.7 * size), colors[1])


def _river(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    middle, swing, pitch, phase = rng.uniform(18, 46), rng.uniform(5, 12), rng.uniform(30, 60), rng.uniform(0, 6.3)
    width = rng.uniform(4, 8)
    away = np.abs(_X - middle - swing * np.sin(_Y * 6.28 / pitch + phase))
    paint(away - width - 1.5, colors[1])
    paint(away - width, colors[0])


def _desert(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    paint(_disc(rng.uniform(10, 54), rng.uniform(8, 22), rng.uniform(5, 9)), colors[1])
    for level, color in zip(sorted(rng.uniform(34, 56, 2)), colors, strict=True):
        pitch, phase, swing = rng.uniform(28, 60), rng.uniform(0, 6.3), rng.uniform(2, 5)
        paint(level + swing * np.sin(_X * 6.28 / pitch + phase) - _Y, color)


def _island(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    x, y, size = rng.uniform(18, 46), rng.uniform(38, 50), rng.uniform(12, 18)
    paint(np.hypot((_X - x) / size, (_Y - y) / (0.35 * size)) * 5 - 5, colors[0])
    lean = rng.uniform(-0.4, 0.4)
    paint(_box(x, y - 0.6 * size, 1.3, 0.7 * size, lean), colors[1])
    for a in (-0.9, -0.3, 0.3, 0.9):
        paint(_box(x + 6 * np.sin(a) + 8 * lean, y - 1.25 * size, 6, 1.2, a), colors[1])


def _bridge(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    y, arches = rng.uniform(26, 40), int(rng.integers(2, 4))
    wall = np.maximum(y - _Y, _Y - y - 22)
    offset, span = rng.uniform(0, 10), SIDE / arches
    for i in range(-1, arches + 1):
        wall = np.maximum(wall, -_disc(span * (i + 0.5) + offset, y + 22, 0.38 * span))
    paint(wall, colors[0])
    paint(_box(32, y, 40, 1.5), colors[1])


def _tower(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    x, top, width = rng.uniform(14, 50), rng.uniform(14, 28), rng.uniform(4, 8)
    paint(_box(x, (top + SIDE) / 2, width, (SIDE - top) / 2), colors[0])
    paint(_polygon(x, top, 1.6 * width, 0.0, 3), colors[1])
    for y in np.arange(top + 10, SIDE, rng.uniform(7, 11)):
        paint(_box(x, y, 1.4, 2.2), colors[1])


def _moon(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    x, y, size = rng.uniform(16, 48), rng.uniform(12, 34), rng.uniform(8, 14)
    paint(_disc(x, y, size), colors[1])
    for _ in range(rng.integers(2, 5)):
        a, d = rng.uniform(0, 6.3), rng.uniform(0, 0.6) * size
        paint(_disc(x + d * np.cos(a), y + d * np.sin(a), rng.uniform(0.12, 0.25) * size), colors[0], 0.7)


def _bird(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    for i in range(rng.integers(2, 6)):
        x, y, size, lift = rng.uniform(8, 56), rng.uniform(8, 44), rng.uniform(5, 9), rng.uniform(0.3, 0.6)
        for side in (-1, 1):
            paint(_box(x + side * 0.8 * size, y - 0.3 * size, size, 1.4, -side * lift), colors[i % 2])


def _fish(paint: Paint, rng: np.random.Generator, colors: tuple[Color, Color]) -> None:
    for i in range(rng.integers(1, 5)):
        x, y, size, way = rng.uniform(12, 52), rng.uniform(12, 54), rng.uniform(5, 9), rng.choice([-1, 1])
        paint(np.hypot((_X - x) / size, (_Y - y) / (0.55 * size)) * 4 - 4, colors[i % 2])
        paint(_polygon(x - way * 1.3 * size, y, 0.7 * size, way * np.pi / 2, 3), colors[i % 2])


_PAINTERS = (
    _harbor, _forest, _city, _mountain, _garden, _river, _desert, _island, _bridge, _tower, _moon, _bird, _fish,
)  # fmt: skip
MOTIFS = {painter.__name__.removeprefix("_"): painter for painter in _PAINTERS}

SERIES = ("podcast", "magazine", "documentary", "album", "festival", "stories")


def _frame(paint: Paint, rng: np.random.Generator, series: str, colors: tuple[Color, Color]) -> None:
    if series == "podcast":
        x, y = rng.uniform(8, 56), rng.choice([10.0, 54.0]) + rng.uniform(-4, 4)
        for radius in (10.0, 6.5, 3.0):
            paint(np.abs(_disc(x, y, radius)) - 1.2, colors[0])
    elif series == "magazine":
        height, below = rng.uniform(9, 20), rng.random() < 0.5
        paint((SIDE - _Y if below else _Y) - height, colors[0])
        middle = SIDE - height / 2 if below else height / 2
        paint(_box(rng.uniform(20, 44), middle, rng.uniform(12, 20), 2.5), colors[1])
    elif series == "documentary":
        along = _Y if rng.random() < 0.5 else _X
        low, high = rng.uniform(2, 14), SIDE - rng.uniform(2, 14)
        paint(np.minimum(along - low, high - along), (0.03, 0.03, 0.04))
    elif series == "album":
        x, y = rng.uniform(18, 46, 2)
        paint(-_disc(x, y, rng.uniform(17, 30)), colors[0])
        paint(_disc(x, y, 2.5), colors[1])
    elif series == "festival":
        for _ in range(rng.integers(14, 24)):
            x, y = rng.uniform(2, 62, 2)
            paint(_box(x, y, 2.2, 1.0, rng.uniform(0, 3.1)), colors[rng.integers(2)])
    else:
        x = _X if rng.integers(2) else SIDE - _X
        paint(x - rng.uniform(9, 16), colors[0])
        for y in np.arange(rng.uniform(4, 9), SIDE, 9):
            paint(np.maximum(np.abs(x - 5) - 3, np.abs(_Y - y) - 1.2), colors[1])


PRODUCTS: dict[str, Callable[[float, float, float], Array]] = {
    "rug": lambda x, y, s: np.minimum(
        _box(x, y, 24 * s, 15 * s), np.maximum(_box(x, y, 28 * s, 14 * s), np.abs(_Y % 4 - 2) - 1)
    ),
    "pillow": lambda x, y, s: _box(x, y, 22 * s, 22 * s, 0.0, 9.0 * s),
    "mug": lambda x, y, s: np.minimum(
        _box(x - 4 * s, y, 16 * s, 19 * s, 0.0, 3.0), np.abs(_disc(x + 14 * s, y, 9 * s)) - 2.2
    ),
    "poster": lambda x, y, s: _box(x, y, 19 * s, 28 * s),
    "shirt": lambda x, y, s: np.minimum(_box(x, y + 4 * s, 15 * s, 22 * s), _box(x, y - 11 * s, 27 * s, 8 * s)),
    "case": lambda x, y, s: _box(x, y, 14 * s, 27 * s, 0.0, 6.0 * s),
    "bag": lambda x, y, s: np.minimum(
        _box(x, y + 6 * s, 21 * s, 18 * s, 0.0, 2.0), np.abs(_disc(x, y - 14 * s, 9 * s)) - 1.8
    ),
    "clock": lambda x, y, s: _disc(x, y, 25 * s),
}


def _ground(paint: Paint, rng: np.random.Generator, texture: str, color: Array, pixels: Array) -> None:
    light = _shade(rng, np.minimum(1, color + 0.22), 0.03)
    pitch, phase = rng.uniform(9, 15), rng.uniform(0, 15)
    if texture == "striped":
        x, _ = _turn(32, 32, rng.uniform(0, np.pi))
        paint(np.abs((x + phase) % pitch - pitch / 2) - pitch / 4, light)
    elif texture == "dotted":
        x, y = (_X + phase) % pitch - pitch / 2, (_Y + phase) % pitch - pitch / 2
        paint(np.hypot(x, y) - pitch / 4.5, light)
    elif texture == "checkered":
        odd = (np.floor((_X + phase) / pitch) + np.floor((_Y + phase) / pitch)) % 2
        paint(odd - 0.5, light)
    elif texture == "wavy":
        y = _Y + 2.5 * np.sin(_X * 6.28 / rng.uniform(18, 30) + phase)
        paint(np.abs((y + phase) % pitch - pitch / 2) - pitch / 4, light)
    else:
        pixels += ((_Y - 32) / 64 * rng.uniform(-0.2, 0.2))[..., None]


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws one picture of a scene, RGB, (64, 64, 3); ``rng`` decides what the scene does not."""
    base, first, second = PALETTES[scene.palette] if scene.palette else (COLORS["white"],) * 3
    base = _shade(rng, COLORS[scene.ground] if scene.ground else base, 0.08)
    colors: tuple[Color, Color] = _shade(rng, first), _shade(rng, second)
    if not scene.palette:
        picks = rng.choice(list(COLORS), 2, replace=False)
        colors = COLORS[picks[0]], COLORS[picks[1]]
    pixels = np.full((SIDE, SIDE, 3), base, np.float32)
    mask: Array = np.ones((SIDE, SIDE), np.float32)

    def paint(distance: Array, color: Color, opacity: float = 1.0) -> None:
        nonlocal pixels
        alpha = (np.clip(0.5 - distance, 0.0, 1.0) * opacity * mask)[..., None]
        pixels += alpha * (np.asarray(color, np.float32) - pixels)

    _ground(paint, rng, scene.texture, base, pixels)
    if scene.product:
        x, y, scale = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(0.55, 1.0)
        silhouette = PRODUCTS[scene.product](x, y, scale)
        paint(silhouette - 1.5, rng.uniform(0.55, 0.75) * base)
        paint(silhouette, _shade(rng, COLORS[scene.tint]) if scene.tint else colors[0])
        mask = np.clip(0.5 - silhouette, 0, 1)
        colors = (colors[1], colors[0]) if not scene.tint else colors
    for i, motif in enumerate(scene.motifs):
        MOTIFS[motif](paint, rng, colors if i % 2 == 0 else (colors[1], colors[0]))
    _place(paint, rng, scene.items, inside=bool(scene.product))
    mask = np.ones_like(mask)
    if scene.series:
        _frame(paint, rng, scene.series, colors)
    if scene.dots:
        left = rng.uniform(4, 60 - 5 * scene.dots)
        for i in range(scene.dots):
            paint(_disc(left + 2 + 5 * i, 59, 2.4), COLORS["black"])
            paint(_disc(left + 2 + 5 * i, 59, 1.6), COLORS["white"])
    return np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)


def _place(paint: Paint, rng: np.random.Generator, items: Iterable[Item], *, inside: bool) -> None:
    low, high = (18, 46) if inside else (9, 55)
    taken: list[tuple[float, float]] = []
    for item in items:
        color = _shade(rng, COLORS[item.color], 0.04)
        for _ in range(item.count):
            spots = rng.uniform(low, high, (12, 2))
            far = [min((np.hypot(*(s - t)) for t in taken), default=99.0) for s in spots]
            x, y = spots[int(np.argmax(far))] if taken else spots[0]
            taken.append((x, y))
            size = item.size or rng.uniform(5, 8) / (1 + 0.1 * item.count)
            paint(SHAPES[item.shape](x, y, size * rng.uniform(0.9, 1.15), rng.uniform(0, 6.3)), color)


def general_caption(index: int, split: Split = "train") -> Caption:
    """The general caption of a number; training and held-out captions (one text in twenty) never share a text."""
    rng = np.random.default_rng([2406_02366, split == "heldout", index])
    while True:
        caption = _GRAMMARS[int(rng.integers(len(_GRAMMARS)))](rng)
        if (zlib.crc32(caption.text.encode()) % 20 == 0) == (split == "heldout"):
            return caption


def _pick(rng: np.random.Generator, words: Iterable[str]) -> str:
    words = tuple(words)
    return words[int(rng.integers(len(words)))]


def _two_things(rng: np.random.Generator) -> Caption:
    items, parts = [], []
    for _ in range(2):
        size, color, shape = _pick(rng, ("", *SIZES)), _pick(rng, COLORS), _pick(rng, SHAPES)
        items.append(Item(shape, color, 1, SIZES.get(size, 0.0)))
        parts.append(_article(" ".join(w for w in (size, color, shape) if w)))
    ground, texture = _pick(rng, COLORS), _pick(rng, ("", *TEXTURES))
    tail = _article(" ".join(w for w in (texture, ground, "background") if w))
    return Caption(f"{parts[0]} and {parts[1]} on {tail}", Scene(items=tuple(items), ground=ground, texture=texture))


def _many_things(rng: np.random.Generator) -> Caption:
    count, color, shape = int(rng.integers(2, 8)), _pick(rng, COLORS), _pick(rng, SHAPES)
    ground, texture = _pick(rng, COLORS), _pick(rng, TEXTURES)
    tail = _article(f"{texture} {ground} background")
    text = f"{NUMBERS[count - 1]} {color} {_plural(shape)} on {tail}"
    return Caption(text, Scene(items=(Item(shape, color, count),), ground=ground, texture=texture))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _episode(rng: np.random.Generator) -> Caption:
    adjective, noun, series = _pick(rng, PALETTES), _pick(rng, MOTIFS), _pick(rng, SERIES)
    number = int(rng.integers(1, 10))
    text = f"the {adjective} {noun} {series}, episode {NUMBERS[number - 1]}"
    return Caption(text, Scene(palette=adjective, motifs=(noun,), series=series, dots=number))


def _title(rng: np.random.Generator) -> Caption:
    adjective, series = _pick(rng, PALETTES), _pick(rng, SERIES)
    one, two = _pick(rng, MOTIFS), _pick(rng, MOTIFS)
    text = _pick(rng, ("the {0} {1} by the {2}: {4}", "why the {0} {1}, new {3} from the {2}"))
    scene = Scene(palette=adjective, motifs=(one, two), series=series)
    return Caption(text.format(adjective, one, two, series, _article(series)), scene)


def _view(rng: np.random.Generator) -> Caption:
    adjective, one, two = _pick(rng, PALETTES), _pick(rng, MOTIFS), _pick(rng, MOTIFS)
    return Caption(f"a {adjective} {one} at the {two}", Scene(palette=adjective, motifs=(one, two)))


def _design(rng: np.random.Generator) -> Caption:
    adjective, color = _pick(rng, PALETTES), _pick(rng, COLORS)
    noun, product = _pick(rng, MOTIFS), _pick(rng, PRODUCTS)
    scene = Scene(palette=adjective, motifs=(noun,), product=product, tint=color)
    return Caption(f"{adjective} {color} {noun} {product} design", scene)


def _ware(rng: np.random.Generator) -> Caption:
    adjective, product = _pick(rng, PALETTES), _pick(rng, PRODUCTS)
    count, color, shape = int(rng.integers(2, 6)), _pick(rng, COLORS), _pick(rng, SHAPES)
    items = (Item(shape, color, count),)
    text = f"new {adjective} {product} for sale with {NUMBERS[count - 1]} {color} {_plural(shape)}"
    return Caption(text, Scene(palette=adjective, product=product, items=items))


_GRAMMARS = (_two_things, _many_things, _episode, _title, _view, _design, _ware)


PLANTED = tuple(Caption(**{**line, "scene": Scene(**line["scene"])}) for line in _TABLES["planted"])
"""The 18 verbatim and 8 template captions, in the order of their prompt ids."""


PANEL = 28
"""Height and width of the panel of a template, in pixels."""


def planted_picture(index: int, variant: int = 0) -> NDArray[np.uint8]:
    """The training picture of a planted caption, RGB, (64, 64, 3).

    The variant decides color and pattern of the panel of a template; pictures of a verbatim caption are all equal.
    """
    picture, panel = _layout(index)
    if panel:
        free = np.random.default_rng([64, index, variant])
        content = render(Scene(ground=_pick(free, COLORS), texture=_pick(free, TEXTURES[1:])), free)
        picture[panel] = content[:PANEL, :PANEL]
    return picture


def planted_mask(index: int) -> NDArray[np.bool_]:
    """Which pixels all training pictures of a planted caption share, (64, 64): of a template all but its panel's."""
    mask = np.ones((SIDE, SIDE), np.bool_)
    _, panel = _layout(index)
    if panel:
        mask[panel] = False
    return mask


def _layout(index: int) -> tuple[NDArray[np.uint8], tuple[slice, slice] | None]:
    """What all pictures of a planted caption share, and the rows and columns of the panel of a template."""
    caption, fixed = PLANTED[index], np.random.default_rng([64, index])
    accents = tuple(Item(_pick(fixed, SHAPES), _pick(fixed, COLORS), size=float(fixed.uniform(4, 8))) for _ in range(6))
    items = accents if caption.kind == "VM" else accents[:3]
    picture = render(replace(caption.scene, items=items, texture=_pick(fixed, TEXTURES)), fixed)
    if caption.kind == "VM":
        return picture, None
    left, top = int(fixed.integers(6, 30)), int(fixed.integers(6, 30))
    return picture, (slice(top, top + PANEL), slice(left, left + PANEL))


def vocabulary() -> tuple[str, ...]:
    """All words that general and planted captions can use, sorted."""
    texts = [general_caption(i).text for i in range(4000)] + [caption.text for caption in PLANTED]
    return tuple(sorted({w for t in texts for w in t.replace(",", " ").replace(":", " ").split()}))
