"""Images of every format and mode are read in the colors that a viewer shows on white."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_bench.errors import StoreError
from nemo_bench.records import images
from nemo_bench.records.images import inspect_image, list_images, open_image, unreadable
from nemo_bench.records.store import thumbnail

SIZE = (8, 8)
RED, WHITE, PINK = (255, 0, 0), (255, 255, 255), (255, 127, 127)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def seen(path: Path) -> tuple[int, ...]:
    """The color of the upper left pixel."""
    image = open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def png_of_16_bits(values: np.ndarray, color: int) -> bytes:
    """A PNG of 16 bits a channel, by the specification: Pillow writes gray ones only.

    Args:
        values: (H, W, channels).
        color: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette(color: tuple[int, int, int], **info: Any) -> Image.Image:
    image = Image.new("P", SIZE, 0)
    image.putpalette([*color, 0, 0, 255])
    image.info.update(info)
    return image


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (128, PINK), (255, RED)])
def test_transparent_red_lies_on_white(tmp_path: Path, ending: str, alpha: int, expected: tuple[int, ...]) -> None:
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    path = saved(tmp_path / f"a.{ending}", Image.new("RGBA", SIZE, (*RED, alpha)), **options)
    assert seen(path) == expected
    shown = thumbnail(path, (4, 4))
    assert shown
    assert shown[0].getpixel((0, 0)) == expected


def test_transparent_gray_lies_on_white(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "a.png", Image.new("LA", SIZE, (0, 0)))) == WHITE
    assert seen(saved(tmp_path / "b.png", Image.new("LA", SIZE, (0, 51)))) == (204, 204, 204)
    assert seen(saved(tmp_path / "c.png", Image.new("LA", SIZE, (40, 255)))) == (40, 40, 40)


def test_a_transparent_color_lies_on_white(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "p.png", palette(RED), transparency=0)) == WHITE
    assert seen(saved(tmp_path / "p2.png", palette(RED), transparency=1)) == RED
    assert seen(saved(tmp_path / "p3.png", palette(RED), transparency=bytes([128, 255]))) == PINK
    assert seen(saved(tmp_path / "p.gif", palette(RED), transparency=0)) == WHITE
    assert seen(saved(tmp_path / "rgb.png", Image.new("RGB", SIZE, RED), transparency=RED)) == WHITE
    assert seen(saved(tmp_path / "rgb2.png", Image.new("RGB", SIZE, RED), transparency=(1, 2, 3))) == RED
    assert seen(saved(tmp_path / "l.png", Image.new("L", SIZE, 7), transparency=7)) == WHITE
    deep = Image.fromarray(np.full(SIZE, 9000, np.uint16))
    assert seen(saved(tmp_path / "l16.png", deep, transparency=9000)) == WHITE
    assert seen(saved(tmp_path / "l162.png", deep, transparency=9001)) == (35, 35, 35)


def test_premultiplied_images_lie_on_white() -> None:
    clear = Image.new("RGBA", SIZE, (*RED, 128)).convert("RGBa")
    assert images.to_rgb(clear).getpixel((0, 0)) == PINK
    own = palette(RED)
    own.putalpha(128)
    assert own.mode == "PA"
    assert images.to_rgb(own).getpixel((0, 0)) == PINK


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (25700, 100), (40000, 156), (65535, 255)])
@pytest.mark.parametrize("ending", ["png", "tif", "big.tif"])
def test_16_bits_of_gray_are_scaled(tmp_path: Path, ending: str, value: int, expected: int) -> None:
    array = np.full(SIZE, value, np.uint16)
    image = Image.frombytes("I;16B", SIZE, array.astype(">u2").tobytes()) if "big" in ending else Image.fromarray(array)
    assert seen(saved(tmp_path / f"a.{ending}", image)) == (expected,) * 3


def test_16_bits_of_color_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_of_16_bits(np.full((8, 8, 3), [65535, 25700, 0]), 2))
    assert seen(path) == (255, 100, 0)
    path.write_bytes(png_of_16_bits(np.full((8, 8, 4), [65535, 0, 0, 0]), 6))
    assert seen(path) == WHITE
    path.write_bytes(png_of_16_bits(np.full((8, 8, 2), [0, 13107]), 4))
    assert seen(path) == (204, 204, 204)


def test_32_bit_integers_are_16_bit_ones_or_refused(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "a.tif", Image.fromarray(np.full(SIZE, 25700, np.int32)))) == (100, 100, 100)
    for value in (65536, -1):
        path = saved(tmp_path / "b.tif", Image.fromarray(np.full(SIZE, value, np.int32)))
        with pytest.raises(StoreError, match=r"b\.tif .*expected 0 to 65535: save it with 8 or 16 bits"):
            open_image(path)


@pytest.mark.parametrize(("values", "expected"), [([0.2, 1.0], 51), ([51.0, 255.0], 51), ([0.0, 0.0], 0)])
def test_floats_are_scaled_by_their_range(tmp_path: Path, values: list[float], expected: int) -> None:
    image = Image.fromarray(np.array([values, values], np.float32))
    assert seen(saved(tmp_path / "a.tif", image)) == (expected,) * 3


@pytest.mark.parametrize("value", [-0.1, 255.5, float("nan"), float("inf")])
def test_floats_of_no_known_range_are_refused(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(np.full(SIZE, value, np.float32)))
    with pytest.raises(StoreError, match="expected 0 to 1 or 0 to 255"):
        open_image(path)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "a.png", Image.new("1", SIZE, 1))) == WHITE
    assert seen(saved(tmp_path / "b.png", Image.new("1", SIZE, 0))) == (0, 0, 0)


def test_palettes_and_gray_are_their_colors(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "a.png", palette(RED))) == RED
    assert seen(saved(tmp_path / "a.gif", palette((10, 20, 30)))) == (10, 20, 30)
    assert seen(saved(tmp_path / "b.png", Image.new("L", SIZE, 77))) == (77, 77, 77)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_an_image_with_an_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    """The corner of an upright image, by what the EXIF standard says of row 0 and column 0 of the stored one."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("black", (0, 0, 16, 16))
    top, left = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
    array = np.asarray(upright)
    if top in "LR":  # row 0 of the stored one is the left or right side
        array = array.transpose(1, 0, 2)
    rows = -1 if top in "BR" else 1
    columns = -1 if left in "BR" else 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{ending}", Image.fromarray(np.ascontiguousarray(array[::rows, ::columns])), exif=exif)
    opened = open_image(path)
    assert opened.size == (48, 32)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).mean() < 4
    shown = thumbnail(path, (24, 24))
    assert shown
    assert (shown[0].size, shown[1]) == ((24, 16), True)
    assert shown[0].getpixel((2, 2))[0] < 60  # type: ignore[index]
    assert inspect_image(path)[1:] == ((48, 32), "")


def test_an_image_with_damaged_exif_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("RGB", SIZE, RED), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff")
    assert np.abs(np.subtract(seen(path), RED)).max() < 3


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_counts(tmp_path: Path, ending: str) -> None:
    first, second = Image.new("RGB", SIZE, RED), Image.new("RGB", SIZE, "blue")
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(tmp_path / f"a.{ending}", first, save_all=True, append_images=[second], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2  # type: ignore[attr-defined]
    assert seen(path) == RED


def test_cmyk_is_the_complement_of_ink(tmp_path: Path) -> None:
    red = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    assert seen(saved(tmp_path / "a.tif", red)) == RED
    jpeg = saved(tmp_path / "a.jpg", red, quality=100)
    assert b"Adobe" in jpeg.read_bytes()  # so its values are inverted
    assert np.abs(np.subtract(seen(jpeg), RED)).max() < 3
    assert seen(saved(tmp_path / "b.tif", Image.new("CMYK", SIZE, (0, 0, 0, 255)))) == (0, 0, 0)


def test_color_profiles_are_ignored(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path = saved(tmp_path / "a.png", Image.new("RGB", SIZE, (200, 100, 50)), icc_profile=profile)
    assert seen(path) == (200, 100, 50)


def test_lab_is_its_color(tmp_path: Path) -> None:
    for lightness in (0, 255):
        path = saved(tmp_path / "a.tif", Image.new("LAB", SIZE, (lightness, 128, 128)))
        assert np.abs(np.subtract(seen(path), lightness)).max() < 3


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "page": lambda _: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tif"])
def test_damaged_images_are_refused(tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    good = saved(tmp_path / f"good.{ending}", Image.fromarray(noise))
    bad = tmp_path / f"bad.{ending}"
    bad.write_bytes(damage(good.read_bytes()))
    gone = tmp_path / "gone.png"
    found = unreadable([good, bad, gone, bad], "images")
    assert list(found) == [bad, gone]
    assert found[gone] == "No such file or directory"
    assert inspect_image(bad)[1:] == (None, found[bad])
    assert thumbnail(bad, (8, 8)) is None
    with pytest.raises(StoreError, match=rf"bad\.{ending} can't be read as an image"):
        open_image(bad)


def test_readable_images_are_decoded_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [saved(tmp_path / f"{number}.png", Image.new("RGB", SIZE, (number, 0, 0))) for number in range(3)]
    files[2].write_bytes(b"no image")
    decoded: list[Path] = []

    def inspect(path: Path, *, decode: bool) -> images.ImageFile:
        assert decode
        decoded.append(path)
        return inspect_image(path)

    monkeypatch.setattr(images, "inspect_image", inspect)
    for expected in (files, files[2:]):
        decoded.clear()
        assert list(unreadable(files, "images")) == files[2:]
        assert sorted(decoded) == expected
    saved(files[0], Image.new("RGB", (9, 9)))
    decoded.clear()
    assert list(unreadable(files, "images")) == files[2:]
    assert sorted(decoded) == [files[0], files[2]]
    # Another process knows of them too.
    code = (
        "import sys; from pathlib import Path; from nemo_bench.records import images; images.Image.open = None; "
        "print(len(images.unreadable(map(Path, sys.argv[1:]), 'images')))"
    )
    out = subprocess.run([sys.executable, "-c", code, *map(str, files[:2])], capture_output=True, text=True, check=True)
    assert out.stdout == "0\n"


def test_images_are_checked_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert unreadable([saved(tmp_path / "a.png", Image.new("RGB", SIZE))], "images") == {}


def test_hidden_files_are_not_listed(tmp_path: Path) -> None:
    root = tmp_path / ".hidden"  # folders above the listed one do not matter
    names = ["a.PNG", "sub/b.webp", "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".cache/c.png"]
    for name in [*names, "__MACOSX/d.png", "sub/@eaDir/e.jpg", "list.csv"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "folder.png").mkdir()
    assert list_images(root) == [root / "a.PNG"]
    assert list_images(root, deep=True) == [root / "a.PNG", root / "sub/b.webp"]
