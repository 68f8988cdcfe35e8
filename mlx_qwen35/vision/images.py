"""A picture in any form to patch rows, as the checkpoint's image processor makes them.

Knows picture files and arrays, how large a picture may be, and the resize. Knows nothing of video or the
model.

Sizes, resize and pixel values are those of transformers' Qwen2VL image processor in its PIL form: bicubic on whole
levels 0..255, by PIL. Where torchvision is installed transformers resizes with torch instead. On pictures of noise 2 %
of the values then differ, by one level (0.008), except where one side grows while the other shrinks: there 31 % do, by
up to 23 levels.
What transformers does not do here: transparency is laid over white (it drops it, and what lies under it shows), and 16
bits are scaled to 8 (it clips them).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mlx_qwen35.errors import PromptError
from mlx_qwen35.vision.media import Media
from mlx_qwen35.vision.patches import Patches, read_patches
from mlx_qwen35.vision.sources import open_source

if TYPE_CHECKING:
    from PIL import Image

LARGEST_PIXELS = 178_956_970  # 14 times a 4K frame, 0.7 GB once read; beyond that a small file is a bomb
LARGEST_RATIO = 200
_THREADS = min(8, os.cpu_count() or 1)
_WORTH_THREADS = 1 << 19  # pixels; below, starting threads costs what they save
_ORIENTATION = 0x0112  # the EXIF tag
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"mif1"}  # brands of still pictures (ISO/IEC 23008-12, table of brands)
_LONGEST_HEAD = 256  # bytes; where a file says what it is


@dataclass(frozen=True)
class ImageLimits(Patches):
    """preprocessor_config.json, checked. min_pixels and max_pixels are those of a picture once it is resized."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "preprocessor_config.json") -> ImageLimits:
        """Raises CheckpointError naming the key that is missing or wrong."""
        return cls(**read_patches(config, where))


def prepare_image(source: object, limits: ImageLimits, *, max_pixels: int | None = None, fetch: bool = False) -> Media:
    """`source` as in `open_image`; max_pixels: instead of the checkpoint's limit, to spend fewer (or more) tokens: one
    for 32 x 32 pixels. Raises PromptError for what cannot become a picture."""
    highest = check_max_pixels(max_pixels, limits) or limits.max_pixels
    image = open_image(source, fetch=fetch)
    height, width = smart_resize(
        image.height,
        image.width,
        factor=limits.factor,
        min_pixels=min(limits.min_pixels, highest),
        max_pixels=highest,
    )
    rows = limits.empty_rows(1, height, width)
    _fill(image, height, width, limits, rows)
    return Media("image", *limits.flat(rows), merge_size=limits.merge_size)


def _fill(image: Image.Image, height: int, width: int, limits: ImageLimits, rows: np.ndarray) -> None:
    """RGB picture -> `rows`, resized on the way. Large ones in strips, a thread each, to the same bits: PIL resizes
    lines first, each on its own, then columns, each on its own."""
    from PIL.Image import new as new_image

    frames = range(limits.temporal_size)
    if height * width < _WORTH_THREADS or _THREADS == 1:
        limits.write(resize(image, height, width), rows, frames)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        if image.width != width:

            def lines(top: int, end: int, whole: Image.Image = image) -> Image.Image:
                return resize(whole.crop((0, top, whole.width, end)), end - top, width)

            tops = _cuts(image.height)
            strips = [pool.submit(lines, top, end) for top, end in pairwise(tops)]
            wide = new_image("RGB", (width, image.height))
            for strip, top in zip(strips, tops, strict=False):
                wide.paste(strip.result(), (0, top))
            image = wide

        def columns(first: int, end: int) -> None:
            strip = image.crop((first * limits.factor, 0, end * limits.factor, image.height))
            limits.write(resize(strip, height, strip.width), rows[:, :, first:end], frames)

        for done in [pool.submit(columns, first, end) for first, end in pairwise(_cuts(width // limits.factor))]:
            done.result()


def _cuts(length: int) -> list[int]:
    """0..length in as many parts as there are threads, none of them empty"""
    return sorted({length * part // _THREADS for part in range(_THREADS + 1)})


def check_max_pixels(max_pixels: int | None, limits: Patches) -> int | None:
    if max_pixels is not None and max_pixels < limits.factor**2:
        raise PromptError(f"max_pixels {max_pixels} is less than one token has ({limits.factor**2}); raise it")
    return max_pixels


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """-> (height, width): multiples of `factor` near the given ones, the product within the limits, the ratio about the
    same. Raises PromptError for a ratio over 200."""
    check_ratio(height, width)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide


def check_ratio(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise PromptError(f"a picture of {width} x {height} pixels is empty")
    if max(height, width) > LARGEST_RATIO * min(height, width):
        raise PromptError(
            f"a picture of {width} x {height} pixels is more than {LARGEST_RATIO} times as long as it is wide; crop it"
        )


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    from PIL import Image

    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def open_image(source: object, *, fetch: bool = False) -> Image.Image:
    """-> the picture upright, in RGB, 8 bits; with transparency over white, of an animation the first frame

    source: a path, bytes, a data: URL, an open file, a PIL image, or an array ([H, W], [H, W, 1, 3 or 4] or channels
    first; uint8, uint16, bool, or floats from 0 to 1). An http(s) URL is fetched only with `fetch`.
    Raises PromptError for what is no readable picture, or is one of more than LARGEST_PIXELS pixels.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return rgb(_loaded(source, "the picture"))
    if hasattr(source, "__array__"):
        return rgb(_from_array(np.asarray(source)))
    place, name = open_source(source, "picture", fetch=fetch)
    return rgb(_loaded(open_picture(place, name), name))


def file_kind(place: Path | BinaryIO) -> str | None:
    """"heif" for a still picture in HEIC or HEIF, "webp" for WebP, still or not; None for all else, AVIF too."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            head = file.read(_LONGEST_HEAD)
    else:
        at = place.tell()
        head = place.read(_LONGEST_HEAD)
        place.seek(at)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] != b"ftyp":
        return None
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = {box[at : at + 4] for at in (0, *range(8, len(box) - 3, 4))}  # its own, a version, those it also is
    return "heif" if box[:4] in _HEIF and not brands & {b"avif", b"avis"} else None


def open_picture(place: Path | BinaryIO, name: str) -> Image.Image:
    """-> the picture, its pixels not read yet; name: what to call it in errors. Raises PromptError."""
    from PIL import Image

    if file_kind(place) == "heif":
        _register_heif(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs: LARGEST_PIXELS decides; of metadata: they are not used
        try:
            image = Image.open(place)
        except Image.DecompressionBombError as error:
            raise PromptError(f"{name} has too many pixels ({error}); scale it down") from None
        except Image.UnidentifiedImageError as error:  # which shows the object that was read from
            raise PromptError(f"{name} is no picture that can be read; check the file") from error
        except Exception as error:  # readers raise anything on damaged data, struct.error and SyntaxError included
            raise PromptError(f"{name} is no picture that can be read ({error}); check the file") from error
    if image.width * image.height > LARGEST_PIXELS:
        raise PromptError(f"{name} has {image.width} x {image.height} pixels, too many to be read; scale it down")
    return image


def _register_heif(name: str) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise PromptError(
            f"{name} is HEIC or HEIF, which needs pillow-heif ({error}): pip install pillow-heif, or save it as JPEG"
        ) from None
    pillow_heif.register_heif_opener()


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """All of its pixels in memory, upright"""
    if image.width * image.height > LARGEST_PIXELS:
        raise PromptError(f"{name} has {image.width} x {image.height} pixels, too many to be read; scale it down")
    try:
        image.load()
    except Exception as error:
        raise PromptError(f"{name} cannot be read to its end ({error}); check the file") from error
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture, turned as its EXIF asks for"""
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF in a picture that reads well: nothing says that it lies on its side
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def rgb(image: Image.Image) -> Image.Image:
    """A loaded picture in RGB, 8 bits, with transparency over white"""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits, in 32 for some readers
        return rgb(_from_array(np.asarray(image).clip(0, 65535).astype(np.uint16)))
    if image.mode == "F":
        return rgb(_from_array(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    shape = list(array.shape)
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise PromptError(f"an array of {shape} is no picture; give [H, W] or [H, W, 3]")
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257  # 0..65535 -> 0..255, rounded
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.min(array) >= 0 and np.max(array) <= 1):  # false for NaN too
            raise PromptError("an array of floats is a picture if all lie from 0 to 1; scale them, or give uint8")
        array = np.rint(array.astype(np.float64) * 255)
    elif array.dtype != np.uint8:
        raise PromptError(f"an array of {array.dtype} is no picture; give uint8 levels, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))
