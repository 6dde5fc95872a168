"""Reads the frames of video files, and writes frames to a video file."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import cv2
import numpy as np

from utils.command import UserError
from utils.evaluation.images import NamedImage
from utils.files import DiskError, temporary_beside
from utils.outputs import mark_mp4

LARGEST_RATE = 240.0  # frames per second; a header with more holds the unit of its clock instead
USUAL_RATE = 25.0  # if the header holds no frame rate
LONGEST_GAP = 3600.0  # seconds between two frames


class BrokenVideo(UserError):
    """A video that cannot be read or written completely."""


@dataclass
class Frame(NamedImage):
    """A frame, shown from ``time`` (in seconds) on; None if the container does not give it."""

    time: float | None


def open_video(path: Path) -> tuple[cv2.VideoCapture, float]:
    """The opened video file and the frames per second of its header.

    Raises:
        BrokenVideo: OpenCV cannot read it, or it is cut off.
    """
    try:
        missing = cut_off(path)
    except OSError as error:
        raise BrokenVideo(f"the video {path} cannot be read ({error.strerror})") from None
    if missing:
        raise BrokenVideo(f"the video {path} is cut off: {missing}; fetch it again")
    video = cv2.VideoCapture(str(path))
    if not video.isOpened() or not video.grab():
        raise BrokenVideo(f"the video {path} cannot be decoded by OpenCV; convert it, for instance to H.264 in .mp4")
    video.release()
    video = cv2.VideoCapture(str(path))
    return video, video.get(cv2.CAP_PROP_FPS)


def read_frames(video: cv2.VideoCapture) -> Iterator[Frame]:
    """The frames, decoded one at a time; the id of a frame is its number, from 000000."""
    number, before = 0, -1.0
    while True:
        more, image = video.read()
        if not more:
            return
        time = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        yield Frame(f"{number:06d}", image, time if time > before else None)
        number, before = number + 1, max(time, before)


def check_frames(path: Path, video: cv2.VideoCapture, decoded: int) -> None:
    """Check that all frames of a video were among the ``decoded`` ones.

    Raises:
        BrokenVideo: its container counts more, or no frame was decoded.
    """
    expected = max(1, round(video.get(cv2.CAP_PROP_FRAME_COUNT))) if describe(path)[1] else 1
    if decoded < expected:
        raise BrokenVideo(
            f"the video {path} is damaged: {decoded} of {expected} frames can be decoded; fetch it again, or if a player shows "
            f"all frames, convert it: ffmpeg -i {path.name} new.mp4"
        )


def cut_off(path: Path) -> str:
    """``"it has 900 of its 1000 bytes"`` for a video file that is shorter than its header states; "" for others."""
    stated, size = describe(path)[0], path.stat().st_size
    return f"it has {size} of its {stated} bytes" if stated > size else ""


def describe(path: Path) -> tuple[int, bool]:
    """The number of bytes that a video's container states (0 if none), and whether the container counts its frames.

    MP4 and MOV consist of boxes with a size and a name (ISO/IEC 14496-12, section 4.2); they count their frames unless they
    are fragmented. AVI counts its frames. Matroska and WebM consist of a header and a segment (RFC 8794, RFC 9559); for them
    and other kinds OpenCV estimates the number of frames from the duration.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            file.seek(4)
            file.seek(_ebml_size(file) + 4, os.SEEK_CUR)  # the segment's id
            return _ebml_size(file) + file.seek(0, os.SEEK_CUR), False
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return 0, head.startswith(b"RIFF") and head.endswith(b"AVI ")
        start, stated, names, total = 0, 0, set(), os.fstat(file.fileno()).st_size
        while start < total:
            file.seek(start)
            box = file.read(16).ljust(16, b"\0")
            size, name = int.from_bytes(box[:4], "big"), box[4:8]
            size = int.from_bytes(box[8:], "big") if size == 1 else size
            start += size
            names.add(name)
            if name in (b"mdat", b"moov", b"moof"):  # anything may follow the last one
                stated = start
            if size < 8:  # 0: to the end of the file
                break
        return stated, b"moof" not in names


def _ebml_size(file: IO[bytes]) -> int:
    """An EBML size: its first byte begins with one zero per byte that follows, then a 1; 0 for an unknown size (all other
    bits set).
    """
    first = file.read(1)
    length = 8 - (first or b"\1")[0].bit_length()
    bits = 7 * (length + 1)
    value = int.from_bytes(first + file.read(length), "big") & ((1 << bits) - 1)
    return 0 if value == (1 << bits) - 1 else value


class VideoFile:
    """A context manager that writes frames of one size to an .mp4 file, whole or not at all, without sound.

    The file has a constant frame rate. If the time of a frame differs from it by more than one frame, the previous frame is
    repeated, or the frame is left out.

    Args:
        path: the file.
        frames_per_second: the frame rate of a header; 0, or more than cameras record, is replaced by 25.

    Attributes:
        count: the number of frames in the file.

    Raises:
        BrokenVideo: the frames change their size, or OpenCV cannot write such a video here.
        DiskError: the file lacks frames, which OpenCV does not report.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        usual = 0 < frames_per_second <= LARGEST_RATE
        self.path, self.stated = path, frames_per_second
        # MPEG-4 divides a second into at most 65535 parts; OpenCV uses as many decimals as the rate has, so round it.
        self.rate = (round(frames_per_second, 2) or frames_per_second) if usual else USUAL_RATE
        self.timed = usual  # if the rate is wrong, so are the times
        self.repeated, self.left_out = 0, 0
        self.last: np.ndarray | None = None  # the frame written last
        self.temporary = temporary_beside(path, ".mp4")
        self.writer: cv2.VideoWriter | None = None
        self.size, self.count = (0, 0), 0  # width and height, and the number of frames written

    def write(self, image_rgb: np.ndarray, time: float | None = None) -> None:
        """Append a frame, (H, W, 3) uint8 RGB, shown from ``time`` (in seconds) on, or right after the previous frame.

        An odd height or width is padded by one pixel, because the format requires even ones.
        """
        late = (time * self.rate if time is not None and self.timed else self.count) - self.count  # in frames
        if late < -1:
            self.left_out += 1
            return
        if late > LONGEST_GAP * self.rate:
            raise BrokenVideo(f"the frames for {self.path} jump by {late / self.rate:.0f} seconds; convert the video")
        if late > 1 and self.last is not None:
            for _ in range(round(late)):
                self.repeated += 1
                self._append(self.last)
        self.last = image_rgb
        self._append(image_rgb)

    def note(self) -> str:
        """A sentence about the file's frame rate; "" if it is that of the video."""
        if not self.timed:
            return f"its header says {self.stated:g} frames per second, so {self.path} has {self.rate:g}"
        if not self.repeated and not self.left_out:
            return ""
        return (
            f"its frame rate varies: in {self.path}, at {self.rate:g} frames per second, {self.repeated} frames are repeated "
            f"and {self.left_out} left out, so that the others keep their times"
        )

    def _append(self, image_rgb: np.ndarray) -> None:
        height, width = image_rgb.shape[:2]
        if height % 2 or width % 2:
            image_rgb = np.pad(image_rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        size = image_rgb.shape[1], image_rgb.shape[0]
        if self.writer is None:
            self.size = size
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.temporary.touch(exist_ok=False)  # a new file; never follows a link
            except OSError as error:
                raise DiskError(f"{self.path} cannot be written ({error.strerror}); choose another folder") from None
            self.writer = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.writer.isOpened():
                raise BrokenVideo(
                    f"{self.path}: OpenCV cannot write MPEG-4 of {size[0]}x{size[1]} pixels at {self.rate:g} frames per second "
                    "here; install opencv-python-headless, or convert the video"
                )
        if size != self.size:
            shown = " to ".join(f"{width}x{height}" for width, height in (self.size, size))
            raise BrokenVideo(f"the frames for {self.path} change their size from {shown}; convert the video to one size")
        self.count += 1
        self.writer.write(np.ascontiguousarray(image_rgb[:, :, ::-1]))

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.writer:
            self.writer.release()
        try:
            if kind is None and self.writer:
                self._finish()
                os.replace(self.temporary, self.path)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written ({error.strerror}); free space or choose another folder") from None
        finally:
            with suppress(OSError):
                self.temporary.unlink()

    def _finish(self) -> None:
        """Mark the written file as our output; raise :class:`DiskError` unless it holds all frames."""
        video = cv2.VideoCapture(str(self.temporary))
        count = round(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.set(cv2.CAP_PROP_POS_FRAMES, self.count - 1)
        if count != self.count or not video.grab() or cut_off(self.temporary):
            text = f"the file holds {max(count, 0)} of {self.count} frames; free space or choose another folder"
            raise DiskError(f"{self.path} cannot be written: {text}")
        video.release()
        mark_mp4(self.temporary)  # also syncs it to the disk
