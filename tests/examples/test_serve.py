from __future__ import annotations

import asyncio
import importlib.util
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.onnx_detector import ArrayDetections, OnnxDetector

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="the extra `serve` is not installed")

FILE = Path(__file__).parents[2] / "examples" / "serve" / "app.py"


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_app", FILE)
    assert spec and spec.loader
    module = sys.modules["serve_app"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Finder:
    """Stands for the detector: finds the whole image, and says how red it is."""

    names = ("cat", "dog")

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.fails = False

    def predict(self, images: list[Image.Image]) -> list[ArrayDetections]:
        self.batches.append(len(images))
        time.sleep(0.2)
        if self.fails:
            raise RuntimeError("broken")
        return [
            ArrayDetections(
                np.float32([[0, 0, *image.size], [1, 1, 5, 5]]),
                np.float32([np.asarray(image)[0, 0, 0] / 255, 0.1]),
                np.array([1, 0]),
                self.names,
            )
            for image in images
        ]


@pytest.fixture
def finder() -> Finder:
    return Finder()


@pytest.fixture
def client(serve: ModuleType, finder: Finder) -> Iterator[Any]:
    with testclient.TestClient(serve.make_app(finder), raise_server_exceptions=False) as client:
        yield client


def encode(red: int = 204, size: tuple[int, int] = (40, 30), format: str = "PNG", **options: Any):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, format, **options)
    return file.getvalue()


def test_it_answers_with_boxes(client: Any) -> None:
    answer = client.post("/detect", files={"image": encode()}, params={"score_threshold": 0.5})
    assert answer.status_code == 200
    assert answer.json() == {
        "width": 40, "height": 30,
        "detections": [{"box": [0, 0, 40, 30], "score": pytest.approx(0.8), "name": "dog"}],
    }  # fmt: skip
    everything = client.post("/detect", files={"image": encode()}).json()
    assert [found["name"] for found in everything["detections"]] == ["dog", "cat"]


def test_a_photograph_stands_upright(client: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    content = encode(format="JPEG", exif=exif)
    answer = client.post("/detect", files={"image": content}).json()
    assert (answer["width"], answer["height"]) == (30, 40)


def test_requests_at_the_same_time_share_batches(client: Any, finder: Finder) -> None:
    def ask(red: int) -> float:
        found = client.post("/detect", files={"image": encode(red)}).json()["detections"]
        return found[0]["score"]

    reds = list(range(60, 255, 15))
    with ThreadPoolExecutor(len(reds)) as threads:
        scores = list(threads.map(ask, reds))
    assert scores == pytest.approx([red / 255 for red in reds])  # each got its own
    assert sum(finder.batches) == len(reds)
    assert len(finder.batches) < len(reds) and max(finder.batches) <= 8


@pytest.mark.parametrize(
    ("content", "status", "answer"),
    [
        (b"", 415, "not an image"),
        (b"hello", 415, "not an image"),
        (encode(size=(400, 300), format="JPEG")[:-700], 422, "damaged"),
        (bytes(20 * 2**20 + 1), 413, "larger than 20 MB"),
        (encode(size=(10000, 5001)), 413, "million pixels"),
        (encode(size=(14000, 14000)), 413, "million pixels"),  # too many even for Pillow to open
    ],
)
def test_bad_uploads(client: Any, content: bytes, status: int, answer: str) -> None:
    response = client.post("/detect", files={"image": ("a.png", content)})
    assert response.status_code == status
    assert answer in response.json()["detail"]


def test_what_is_decoded_before_its_size_is_known_is_not_opened(client: Any) -> None:
    for format in ("ICO", "EPS"):
        response = client.post("/detect", files={"image": encode(format=format)})
        assert response.status_code == 415
    for format in ("BMP", "GIF", "JPEG", "MPO", "PPM", "TIFF", "WEBP"):
        response = client.post("/detect", files={"image": encode(format=format)})
        assert response.status_code == 200


def test_sixteen_bits_a_pixel(serve: ModuleType) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 100 * 256, np.uint16)).save(file, "PNG")
    assert serve.read_image(file.getvalue()).getpixel((0, 0)) == (100, 100, 100)


def test_a_large_request_is_not_read(serve: ModuleType, finder: Finder) -> None:
    async def ask(*headers: tuple[bytes, bytes]) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("the request was read")

        scope = {"type": "http", "method": "POST", "path": "/detect", "query_string": b"",
                 "headers": headers, "http_version": "1.1", "scheme": "http"}  # fmt: skip
        await serve.make_app(finder)(scope, receive, send)
        return sent[0]["status"]

    chunked = ((b"transfer-encoding", b"chunked"), (b"content-length", b"9"))
    with ThreadPoolExecutor(1) as thread:  # a browser that is open runs a loop in this one
        for headers, status in (((b"content-length", b"20971521"),), 413), (chunked, 411):
            assert thread.submit(asyncio.run, ask(*headers)).result() == status


def test_too_many_requests(
    serve: ModuleType, client: Any, finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: int) -> int:
        return client.post("/detect", files={"image": encode()}).status_code

    with ThreadPoolExecutor(2 * serve.MAX_REQUESTS) as threads:
        answers = list(threads.map(ask, range(2 * serve.MAX_REQUESTS)))
    assert set(answers) == {200, 503}
    assert sum(finder.batches) == answers.count(200) >= serve.MAX_REQUESTS
    assert ask(0) == 200


def test_requests_that_are_none(client: Any) -> None:
    assert client.post("/detect").status_code == 422
    bad = client.post("/detect", files={"image": encode()}, params={"score_threshold": 2})
    assert bad.status_code == 422


def test_it_goes_on_after_a_failure(client: Any, finder: Finder) -> None:
    finder.fails = True
    assert client.post("/detect", files={"image": encode()}).status_code == 500
    finder.fails = False
    assert client.post("/detect", files={"image": encode()}).status_code == 200


@pytest.fixture
def address(serve: ModuleType, finder: Finder) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(serve.make_app(finder), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_missing_model_is_one_line(serve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "absent.onnx")
    with pytest.raises(SystemExit, match=r"^error: absent\.onnx: no such file$"):
        serve.app  # noqa: B018


def test_a_real_detector(
    serve: ModuleType, export_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As uvicorn starts it: `MODEL=FILE uvicorn app:app`."""
    file = export_model("ssd")
    monkeypatch.setenv("MODEL", str(file))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    content = io.BytesIO()
    picture.save(content, "PNG")
    (expected,) = OnnxDetector.from_file(file).predict(picture, score_threshold=0.3)
    with testclient.TestClient(serve.app) as client:
        answer = client.post("/detect", files={"image": content.getvalue()},
                             params={"score_threshold": 0.3}).json()  # fmt: skip
    assert (answer["width"], answer["height"]) == (40, 30)
    found = answer["detections"]
    assert [one["name"] for one in found] == [expected.names[i] for i in expected.labels] != []
    assert [one["score"] for one in found] == pytest.approx(expected.scores)
    np.testing.assert_allclose([one["box"] for one in found], expected.boxes, rtol=1e-6)


@pytest.mark.slow
def test_the_page_in_a_browser(address: str, browser: Any, finder: Finder, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    (tmp_path / "red.png").write_bytes(encode())
    (tmp_path / "text.png").write_text("hello")
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    status = page.locator("#status")
    page.set_input_files("#file", tmp_path / "red.png")
    expect(status).to_have_text("1 of 2 detections shown")
    edge = "[...document.querySelector('canvas').getContext('2d').getImageData(20, 29, 1, 1).data]"
    assert page.evaluate("document.querySelector('canvas').width") == 40
    assert page.evaluate(edge) != [204, 0, 0, 255]  # the box is drawn over the image
    for threshold, text in ((0.9, "0 of 2"), (0.05, "2 of 2")):
        page.locator("#threshold").fill(str(threshold))
        expect(status).to_have_text(f"{text} detections shown")
    page.set_input_files("#file", tmp_path / "text.png")
    expect(status).to_contain_text("the file is not an image")
    expect(status).to_have_class("error")
    page.locator("#threshold").fill("0.5")
    expect(status).to_have_text("1 of 2 detections shown")
    expect(status).to_have_class("")
    finder.fails = True
    page.set_input_files("#file", tmp_path / "red.png")
    expect(status).to_have_text("Internal Server Error")
    finder.fails = False
    page.set_input_files("#file", tmp_path / "red.png")  # once more
    expect(status).to_have_text("1 of 2 detections shown")
    page.locator("#threshold").fill("0.05")
    # Dropped instead of chosen.
    page.evaluate(
        """async bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer}));
        }""",
        list(encode(255)),
    )
    expect(status).to_have_text("2 of 2 detections shown")
    page.close()
    assert not faults
