"""Opens every picture that is looked at: generated, made elsewhere, training images, real ones, thumbnails."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_bench.errors import StoreError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""File names in a folder of pictures that end so, in any case, are pictures."""
LEFT_BY_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
"""Folders of a system's own, like those whose name begins with a dot."""
MANY = 500
"""Pictures to be decoded from which on a progress bar is shown."""
_RULES = "1"
"""Changed with what :func:`to_rgb` refuses, so that pictures are tried again."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation."""


def open_image(path: Path) -> Image.Image:
    """An RGB picture; see :func:`to_rgb` for what becomes of other kinds.

    Raises:
        StoreError: The file is missing or can't be decoded to its end.
    """
    try:
        return _open(path)
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        msg = f"{path} can't be read as an image ({_reason(error)}); replace it, or, if a run made it, delete it and"
        raise StoreError(f"{msg} run again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as all that compares pictures sees it: 8-bit RGB, upright.

    - Transparency, of any form (RGBA, LA, PA, palettes, a transparent color): laid on white.
    - 16 bits a channel: scaled to 8 (65535 becomes 255). 32-bit integers: read as 16-bit ones, refused if they are
      none. Floats: from 0 to 1, scaled; else from 0 to 255, rounded; refused otherwise. 1 bit: black and white.
    - EXIF orientation: applied.
    - Animations and several pages: the first one.
    - CMYK: the complement of ink and black; JPEG files of CMYK hold inverted values, as Adobe writes them.
    - Palettes, grayscale and Lab: their colors. Color profiles: ignored.

    Args:
        image: An opened picture of Pillow; it is decoded to its end.

    Raises:
        ValueError: Its values have no known range.
        OSError: It is damaged.
    """
    image.load()
    orientation = 1
    with suppress(Exception):  # EXIF data are often damaged where the picture is not
        orientation = image.getexif().get(_ORIENTATION, 1)
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        rgb = _eight_bits(image).convert("RGB")
    elif image.has_transparency_data or mode == "RGBa":
        clear = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray values of more than 8 bits as 8-bit ones."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode != "F":
        if not (low >= 0 and high <= 65535):
            raise ValueError(f"32-bit values from {low:g} to {high:g}; expected 0 to 65535: save it with 8 or 16 bits")
        scaled = values * (255 / 65535)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
    elif not (low >= 0 and high <= 255):
        raise ValueError(f"float values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255: save it with 8 bits")
    else:
        scaled = values * 255 if high <= 1 else values
    return Image.fromarray(scaled.round().astype(np.uint8))


def _open(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as image:
        return to_rgb(image)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def inspect_picture(path: Path | str) -> tuple[str, tuple[int, int] | None, str]:
    """SHA-256 of a file, width and height of the picture in it, and why it can't be read, empty where it can."""
    try:
        content = Path(path).read_bytes()
        size = _open(io.BytesIO(content)).size
        return hashlib.sha256(content).hexdigest(), size, ""
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        return "", None, _reason(error)


def unreadable(paths: Iterable[Path], what: str) -> dict[Path, str]:
    """Decodes pictures to their end, several at a time; what could be read is not read again while it stays as it is.

    That is kept in ``nemo_bench/pictures.txt`` of the user's cache folder (``XDG_CACHE_HOME``), which may be deleted
    at any time; a folder that can't be written is left as it is.

    Args:
        paths: The files.
        what: What they are, for the progress bar, which many have.

    Returns:
        Why, for each of those that can't be read, in the order given.
    """
    known = _known()
    keys = {path: _key(path) for path in dict.fromkeys(paths)}
    todo = [path for path, key in keys.items() if key not in known]
    if not todo:
        return {}
    columns = (TextColumn(f"check {what}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = len(todo) >= MANY and sys.stderr.isatty()
    with (
        Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as bar,
        ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool,
    ):
        reasons = dict(zip(todo, bar.track(pool.map(_why, todo), total=len(todo)), strict=True))
    _remember([keys[path] for path, why in reasons.items() if not why])
    return {path: why for path, why in reasons.items() if why}


def _why(path: Path) -> str:
    try:
        _open(path)
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        return _reason(error)
    return ""


def _key(path: Path) -> str:
    """Stands for what is in a file: its place, size and time, and what decodes it."""
    try:
        about = path.stat()
    except OSError:
        return ""
    text = f"{_RULES} {PIL.__version__} {path.resolve()} {about.st_size} {about.st_mtime_ns}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_bench" / "pictures.txt"


@cache
def _read_cache(path: Path) -> set[str]:
    """What other processes could read, and this one adds to."""
    try:
        return set(path.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()


def _known() -> set[str]:
    return _read_cache(_cache())


def _remember(keys: list[str]) -> None:
    new = [key for key in keys if key]
    _known().update(new)
    with suppress(OSError):
        _cache().parent.mkdir(parents=True, exist_ok=True)
        with _cache().open("a", encoding="ascii") as file:
            file.write("".join(f"{key}\n" for key in new))


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file, or a folder on the way to it from a root, is a system's own or begins with a dot."""
    return any(name.startswith(".") or name in LEFT_BY_SYSTEMS for name in path.relative_to(root).parts)


def visible(paths: Iterable[Path], root: Path) -> Iterator[Path]:
    """Those of some files in a root that users put there; see :func:`is_hidden`."""
    return (path for path in paths if not is_hidden(path, root))


def list_pictures(folder: Path, *, deep: bool = False) -> list[Path]:
    """The pictures in a folder, by their endings, sorted by name; hidden files are none.

    Args:
        folder: The folder.
        deep: Whether subfolders are looked into.
    """
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in visible(found, folder) if path.suffix.lower() in ENDINGS and path.is_file())
