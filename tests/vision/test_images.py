"""Pictures in every form, and their patch rows against what transformers' image processor made of the same ones."""

import base64
import hashlib
import io
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.vision import Media, images
from mlx_qwen35.vision.images import ImageLimits, open_image, prepare_image, smart_resize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/vision/media.json").read_text())
VALUES = np.array(GOLDEN["values"], dtype=np.float32)
CONFIG = {
    "size": {"longest_edge": 65536, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
LIMITS = ImageLimits.from_config(CONFIG)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def digest_of_levels(pixels: np.ndarray) -> str:
    """Of the levels 0..255 that the values stand for; each value lies within 1e-6 of transformers' for its level."""
    levels = np.rint((pixels.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    assert np.abs(VALUES[levels] - pixels).max() <= 1e-6
    return hashlib.sha256(levels).hexdigest()[:32]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_equal_to_transformers() -> None:
    """Grids and all pixel values, for 220 sizes."""
    wrong = []
    for case in GOLDEN["pictures"]:
        limits = ImageLimits.from_config(CONFIG | {"size": GOLDEN["limits"][case["limits"]]})
        media = prepare_image(noise(case["seed"], *case["size"], 3), limits)
        if list(media.grid) != case["grid"] or digest_of_levels(media.pixels) != case["levels"]:
            wrong.append((case["size"], media.grid, case["grid"]))
    assert not wrong
    assert len(GOLDEN["pictures"]) >= 200


@pytest.mark.parametrize(("height", "width"), [(736, 800), (736, 790), (730, 800), (730, 801), (3000, 60), (1300, 900)])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_large_pictures_in_strips(height: int, width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads: the bits of one resize of the whole."""
    monkeypatch.setattr(images, "_THREADS", threads)
    monkeypatch.setattr(images, "_WORTH_THREADS", 1)
    limits = ImageLimits.from_config(CONFIG | {"size": {"shortest_edge": 4096, "longest_edge": 800 * 740}})
    media = prepare_image(noise(height, height, width, 3), limits)
    _, h, w = media.grid
    rows = media.pixels.reshape(h // 2, w // 2, 2, 2, 3, 2, 16, 16).transpose(5, 0, 2, 6, 1, 3, 7, 4)
    whole = Image.fromarray(noise(height, height, width, 3)).resize((w * 16, h * 16), Image.Resampling.BICUBIC)
    for frame in rows.reshape(2, h * 16, w * 16, 3):
        assert np.array_equal(frame, VALUES[np.asarray(whole)])


def test_rows_and_their_order() -> None:
    """Each pixel where (t, h/2, w/2, 2, 2) x (c, 2, 16, 16) puts it, found one by one; mean and std of each colour."""
    limits = ImageLimits.from_config(CONFIG | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2.0]})
    picture = noise(7, 96, 64, 3)
    media = prepare_image(picture, limits)
    assert media.grid == (1, 6, 4) and media.pixels.shape == (24, 1536) and media.tokens == 6
    assert media.pixels.dtype == np.float32
    for y, x, c, frame in [(0, 0, 0, 0), (95, 63, 2, 1), (33, 47, 1, 0), (20, 5, 2, 1), (64, 31, 0, 1)]:
        row = ((y // 32) * 2 + x // 32) * 4 + (y // 16 % 2) * 2 + x // 16 % 2
        column = ((c * 2 + frame) * 16 + y % 16) * 16 + x % 16
        expected = (picture[y, x, c] / 255 - limits.mean[c]) / limits.std[c]
        assert media.pixels[row, column] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "result"),
    [(1, 1, (64, 64)), (1, 200, (32, 928)), (256, 256, (256, 256)), (4000, 3000, (288, 192)), (47, 49, (64, 96))],
)
def test_smart_resize(height: int, width: int, result: tuple[int, int]) -> None:
    assert smart_resize(height, width, factor=32, min_pixels=4096, max_pixels=65536) == result


def test_max_pixels() -> None:
    picture = noise(1, 250, 250, 3)
    assert prepare_image(picture, LIMITS).grid == (1, 16, 16)
    assert prepare_image(picture, LIMITS, max_pixels=16384).grid == (1, 8, 8)
    assert prepare_image(picture, LIMITS, max_pixels=1024).grid == (1, 2, 2)  # under the checkpoint's least, too
    with pytest.raises(PromptError, match="max_pixels 1023 .* raise it"):
        prepare_image(picture, LIMITS, max_pixels=1023)


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    picture = noise(3, 40, 70, 3)
    data = encoded(Image.fromarray(picture))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [
        picture, picture.transpose(2, 0, 1), mx.array(picture), picture / 255, Image.fromarray(picture), path,
        str(path), path.as_uri(), data, bytearray(data), memoryview(data), io.BytesIO(data), open(path, "rb"),
        f"data:image/png;base64,{text}", f"data:;base64,{text.rstrip('=')}",
        f"DATA:image/png;base64,{text[:9]}\n{text[9:]}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ]  # fmt: skip
    for source in sources:
        assert np.array_equal(open_image(source), picture), str(source)[:40]
    sources[12].close()


def test_modes() -> None:
    """Grey, 16 bits, palette, CMYK, one bit: the levels that they stand for."""
    grey = noise(4, 33, 40)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    sixteen = grey.astype(np.uint16) * 257
    assert np.array_equal(open_image(grey), rgb) and np.array_equal(open_image(grey[..., None]), rgb)
    assert np.array_equal(open_image(Image.fromarray(grey)), rgb)
    assert np.array_equal(open_image(encoded(Image.fromarray(sixteen))), rgb)
    assert np.array_equal(open_image(sixteen), rgb)
    assert np.array_equal(open_image(Image.fromarray(sixteen.astype(np.int32))), rgb)
    assert np.array_equal(open_image(Image.fromarray((grey / 255).astype(np.float32))), rgb)
    assert np.asarray(open_image(np.array([[128, 129]], dtype=np.uint16))).tolist() == [[[0, 0, 0], [1, 1, 1]]]
    assert np.array_equal(open_image(grey > 99), (rgb > 99) * 255)
    assert np.array_equal(open_image(Image.fromarray(grey).convert("1").convert("L")), open_image(
        encoded(Image.fromarray(grey).convert("1"))))  # fmt: skip
    palette = Image.fromarray(noise(5, 33, 40, 3)).quantize(17)
    assert np.array_equal(open_image(encoded(palette, "GIF")), palette.convert("RGB"))
    assert open_image(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


def test_transparency_lies_over_white() -> None:
    """Alpha in RGBA, LA, a palette, an array, and the transparent colour of a PNG without alpha."""
    colours = noise(6, 20, 30, 4)
    alpha = colours[..., 3:].astype(float) / 255
    expected = colours[..., :3] * alpha + 255 * (1 - alpha)
    for source in (colours, Image.fromarray(colours), encoded(Image.fromarray(colours))):
        assert np.abs(np.asarray(open_image(source)) - expected).max() <= 1
    grey = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 0)])
    assert open_image(encoded(grey)).getpixel((0, 0)) == (255, 255, 255)
    red = Image.new("RGB", (3, 1), (255, 0, 0))
    red.putpixel((1, 0), (0, 0, 9))
    marked = open_image(encoded(red, transparency=(0, 0, 9)))
    assert [marked.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (255, 0, 0)]
    palette = red.quantize(2)
    hidden = palette.getpixel((1, 0))
    assert open_image(encoded(palette, transparency=hidden)).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    """A file that says how it was turned comes out as the picture was seen; so does the opened image."""
    seen = noise(8, 30, 50, 3)
    undo = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.transpose(1, 0, 2),
            6: np.rot90(seen), 7: seen[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(seen, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(undo)), exif=exif)
    assert np.array_equal(open_image(data), seen)
    assert np.array_equal(open_image(Image.open(io.BytesIO(data))), seen)


def test_damaged_exif_is_no_reason_to_refuse(recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(Image.fromarray(noise(9, 30, 50, 3)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_image(data).size == (50, 30) and not recwarn.list


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_head(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (14_000, 14_000), (16_000, 16_000)])
def test_decompression_bomb(size: tuple[int, int]) -> None:
    with pytest.raises(PromptError, match="pixels.*scale it down"):
        open_image(png_head(*size))


def test_large_but_allowed_is_quiet(recwarn: pytest.WarningsRecorder) -> None:
    """From 89 million pixels on PIL warns; the file is short, so that it fails after the check, not at it."""
    with pytest.raises(PromptError, match="cannot be read to its end"):
        open_image(png_head(10_000, 10_000))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "10 bytes is no picture that can be read; check"),  # and no object at 0x...
        (b"", "no picture that can be read"),
        (encoded(Image.fromarray(noise(1, 90, 90, 3)))[:9000], "cannot be read to its end"),
        (encoded(Image.fromarray(noise(1, 90, 90, 3)), "JPEG")[:3000], "cannot be read to its end"),
        ("nowhere/there.png", "no picture at nowhere/there.png; check the path"),
        (".", "no picture at ."),
        ("zero\0byte", "no picture at"),
        ("x" * 9999, r"9999 characters"),
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png;base64", "no comma"),
        ("http://127.0.0.1:9/a.png", "not fetched unless asked for"),
        ("HTTPS://127.0.0.1:9/a.png", "not fetched unless asked for"),
        (7, "not int"),
        ("", "no picture at ''; check the path"),
        (None, "not NoneType"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 1.5), "from 0 to 1"),
        (np.full((4, 4), np.nan), "from 0 to 1"),
        (np.zeros((5, 4, 2), np.uint8), r"\[5, 4, 2\] is no picture"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\] is no picture"),
        (np.zeros((2, 4, 4, 3), np.uint8), "is no picture"),
        (np.zeros((1, 201, 3), np.uint8), "201 x 1 pixels is more than 200 times"),
        (np.zeros((401, 2, 3), np.uint8), "more than 200 times"),
    ],
)
def test_refusals(source: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prepare_image(source, LIMITS)


def test_fetches_when_asked_to() -> None:
    data = encoded(Image.fromarray(noise(2, 40, 40, 3)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(open_image(f"{address}/a.png", fetch=True), noise(2, 40, 40, 3))
        with pytest.raises(PromptError, match="could not be fetched.*404"):
            open_image(f"{address}/b.png", fetch=True)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": None}, "patch_size is None"),
        ({"merge_size": 0}, "merge_size is 0"),
        ({"temporal_patch_size": 2.5}, "temporal_patch_size is 2.5"),
        ({"size": None}, "min_pixels is None"),
        ({"size": {"height": 4}}, "min_pixels is None"),
        ({"size": 448}, "size is 448"),
        ({"min_pixels": 9, "max_pixels": 8}, "at least 9 pixels and at most 8"),
        ({"image_mean": [0.5]}, "image_mean is .*three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"do_normalize": False}, "do_normalize is False; only True"),
        ({"resample": 2}, "resample is 2; only 3"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ],
)
def test_wrong_config(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ImageLimits.from_config(CONFIG | change)


def test_config_forms() -> None:
    assert LIMITS.factor == 32 and (LIMITS.min_pixels, LIMITS.max_pixels) == (4096, 65536)
    old = {key: value for key, value in CONFIG.items() if key != "size"} | {"min_pixels": 4096, "max_pixels": 65536}
    assert ImageLimits.from_config(old) == LIMITS
    assert ImageLimits.from_config(CONFIG | {"max_pixels": 9999}).max_pixels == 9999


def test_media_keys() -> None:
    """One key for one content, whatever it came from; another for any other pixel, grid or kind."""
    picture = noise(1, 64, 96, 3)
    media = prepare_image(picture, LIMITS)
    assert prepare_image(encoded(Image.fromarray(picture)), LIMITS).key == media.key
    other = picture.copy()
    other[63, 95, 2] ^= 1
    keys = {
        media.key,
        prepare_image(other, LIMITS).key,
        Media("image", media.pixels, (1, 6, 4)).key,
        Media("video", media.pixels, (1, 4, 6)).key,
    }
    assert len(keys) == 4 and media.grid == (1, 4, 6)
    with pytest.raises(ValueError, match="read-only"):
        media.pixels[0, 0] = 0
    assert mx.array(media.pixels).shape == (24, 1536)


def test_levels_are_kept_and_pixel_values_made() -> None:
    """A quarter of the memory; any rows by themselves; other mean or std, other values and another key."""
    limits = ImageLimits.from_config(CONFIG | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2.0]})
    media = prepare_image(noise(1, 64, 96, 3), limits)
    assert media.rows.levels.dtype == np.uint8 and media.rows.levels.nbytes * 4 == media.pixels.nbytes
    levels = media.rows.levels.reshape(24, 3, -1).astype(np.float32)
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (limits.mean, limits.std))
    assert np.array_equal(media.pixels, ((levels / np.float32(255) - mean) / std).reshape(24, -1))
    assert np.array_equal(media.rows[5:9], media.pixels[5:9]) and len(media.rows) == 24
    plain = prepare_image(noise(1, 64, 96, 3), LIMITS)
    assert np.array_equal(plain.rows.levels, media.rows.levels) and plain.key != media.key
    assert np.array_equal(Media("image", media.pixels, media.grid).pixels, media.pixels)
    with pytest.raises(ValueError, match="read-only"):
        media.rows.levels[0, 0] = 0


@pytest.mark.parametrize(
    ("kind", "rows", "grid", "times", "message"),
    [
        ("sound", 4, (1, 2, 2), (), "kind"),
        ("image", 5, (1, 2, 2), (), r"\[5, 6\] do not fit"),
        ("image", 8, (2, 2, 2), (), "t = 2"),
        ("image", 4, (1, 2, 2), (0.0,), "t = 1 and 1"),
        ("image", 3, (1, 1, 3), (), "cannot be merged"),
        ("video", 8, (2, 2, 2), (0.0,), "1 timestamps for 2"),
        ("video", 0, (0, 2, 2), (), "at least 1"),
    ],
)
def test_media_that_do_not_fit(kind: str, rows: int, grid: tuple, times: tuple, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Media(kind, np.zeros((rows, 6), np.float32), grid, times)
