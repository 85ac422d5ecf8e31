"""Pictures and videos: reading what a user points at, writing what was drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from detection.errors import UserError
from detection.images import PICTURE_SUFFIXES, UnreadableImage, load_image

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
WRITTEN_SUFFIXES = frozenset((".jpeg", ".jpg", ".png"))


class Frame(NamedTuple):
    """One picture of a source.

    Args:
        name: path of the file inside the source, with / between folders; for a frame of a video its
            stem and six-digit number.
        image: RGB.
    """

    name: str
    image: Image.Image


class Source:
    """The pictures of one image, folder, video or camera, in order; iterate for its `Frame`s.

    Attributes:
        path: as given; `camera_N` for a camera, which is no file.
        camera: the number of a camera, else None.
        is_video: whether the frames are those of a video or a camera.
        fps: frames a second of a video, else None.
        num_frames: how many frames to expect; None where a video does not say.
        num_ignored: files of a folder that are no pictures by their suffix, hidden, or in the
            output folder.
        unreadable: what could not be read, filled while iterating.
    """

    def __init__(
        self,
        path: Path,
        files: list[Path],
        *,
        is_video: bool = False,
        camera: int | None = None,
        num_ignored: int = 0,
    ) -> None:
        self.path = path
        self.camera = camera
        self.files = files
        self._sources = frozenset(file.resolve() for file in files)
        self.is_video = is_video
        self.num_ignored = num_ignored
        self.unreadable: list[str] = []
        self.fps: Fraction | None = None
        self.num_frames: int | None = len(files)
        if is_video:
            with self._open() as container:
                stream = container.streams.video[0]
                self.fps = stream.average_rate or stream.guessed_rate or Fraction(25)
                self.num_frames = stream.frames or None

    @property
    def root(self) -> Path:
        """The folder that the names of the frames start from."""
        return self.path if self.path.is_dir() else self.path.parent

    def __iter__(self) -> Iterator[Frame]:
        self.unreadable = []
        return self._read_video() if self.is_video else self._read_pictures()

    def output_path(self, folder: str | Path, name: str, suffix: str | None = None) -> Path:
        """Where the drawn frame `name` goes: two frames never share a path.

        Args:
            folder: the output folder; folders inside the source are kept in it.
            name: the frame's; or the file name of the video, for a video of the drawn frames.
            suffix: ".png", ".jpg" or ".mp4"; None keeps the frame's own, or takes ".png" where that
                cannot be written.

        Raises:
            UserError: this would overwrite a file of the source.
        """
        own = Path(name).suffix.lower()
        suffix = suffix or (own if own in WRITTEN_SUFFIXES else ".png")
        output = name
        # Added and not exchanged: a folder may hold a.jpg and a.png, even a.jpg.png.
        while own != suffix and (output == name or (self.root / output).resolve() in self._sources):
            output += suffix
        target = Path(folder) / output
        if target.resolve() in self._sources:
            raise UserError(f"{target} is a file of the source: choose another output folder")
        return target

    def _open(self) -> Any:
        return _open_video(self.path) if self.camera is None else _open_camera(self.camera)

    def _read_pictures(self) -> Iterator[Frame]:
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            try:
                image = load_image(file)
            except UnreadableImage as error:
                if file == self.path:
                    raise UserError(f"{file} cannot be read: {error}") from error
                self.unreadable.append(name)
                continue
            yield Frame(name, image)
        if len(self.unreadable) == len(self.files):
            raise UserError(f"none of the {len(self.files)} pictures in {self.path} can be read")

    def _read_video(self) -> Iterator[Frame]:
        num_read = 0
        with self._open() as container:
            try:
                for frame in container.decode(video=0):
                    image = frame.to_image().rotate(frame.rotation, expand=True)
                    yield Frame(f"{self.path.stem}_{num_read:06d}", image)
                    num_read += 1
            except _import_av().FFmpegError as error:
                if not num_read:
                    raise _unreadable(self.path, error) from error
                self.unreadable.append(f"{self.path.name} after frame {num_read - 1}")
        if not num_read:
            raise UserError(f"{self.path} holds no frames")


def read_source(path: str | Path | int, *, output: str | Path | None = None) -> Source:
    """What `path` holds: a picture, a video, or a folder with all pictures below it, sorted.

    A number is a camera, from 0, unless a file has that name; its frames never end.

    EXIF orientation and a video's rotation are applied. In a folder, files that cannot be read are
    skipped and named in `Source.unreadable`.

    Args:
        output: the folder of the drawn pictures; inside of the source it is no part of it.

    Raises:
        UserError: the path or camera is missing, a folder without pictures, or of an unknown type;
            or, while iterating, a picture or video that stands alone, or a whole folder, cannot be
            read.
    """
    number, path = str(path), Path(str(path))
    if number.isdigit() and not path.exists():
        return Source(Path(f"camera_{number}"), [], is_video=True, camera=int(number))
    if not path.exists():
        raise UserError(f"{path} does not exist: give an image, a folder, a video or a camera (0)")
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in found if _is_picture(file.relative_to(path))]
        if output is not None and path.resolve() in Path(output).resolve().parents:
            drawn = path / Path(output).resolve().relative_to(path.resolve())
            files = [file for file in files if drawn not in file.parents]
        if not files:
            raise UserError(
                f"{path} holds no pictures ({len(found)} other files):"
                f" known are {', '.join(sorted(PICTURE_SUFFIXES))}"
            )
        return Source(path, files, num_ignored=len(found) - len(files))
    if path.suffix.lower() not in PICTURE_SUFFIXES | VIDEO_SUFFIXES:
        raise UserError(
            f"{path} is of an unknown type: known are"
            f" {', '.join(sorted(PICTURE_SUFFIXES) + sorted(VIDEO_SUFFIXES))}"
        )
    return Source(path, [path], is_video=path.suffix.lower() in VIDEO_SUFFIXES)


def write_picture(picture: Image.Image, path: str | Path) -> None:
    """Write PNG or JPEG, as the suffix says, making the folders on the way.

    Raises:
        UserError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        raise UserError(f"cannot write {path}: name it .png or .jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    # 4:4:4, since halved colour blurs thin coloured lines.
    picture.save(path, quality=92, subsampling=0)


class VideoWriter:
    """Writes pictures as an H.264 MP4 of the first one's size; a context manager.

    The file appears under its name when all went well and a picture was written. An odd width or
    height, which H.264's usual pixel format cannot hold, gets one more black column or row.

    Args:
        path: ends in .mp4.
        fps: frames a second.

    Raises:
        UserError: another suffix, or PyAV is not installed.
    """

    def __init__(self, path: str | Path, fps: Fraction | float) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"cannot write {path}: name it .mp4")
        self._av = _import_av()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._fps = Fraction(fps).limit_denominator(1 << 16)
        self._container: Any = self._av.open(str(self._temporary), "w", format="mp4")
        self._stream: Any = None

    def write(self, picture: Image.Image) -> None:
        """Append a picture; one of another size than the first is fitted into that, on black."""
        if self._stream is not None and picture.size != self._size:
            picture = ImageOps.pad(picture, self._size)
        padded = ImageOps.expand(picture, (0, 0, picture.width % 2, picture.height % 2))
        if self._stream is None:
            self._size = picture.size
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            self._stream.width, self._stream.height = padded.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": "20"}
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(padded)))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            os.replace(self._temporary, self.path)
        else:
            self._container.close()
            self._temporary.unlink(missing_ok=True)


def _is_picture(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in PICTURE_SUFFIXES and not hidden


def _open_video(path: Path) -> Any:
    av = _import_av()
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise _unreadable(path, error) from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} holds no video")
    container.streams.video[0].thread_type = "AUTO"
    return container


def _open_camera(number: int) -> Any:
    av = _import_av()
    name, form = {
        "linux": (f"/dev/video{number}", "v4l2"),
        "darwin": (str(number), "avfoundation"),
        "win32": (str(number), "vfwcap"),
    }[sys.platform]
    try:
        return av.open(name, format=form)
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"camera {number} cannot be opened ({error})") from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path} cannot be read ({reason}): is it complete?")


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install -e '.[video]'") from None
    return av
