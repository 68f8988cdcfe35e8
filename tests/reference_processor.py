"""transformers' Qwen3VLProcessor as the reference for prompts with pictures and videos, made without torchvision.

Knows how conversations, picture and video files become its inputs. Knows nothing of this package. Needs torch,
transformers and, for video files, PyAV.

Two things are not as transformers 5.23 does them by itself. Frames are resized by PIL, as its PIL image processor does
it for pictures, because resizing with torch needs torchvision; sampling, sizes, patches, times and placeholders stay
its own. And a video's placeholders are those that the model was released with: transformers from 5.12 on leaves a
vision_start before the first frame pair's time and a vision_end after the last pair's, outside of the pairs' own; that
outer pair is taken out of the text before transformers fills in the frames.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, load_video

ROUND_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


class _PilResize(BaseVideoProcessor):
    """What transformers asks torchvision for, done with PIL and torch."""

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any, **_: Any) -> torch.Tensor:
        def scaled(frame: torch.Tensor) -> torch.Tensor:
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            if picture.size != (size.width, size.height):
                picture = picture.resize((size.width, size.height), Image.Resampling(int(resample)))
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

        return torch.stack([torch.stack([scaled(frame) for frame in video]) for video in image])

    def normalize(self, image: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
        mean, std = (torch.as_tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (mean, std))
        return (image - mean) / std

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        return video


class PilVideoProcessor(Qwen3VLVideoProcessor, _PilResize):
    """Its super() is _PilResize."""


class _Processor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """Not checked: the base class of video processors cannot be looked up without torchvision."""


@dataclass(frozen=True)
class ReferencePrompt:
    """inputs: what the model takes, a batch of one (input_ids, attention_mask, mm_token_type_ids, pixel_values, ...).
    media: of each picture and video in the order of the prompt its kind, grid, timestamps and patch rows."""

    inputs: dict[str, torch.Tensor]
    media: tuple[tuple[str, tuple[int, int, int], tuple[float, ...], np.ndarray], ...]

    @property
    def tokens(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    def positions(self) -> tuple[np.ndarray, int]:
        """[3, T], rope delta."""
        ids, kinds = self.inputs["input_ids"], self.inputs["mm_token_type_ids"]
        grids = {name: self.inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions, deltas = Qwen3_5Model.get_rope_index(_Positions(), ids, mm_token_type_ids=kinds, **grids)
        return positions[:, 0].numpy(), int(deltas[0, 0])


class _Positions:
    """As much of the model as its get_rope_index asks for."""

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    get_vision_position_ids = Qwen3_5Model.get_vision_position_ids


class ReferenceProcessor:
    """Of a folder with tokenizer.json, chat_template.jinja and both preprocessor_config.json."""

    def __init__(self, folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
        images, videos = (
            json.loads((folder / name).read_text())
            for name in ("preprocessor_config.json", "video_preprocessor_config.json")
        )
        self.image_size, self.video_size = images["size"], videos["size"]
        self.processor = _Processor(
            image_processor=Qwen2VLImageProcessorPil(**_settings(images)),
            tokenizer=tokenizer,
            video_processor=PilVideoProcessor(**_settings(videos), cap_pixels_per_frame=False),
            chat_template=(folder / "chat_template.jinja").read_text(),
        )

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        fps: float | None = None,
        max_pixels: int | None = None,
    ) -> ReferencePrompt:
        """messages: pictures as {"type": "image", "image": PIL image or path}, videos as {"type": "video", "video":
        path, or frames [F, H, W, 3] or a list of PIL images, which count as taken at `fps`}. max_pixels: of a picture;
        a prompt with videos cannot have it."""
        parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
        shown = [(part["type"], part[part["type"]]) for part in parts if part["type"] in ("image", "video")]
        images = [_picture(source) for kind, source in shown if kind == "image"]
        videos = [self._frames(source, fps) for kind, source in shown if kind == "video"]
        assert max_pixels is None or not videos
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        text = self.processor.apply_chat_template(
            [dict(message) for message in messages], tools=tools, add_generation_prompt=True, **thinking
        )
        assert text.count(ROUND_VIDEO) == len(videos)
        size = dict(self.image_size)
        if max_pixels is not None:
            size = {"longest_edge": max_pixels, "shortest_edge": min(size["shortest_edge"], max_pixels)}
        options: dict[str, Any] = {"images_kwargs": {"size": size}} if images else {}
        if videos:
            metadata = [metadata for _, metadata in videos]
            options["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": False}
        made = self.processor(
            text=[text.replace(ROUND_VIDEO, "<|video_pad|>")],
            images=images or None,
            videos=[frames for frames, _ in videos] or None,
            return_tensors="pt",
            **options,
        )
        times = [
            self.processor._calculate_timestamps(list(metadata.frames_indices), float(metadata.fps), 2)
            for _, metadata in videos
        ]
        return ReferencePrompt(dict(made), _in_order([kind for kind, _ in shown], made, times))

    def _frames(self, source: Any, fps: float | None) -> tuple[np.ndarray, VideoMetadata]:
        """Of a file the frames that the video processor samples, decoded by PyAV; of frames all."""
        if isinstance(source, (str, Path)):
            sample = self.processor.video_processor.sample_frames

            def indices(metadata: VideoMetadata, **_: Any) -> np.ndarray:
                return sample(metadata, fps=fps)

            frames, metadata = load_video(str(source), backend="pyav", sample_indices_fn=indices)
            assert len(frames) == len(metadata.frames_indices)
            return frames, metadata
        frames = np.stack([np.asarray(frame) for frame in source])
        rate = fps or self.processor.video_processor.fps
        count = len(frames)
        return frames, VideoMetadata(total_num_frames=count, fps=float(rate), frames_indices=list(range(count)))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.endswith("_type") and k != "processor_class"}


def _picture(source: Any) -> Image.Image:
    if isinstance(source, (str, Path)):
        with Image.open(source) as picture:
            return picture.convert("RGB")
    return source


def _in_order(kinds: list[str], made: Mapping[str, torch.Tensor], times: list[list[float]]) -> tuple:
    """The processor's outputs, pictures apart from videos, as the prompt has them."""
    by_kind = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grid in made:
            grids = [tuple(map(int, row)) for row in made[grid]]
            rows = made[pixels].split([t * h * w for t, h, w in grids])
            by_kind[kind] = iter(zip(grids, [r.numpy() for r in rows], strict=True))
    clocks = iter(times)
    media = []
    for kind in kinds:
        grid, rows = next(by_kind[kind])
        media.append((kind, grid, tuple(next(clocks)) if kind == "video" else (), rows))
    return tuple(media)
