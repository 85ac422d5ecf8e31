"""A small server: images in, boxes out, and a page to try it on.

    pip install -e '.[serve]'
    MODEL=model.onnx uvicorn --app-dir examples/serve app:app

`POST /detect` takes one image as the form field `image` and answers with
{"width", "height", "detections": [{"box": [x0, y0, x1, y1], "score", "name"}]}, best first.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image

from detection.errors import UserError
from detection.images import UnreadableImage, load_image
from detection.onnx_detector import ArrayDetections, OnnxDetector

MAX_BYTES = 20 * 2**20  # of a request
MAX_PIXELS = 50_000_000
MAX_REQUESTS = 32  # at a time, each with a picture in memory
# Not all that Pillow has: it decodes an ICO, of whatever size, as soon as it is opened, and an EPS
# by running Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class Batcher:
    """Joins requests that come while the network runs into its next batch.

    Args:
        detector: its `predict` runs in a thread, one call at a time.
        max_batch: images of a call.
    """

    def __init__(self, detector: OnnxDetector, *, max_batch: int = 8) -> None:
        self.detector = detector
        self.max_batch = max_batch
        self.waiting: asyncio.Queue[tuple[Image.Image, asyncio.Future[ArrayDetections]]]
        self.waiting = asyncio.Queue()

    async def predict(self, image: Image.Image) -> ArrayDetections:
        """Detections of one image (RGB)."""
        future: asyncio.Future[ArrayDetections] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((image, future))
        return await future

    async def run(self) -> None:
        """Serve what waits, until cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty() and len(batch) < self.max_batch:
                batch.append(self.waiting.get_nowait())
            try:
                images = [image for image, _ in batch]
                results = await asyncio.to_thread(self.detector.predict, images)
            except Exception as error:  # those who wait get it, and the server goes on
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)


def read_image(content: bytes) -> Image.Image:
    """An upload as the picture it shows: RGB, upright.

    Raises:
        HTTPException: 413 where it is too large, 415 where it is none of `FORMATS`, 422 where it is
            damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            is_large = image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        is_large = True
    except Exception as error:  # Pillow's readers answer in many ways
        raise HTTPException(415, f"the file is not an image as {', '.join(FORMATS)}") from error
    if is_large:
        raise HTTPException(413, f"the image has more than {MAX_PIXELS / 1e6:.0f} million pixels")
    try:
        return load_image(io.BytesIO(content))
    except UnreadableImage as error:
        raise HTTPException(422, f"the image is damaged: {error}") from error


async def check_length(
    request: Request, answer: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Refuse a large request before any of it is read."""
    if "transfer-encoding" in request.headers:
        return JSONResponse({"detail": "the request does not state its length"}, 411)
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        return JSONResponse({"detail": f"the file is larger than {MAX_BYTES // 2**20} MB"}, 413)
    return await answer(request)


def make_app(detector: OnnxDetector) -> FastAPI:
    """The server of a detector."""
    batcher = Batcher(detector)
    places = asyncio.Semaphore(MAX_REQUESTS)

    @asynccontextmanager
    async def serve_batches(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="Object detection", lifespan=serve_batches)
    app.middleware("http")(check_length)

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"))

    @app.post("/detect")
    async def detect(
        image: UploadFile, score_threshold: float = Query(0.05, ge=0, le=1)
    ) -> dict[str, Any]:
        if places.locked():
            raise HTTPException(503, "too many requests at a time", {"Retry-After": "1"})
        async with places:
            picture = await asyncio.to_thread(read_image, await image.read())
            found = await batcher.predict(picture)
        return {
            "width": picture.width,
            "height": picture.height,
            "detections": [
                {"box": box.tolist(), "score": float(score), "name": found.names[label]}
                for box, score, label in zip(*found[:3], strict=True)
                if score >= score_threshold
            ],
        }

    return app


def __getattr__(name: str) -> FastAPI:
    # Made when uvicorn asks for it: importing this module opens no file.
    if name != "app":
        raise AttributeError(name)
    try:
        return make_app(OnnxDetector.from_file(os.environ.get("MODEL", "model.onnx")))
    except UserError as error:
        sys.exit(f"error: {error}")
