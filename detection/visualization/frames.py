"""Pictures of a source with what is detected in them: read, detected, drawn and written at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from detection.detector import Detector
from detection.structures import ImageDetections
from detection.visualization.drawing import draw_detections
from detection.visualization.media import Source, VideoWriter, write_picture


class DrawnFrame(NamedTuple):
    """A frame of a source that was drawn.

    Args:
        name: the frame's.
        size: (height, width) of its image.
        detections: what was found in it.
        path: the picture written, or the video that it is in.
    """

    name: str
    size: tuple[int, int]
    detections: ImageDetections
    path: Path


def draw_frames(
    detector: Detector,
    source: Source,
    folder: str | Path,
    *,
    suffix: str | None = None,
    score_threshold: float = 0.0,
    batch_size: int = 8,
    max_frames: int | None = None,
) -> Generator[DrawnFrame]:
    """Draw what is detected in a source; all is written when the iterator has come to its end.

    The network runs in this thread; others read ahead and write behind it. Closed or interrupted
    before its end, it first writes what was drawn until then.

    Args:
        folder: for the pictures under their own names, or the video.
        suffix: of the pictures, ".png" or ".jpg"; None: as the source.
        max_frames: stop after so many.

    Raises:
        UserError: the source cannot be read, or would be overwritten.
    """
    names: deque[str] = deque()
    interrupt = None

    def read() -> Iterator[Image.Image]:
        for frame in islice(source, max_frames):
            names.append(frame.name)
            yield frame.image

    with ExitStack() as stack:
        video = None
        if source.is_video:
            target = source.output_path(folder, source.path.name, ".mp4")
            video = stack.enter_context(VideoWriter(target, source.fps or 25))

        def write(image: Image.Image, detections: ImageDetections, path: Path) -> None:
            picture = draw_detections(image, detections)
            if video is None:
                write_picture(picture, path)
            else:
                video.write(picture)

        # One thread, where frames have to be written in their order.
        writer = stack.enter_context(ThreadPoolExecutor(1 if source.is_video else 2))
        pairs = detector.stream(read(), score_threshold=score_threshold, batch_size=batch_size)
        stack.enter_context(closing(pairs))
        behind: deque[Future[None]] = deque()
        try:
            for image, detections in pairs:
                name = names.popleft()
                path = video.path if video else source.output_path(folder, name, suffix)
                behind.append(writer.submit(write, image, detections, path))
                if len(behind) > 2 * batch_size:
                    behind.popleft().result()
                yield DrawnFrame(name, (image.height, image.width), detections, path)
        except GeneratorExit:
            pass
        except KeyboardInterrupt as error:
            interrupt = error
        for future in behind:
            future.result()
    if interrupt:
        raise interrupt
