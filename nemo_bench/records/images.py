"""Reads every image file: generated, external, reference and real images."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_bench.errors import StoreError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Endings of image files, in lower case."""
LEFT_BY_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
"""Folders that operating systems create; ignored like hidden ones."""
MANY = 500
"""Least number of images to decode that gets a progress bar."""
_RULES = "1"
"""Version of the rules of :func:`to_rgb`; a new one has all images decoded again."""
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
"""Transposition that turns an image upright, by its EXIF orientation."""
_readable: set[str] = set()
"""Keys of the files that this process or an earlier one decoded without an error."""


class ImageFile(NamedTuple):
    """An image file and its properties."""

    sha256: str  #: Digest of the file; empty if it can't be read.
    size: tuple[int, int] | None  #: Width and height in pixels; None if not decoded.
    problem: str  #: Why the file can't be read; empty if it can.


def open_image(path: Path) -> Image.Image:
    """Reads an image as RGB by the rules of :func:`to_rgb`.

    Raises:
        StoreError: The file is missing or can't be decoded to its end.
    """
    try:
        return _open(path)
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        msg = f"{path} can't be read as an image ({_reason(error)}); replace it, or, if a run made it, delete it and"
        raise StoreError(f"{msg} run again") from error


def inspect_image(path: Path | str, *, decode: bool = True) -> ImageFile:
    """Hashes an image file and, by default, decodes it to its end."""
    try:
        content = Path(path).read_bytes()
        size = _open(io.BytesIO(content)).size if decode else None
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        return ImageFile("", None, _reason(error))
    return ImageFile(hashlib.sha256(content).hexdigest(), size, "")


def inspect_images(
    paths: Sequence[Path | str], what: str, *, decode: bool = True, progress: bool = True
) -> list[ImageFile]:
    """Inspects image files in threads; many get a bar on a terminal, which calls them ``what``."""
    columns = (TextColumn(f"check {what}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = progress and len(paths) >= MANY and sys.stderr.isatty()
    with (
        Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as bar,
        ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool,
    ):
        files = pool.map(partial(inspect_image, decode=decode), paths)
        return list(bar.track(files, total=len(paths)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to upright 8-bit RGB, the form in which images are compared.

    - Transparency of any form (RGBA, LA, PA, palette, a transparent color): laid on white.
    - 16 bits a channel, or 32-bit integers of that range: 65535 becomes 255.
    - Floats: scaled from 0 to 1, else rounded from 0 to 255.
    - EXIF orientation: applied. Color profile: ignored. Animation, several pages: the first frame.
    - CMYK: the complement of the inks; CMYK JPEG files hold inverted values, as Adobe writes them.

    Args:
        image: An image that Pillow opened; it is decoded to its end.

    Raises:
        ValueError: Values are out of these ranges.
        OSError: The image is damaged.
    """
    image.load()
    orientation = 1
    with suppress(Exception):  # EXIF data are often damaged where the image is not
        orientation = image.getexif().get(_ORIENTATION, 1)
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _eight_bits(image).convert("RGB")
    elif image.has_transparency_data or image.mode == "RGBa":
        clear = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales gray values of more than 8 bits to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    is_float = image.mode == "F"
    if not (low >= 0 and high <= (255 if is_float else 65535)):  # also refuses NaN
        expected = "0 to 1 or 0 to 255: save it with 8 bits" if is_float else "0 to 65535: save it with 8 or 16 bits"
        raise ValueError(f"values from {low:g} to {high:g}; expected {expected}")
    if is_float:
        scaled = values * 255 if high <= 1 else values
    else:
        scaled = values * (255 / 65535)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
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


def unreadable(paths: Iterable[Path], what: str) -> dict[Path, str]:
    """Finds images that can't be decoded to their end.

    Files that were decoded before are skipped until they change. ``nemo_bench/images.txt`` in the user's cache folder
    (``XDG_CACHE_HOME``) lists them; it may be deleted at any time.

    Returns:
        The reason for each unreadable file, in the order given.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_bench" / "images.txt"
    with suppress(OSError):
        _readable.update(cache.read_text(encoding="ascii", errors="replace").split())
    keys = {path: _key(path) for path in dict.fromkeys(paths)}
    pending = [path for path, key in keys.items() if key not in _readable]
    if not pending:
        return {}
    images = inspect_images(pending, what)
    problems = {path: image.problem for path, image in zip(pending, images, strict=True) if image.problem}
    new = {keys[path] for path in pending if path not in problems} - {""}
    _readable.update(new)
    with suppress(OSError):  # without a cache every process decodes for itself
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="ascii") as file:
            file.write("".join(f"{key}\n" for key in new))
    return problems


def _key(path: Path) -> str:
    """Digest of a file's path, size, time and decoder; empty if there is no such file."""
    try:
        about = path.stat()
    except OSError:
        return ""
    text = f"{_RULES} {PIL.__version__} {path.resolve()} {about.st_size} {about.st_mtime_ns}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def visible(paths: Iterable[Path], root: Path) -> Iterator[Path]:
    """Leaves out files whose name or folder below a root begins with a dot or belongs to the operating system."""
    for path in paths:
        if not any(name.startswith(".") or name in LEFT_BY_SYSTEMS for name in path.relative_to(root).parts):
            yield path


def list_images(folder: Path, *, deep: bool = False) -> list[Path]:
    """The visible image files of a folder, and of those in it if ``deep``, by their endings, sorted by path."""
    paths = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in visible(paths, folder) if path.suffix.lower() in ENDINGS and path.is_file())
