"""Questions about pictures and videos as a user has them: a text, and files on disk. Knows files, no tokens, no arrays.

PNG keeps every level; JPEG (quality 90) and MP4 (H.264 by x264, two frames a second) are what cameras and films are
like: colours at half size, and a little noise. Needs PyAV for videos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from case import Case
from PIL import Image

FILES = {"image": ("png", "jpeg"), "video": ("mp4",)}  # of each kind of media those that are written
JPEG_QUALITY, FPS, CRF = 90, 2, 18


@dataclass(frozen=True)
class FileQuestion:
    """question: its text; media: (kind, file) in the order of the case, where they stand before the text."""

    case: Case
    file: str
    question: str
    media: list[tuple[str, Path]]

    @property
    def messages(self) -> list[dict]:
        """The case's messages with paths in place of pictures and frames."""
        parts = [{"type": kind, kind: str(path)} for kind, path in self.media]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


def file_kinds(case: Case) -> tuple[str, ...]:
    """The kinds of files that the media of a case, all of one kind, can be written as; none if it has no media."""
    parts = case.messages[-1]["content"]
    return FILES[parts[0]["type"]] if isinstance(parts, list) else ()


def write_files(case: Case, file: str, folder: Path, name: str) -> FileQuestion:
    """Writes the media of a case as NAME-0.FILE and so on; `file` is one of its `file_kinds`."""
    *shown, text = case.messages[-1]["content"]
    assert len(case.messages) == 1 and text["type"] == "text" and all(part["type"] in FILES for part in shown)
    media = []
    for number, part in enumerate(shown):
        path = folder / f"{name}-{number}.{file}"
        if part["type"] == "video":
            write_video(part["video"], path)
        else:
            part["image"].save(path, **({"quality": JPEG_QUALITY} if file == "jpeg" else {}))
        media.append((part["type"], path))
    return FileQuestion(replace(case, follow_ups=[]), file, text["text"], media)


def write_video(frames: list[Image.Image], path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        # One thread: with more, x264 gives other bits on a machine with other cores.
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(CRF), "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
