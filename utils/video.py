"""Video files as pictures, and pictures as a video file."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from utils.command import UserError
from utils.files import DiskError, mark_mp4, temporary_beside
from utils.samples import Picture


def open_video(path: Path) -> tuple[cv2.VideoCapture, float]:
    """A video file and its frames a second.

    Raises:
        UserError: OpenCV cannot read it.
    """
    video = cv2.VideoCapture(str(path))
    if not video.isOpened() or not video.grab():
        raise UserError(f"the video {path} cannot be decoded by OpenCV; convert it, for instance to H.264 in .mp4")
    video.release()
    video = cv2.VideoCapture(str(path))
    return video, video.get(cv2.CAP_PROP_FPS) or 25.0


def read_frames(video: cv2.VideoCapture) -> Iterator[Picture]:
    """The frames, whose ids are their numbers from 000000; decoded as they are asked for."""
    number = 0
    while True:
        more, image = video.read()
        if not more:
            return
        yield Picture(f"{number:06d}", image)
        number += 1


class VideoFile:
    """A context that writes frames of one size to an .mp4 file, which is there whole or not at all. Sound is not kept.

    Raises:
        UserError: OpenCV cannot write videos here.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self.path, self.rate = path, frames_per_second
        self.temporary = temporary_beside(path, ".mp4")
        self.writer: cv2.VideoWriter | None = None

    def write(self, image_rgb: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 RGB; an odd side gets another row or column, as the format asks for even ones."""
        height, width = image_rgb.shape[:2]
        if height % 2 or width % 2:
            image_rgb = np.pad(image_rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self.writer is None:
            size = image_rgb.shape[1], image_rgb.shape[0]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.temporary.touch(exist_ok=False)  # a new file, through no link
            except OSError as error:
                raise DiskError(f"{self.path} cannot be written ({error.strerror}); choose another folder") from None
            self.writer = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.writer.isOpened():
                raise UserError(f"{self.path}: this build of OpenCV cannot write MPEG-4 videos; install opencv-python-headless")
        self.writer.write(np.ascontiguousarray(image_rgb[:, :, ::-1]))

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.writer:
            self.writer.release()
        if kind is None and self.writer:
            mark_mp4(self.temporary)
            os.replace(self.temporary, self.path)
        with suppress(OSError):
            self.temporary.unlink()
