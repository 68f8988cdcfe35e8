"""How a checkpoint wants pictures and videos prepared, from the files beside its weights.

Knows the names of those files and that they fit the tower. Knows nothing of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.text.files import Folder, read_json_object
from mlx_qwen35.vision.images import ImageLimits
from mlx_qwen35.vision.patches import Patches
from mlx_qwen35.vision.video import VideoLimits

if TYPE_CHECKING:
    from mlx_qwen35.config import VisionConfig

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
_TOGETHER = "processor_config.json"  # newer transformers put both in it

_Limits = TypeVar("_Limits", bound=Patches)


@dataclass(frozen=True)
class MediaLimits:
    """What the two preprocessor files say; None where the checkpoint has no such file."""

    image: ImageLimits | None
    video: VideoLimits | None


def read_limits(folder: Folder, vision: VisionConfig) -> MediaLimits:
    """Raises CheckpointError naming the file and key that are wrong, or do not fit the vision tower."""
    image, video = (_content(folder, name, key) for name, key in ((IMAGE_FILE, "image"), (VIDEO_FILE, "video")))
    return MediaLimits(
        image and _fitting(ImageLimits.from_config(image[0], where=image[1]), vision, image[1]),
        video and _fitting(VideoLimits.from_config(video[0], where=video[1]), vision, video[1]),
    )


def _content(folder: Folder, name: str, kind: str) -> tuple[Mapping[str, Any], str] | None:
    """The settings of one kind and where they stand: in a file of their own, or in the one for both."""
    path = folder / name
    if path.exists():
        return read_json_object(path), str(path)
    path = folder / _TOGETHER
    nested = read_json_object(path, optional=True).get(f"{kind}_processor")
    if nested is None:
        return None
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{path}: {kind}_processor is {nested!r:.40}, not an object; download the file again")
    return nested, f"{path}: {kind}_processor"


def _fitting(limits: _Limits, vision: VisionConfig, where: str) -> _Limits:
    pairs = {
        "patch_size": (limits.patch_size, vision.patch_size),
        "merge_size": (limits.merge_size, vision.spatial_merge_size),
        "temporal_patch_size": (limits.temporal_size, vision.temporal_patch_size),
        "channels (image_mean)": (len(limits.mean), vision.in_channels),
    }
    for key, (here, there) in pairs.items():
        if here != there:
            raise CheckpointError(
                f"{where}: {key} is {here}, the vision tower of config.json has {there}; take both from one checkpoint"
            )
    return limits
