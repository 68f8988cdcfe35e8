"""Make media.json: what transformers makes of pictures and videos of many sizes.

    OMP_NUM_THREADS=1 python tests/golden/vision/make_media.py        (needs torch and transformers; run by hand)

Pictures: its Qwen2VL image processor in the PIL form, on noise from a seed. Stored are the grid, a hash of the levels
0..255 that the pixel values stand for, row by row, and the one value that each level has: all of the pixels, in effect.
Videos: its Qwen3VLVideoProcessor needs torchvision to be made, so its functions are called one by one: sampling, sizes,
patch rows; timestamps are its processor's. Also prints how far torch's resize of uint8, which it uses where torchvision
is there, is from PIL's. Knows transformers' image and video processors. Knows nothing of this package.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

HERE = Path(__file__).resolve().parent
PICTURES, SAMPLINGS, VIDEO_SIZES = 220, 150, 150
PUBLISHED = {"shortest_edge": 65536, "longest_edge": 16777216}
SMALL = {"shortest_edge": 4096, "longest_edge": 65536}
VIDEO = {"shortest_edge": 4096, "longest_edge": 25165824}


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def digest(levels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(levels, dtype=np.uint8)).hexdigest()[:32]


def to_levels(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    levels = np.rint((values.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    assert np.array_equal(table[levels], values)
    return levels


def picture_sizes(rng: np.random.RandomState) -> list[tuple[int, int]]:
    sizes = [(1, 1), (1, 200), (200, 1), (31, 33), (48, 80), (256, 256), (255, 257), (16, 3200), (1024, 33), (272, 240)]
    while len(sizes) < PICTURES:
        height, width = (int(round(np.exp(rng.uniform(0, np.log(700))))) for _ in range(2))
        if max(height, width) <= 200 * min(height, width):
            sizes.append((height, width))
    return sizes


def pictures(rng: np.random.RandomState) -> tuple[list[dict[str, Any]], list[float]]:
    common = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processors = {
        "published": Qwen2VLImageProcessorPil(size=PUBLISHED, **common),
        "small": Qwen2VLImageProcessorPil(size=SMALL, **common),
    }
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    values = processors["published"](images=[Image.fromarray(ramp)], return_tensors="np")["pixel_values"]
    table = np.unique(values)
    assert table.dtype == np.float32 and len(table) == 256
    cases, differs, largest, count = [], 0, 0, 0
    for seed, (height, width) in enumerate(picture_sizes(rng)):
        limits = "published" if seed % 4 == 0 else "small"
        picture = noise(seed, height, width, 3)
        made = processors[limits](images=[Image.fromarray(picture)], return_tensors="np")
        grid = made["image_grid_thw"][0].tolist()
        levels = to_levels(made["pixel_values"], table)
        cases.append({"seed": seed, "size": [height, width], "limits": limits, "grid": grid, "levels": digest(levels)})
        size = (grid[1] * 16, grid[2] * 16)
        by_pil = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
        by_torch = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        difference = np.abs(by_torch.numpy().astype(int) - by_pil)
        differs, largest, count = differs + (difference > 0).sum(), max(largest, difference.max()), count + by_pil.size
    print(f"torch's resize of uint8 differs from PIL's in {differs / count:.2%} of values, by {largest} levels at most")
    return cases, table.tolist()


def samplings(rng: np.random.RandomState) -> list[dict[str, Any]]:
    """Which frames of how many, and when; the defaults of the processor: 2 a second, 4 to 768 frames."""
    cases = []
    for _ in range(SAMPLINGS):
        total = int(round(np.exp(rng.uniform(0, np.log(120_000)))))
        source_fps = [10.0, 12.5, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94, 60.0, 1.0][rng.randint(10)]
        fps = [None, None, None, 1.0, 0.5, 4.0, 3.3][rng.randint(7)]
        processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
        metadata = VideoMetadata(total_num_frames=total, fps=source_fps)
        indices = Qwen3VLVideoProcessor.sample_frames(processor, metadata, fps=fps)
        times = Qwen3VLProcessor._calculate_timestamps(None, indices.tolist(), source_fps, 2)
        both = json.dumps([indices.tolist(), times]).encode()
        cases.append({
            "total": total, "source_fps": source_fps, "fps": fps, "frames": len(indices),
            "indices": indices.tolist()[:6], "times": times[-3:], "all": hashlib.sha256(both).hexdigest()[:32],
        })  # fmt: skip
    return cases


def video_sizes(rng: np.random.RandomState) -> list[list[Any]]:
    """[frames, height, width, [height, width] after the resize]"""
    cases = []
    while len(cases) < VIDEO_SIZES:
        frames = 2 + rng.randint(767) if len(cases) % 2 else 2 + rng.randint(14)
        height, width = (int(round(np.exp(rng.uniform(0, np.log(4000))))) for _ in range(2))
        try:
            size = smart_resize(frames, height, width, 2, 32, VIDEO["shortest_edge"], VIDEO["longest_edge"])
        except ValueError:
            size = None
        if size is not None or len(cases) % 10 == 0:
            cases.append([int(frames), height, width, size])
    return cases


def videos(rng: np.random.RandomState, table: np.ndarray) -> list[dict[str, Any]]:
    """Whole videos: sizes and rows are the processor's, the resize is PIL's, frame by frame."""
    cases = []
    for seed, frames in enumerate([2, 3, 4, 5, 7, 8, 1]):
        height, width = 20 + rng.randint(200, size=2)
        video = noise(1000 + seed, frames, height, width, 3)
        limits = {"min_pixels": VIDEO["shortest_edge"], "max_pixels": 100_000}
        size = smart_resize(max(frames, 2), int(height), int(width), 2, 32, **limits)
        scaled = [np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC)) for f in video]
        tensor = torch.from_numpy(table[np.stack(scaled)]).permute(0, 3, 1, 2)[None]  # [1, F, 3, H, W]
        rows, *grid = Qwen3VLVideoProcessor.patchify(None, tensor, 16, 2, 2)
        levels = to_levels(rows[0].numpy(), table)
        cases.append({"seed": 1000 + seed, "shape": [frames, int(height), int(width), 3], "max_pixels": 100_000,
                      "grid": grid, "levels": digest(levels)})  # fmt: skip
    return cases


def main() -> None:
    rng = np.random.RandomState(35)
    cases, table = pictures(rng)
    content = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "limits": {"published": PUBLISHED, "small": SMALL, "video": VIDEO},
        "values": table,
        "pictures": cases,
        "samplings": samplings(rng),
        "video_sizes": video_sizes(rng),
        "videos": videos(rng, np.array(table, dtype=np.float32)),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    (HERE / "media.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
