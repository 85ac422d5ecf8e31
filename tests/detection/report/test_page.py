"""The report, as a file and as a browser shows it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data.coco import CocoIndex
from detection.evaluation.analysis import analyze
from detection.evaluation.coco import CocoEvaluator
from detection.report import Figure, Run, Section, write_report
from detection.report.page import MAX_IMAGE_BYTES, _encode_image, choose_images

EVIL = "<script>alert('x')</script>"
EVIL_FILE = "<img src=x onerror=alert(1)>.png"
EVIL_TITLE = "</script><img src=x onerror=alert(1)> & <!-- DATA -->"
TRUTHS = [(1, 1, 0, 1), (1, 2, 100, 1), (2, 1, 0, 1), (3, 1, 0, 1)]  # image, class, x, counts
FOUND = [
    (1, 1, 0, 0.9),  # right
    (1, 1, 100, 0.8),  # a wrong class
    (1, 1, 200, 0.3),  # on background
    (2, 1, 0, 0.6),  # right
    (2, 2, 20, 0.5),  # a poor box of another class: both wrong
]
FOUND_BY_OTHER = [(3, 1, 0, 0.7)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    """Four images of 300 x 50, the last without objects; evil names of a class and a file."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    names = {1: EVIL_FILE} | {i: f"{i}.png" for i in range(2, 5)}
    for name in names.values():
        pixels = rng.integers(0, 256, (50, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "images" / "3.png").write_bytes(b"broken")
    content = {
        "images": [
            {"id": i, "file_name": name, "width": 300, "height": 50} for i, name in names.items()
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": EVIL}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": [x, 0, 50, 50]}
            | {"area": 2500, "iscrowd": 0}
            for n, (i, c, x, _) in enumerate(TRUTHS, start=1)
        ],
    }
    (folder / "val.json").write_text(json.dumps(content))
    return CocoIndex.load(images=folder / "images", annotations=folder / "val.json")


def make_run(index: CocoIndex, name: str, found: list[tuple[int, int, int, float]]) -> Run:
    results = [
        {"image_id": i, "category_id": c, "bbox": [float(x), 0.0, 50.0, 50.0], "score": s}
        for i, c, x, s in found
    ]
    evaluator = CocoEvaluator(index.ground_truth())
    return Run(name, evaluator.evaluate(results), analyze(evaluator, results))


@pytest.fixture(scope="module")
def report(index: CocoIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    picture = BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    return write_report(
        tmp_path_factory.mktemp("report") / "new" / "index.html",
        title=EVIL_TITLE,
        facts={"checkpoint": EVIL},
        index=index,
        run=make_run(index, "one", FOUND),
        other=make_run(index, "other", FOUND_BY_OTHER),
        history=[
            {"kind": "train", "step": 10, "loss": 2.0, "learning_rate": 0.001},
            {"kind": "train", "step": 20, "loss": 1.0, "learning_rate": 0.0},
            {"kind": "evaluation", "step": 20, "AP": 0.5, "APs": -1.0, "loss": 1.5},
        ],
        sections=[
            Section(
                "Routing",
                text=[EVIL],
                figures=[Figure("entropy", picture.getvalue())],
                header=["layer", "dead"],
                rows=[["stem", 0], ["block", 0.25]],
                warnings=["one expert is never used"],
            )
        ],
    )


def read_data(report: Path) -> dict[str, Any]:
    text = report.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_names_stay_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert EVIL not in text and "onerror=alert(1)>" in text and "<img src=x" not in text
    assert text.count("</script>") == 2
    data = read_data(report)
    assert data["classes"] == ["cell", EVIL] and data["title"] == EVIL_TITLE
    assert EVIL_FILE in [image["name"] for image in data["images"]]
    assert [p.name for p in report.parent.iterdir()] == ["index.html"]


def test_the_file_refers_to_nothing_outside(report: Path) -> None:
    text = re.sub(r"data:[a-z/+;0-9]+,[A-Za-z0-9+/=]*", "", report.read_text(encoding="utf-8"))
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|src=\"[^\"]", text)


def test_what_the_page_is_given(report: Path) -> None:
    data = read_data(report)
    assert data["numImages"] == 4 and len(data["images"]) == 4
    one = next(image for image in data["images"] if image["id"] == 1)
    kinds = [*data["kinds"], "correct", "ignored"]
    found = [kinds[detection[6]] for detection in one["runs"][0]["detections"]]
    assert found == ["correct", "classification", "background"]
    assert one["runs"][0]["found"] == [0.9, None]
    header, content = one["source"].split(",")
    assert header == "data:image/jpeg;base64"
    assert Image.open(BytesIO(base64.b64decode(content))).size == (300, 50)
    assert [image["source"] for image in data["images"] if image["id"] == 3] == [None]
    assert {chart["title"] for chart in data["training"]} == {
        "Loss in training", "Learning rate", "Average precision", "Loss of the validation split",
    }  # fmt: skip


def test_the_images_are_the_worst_and_a_spread() -> None:
    worst = [5, 1, 4, 0, 3, 2]
    assert choose_images(worst, 3) == [5, 1, 0]
    assert choose_images(worst, 9) == worst


def test_two_hundred_pictures_stay_small(index: CocoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, which JPEG hardly shrinks, in pictures of a photograph's size."""
    noise = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    monkeypatch.setattr(CocoIndex, "load_image", lambda *_: picture)
    source = _encode_image(index, 0, MAX_IMAGE_BYTES // 200)
    assert source and 200 * len(source) < 26 * 2**20


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report opened offline; the test fails where the page complains."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    page.goto(report.as_uri())
    yield page
    context.close()
    assert complaints == []


def shown(page: Any) -> str:
    return page.locator("#shown").inner_text()


def set_score(page: Any, score: float) -> None:
    page.locator("#score").fill(str(score))


def choose_kinds(page: Any, *kinds: str) -> None:
    for box in page.locator("#kinds input").all():
        box.set_checked(box.get_attribute("data-kind") in kinds)


def test_the_page_shows_everything(page: Any) -> None:
    assert page.locator("h1").inner_text() == EVIL_TITLE
    menu = page.locator("#menu a").all_inner_texts()
    assert menu == [
        "Overview", "Comparison", "Images", "Errors", "Classes", "Curves", "Confusion",
        "Calibration", "Training", "Routing",
    ]  # fmt: skip
    assert page.locator("#headline .card").count() == 12
    assert EVIL in page.locator("#class-table").inner_text()
    assert page.locator("svg.chart path").count() >= 8
    assert page.locator(".warning").inner_text() == "one expert is never used"
    assert page.locator(".broken").inner_text() == "cannot be read"
    assert EVIL_FILE in page.locator("#gallery").inner_text()


def test_slider_and_filters_change_what_is_shown(page: Any) -> None:
    set_score(page, 0.01)
    assert shown(page) == "9 boxes in 3 images"  # 4 objects and 5 detections
    rectangles = page.locator("#gallery .box")
    assert rectangles.count() == 9
    choose_kinds(page, "correct")
    assert shown(page) == "2 boxes in 2 images"
    set_score(page, 0.7)
    assert shown(page) == "1 box in 1 image"
    choose_kinds(page, "missed")
    assert shown(page) == "3 boxes in 3 images"
    page.locator("#class").select_option(label=EVIL)
    assert shown(page) == "1 box in 1 image"
    choose_kinds(page, "classification", "both")
    page.locator("#class").select_option(label="all")
    set_score(page, 0.4)
    assert shown(page) == "2 boxes in 2 images"
    assert rectangles.count() == 2
    choose_kinds(page, "correct")
    page.locator("#which").select_option(label="other")
    assert shown(page) == "1 box in 1 image"


def test_the_slider_starts_at_the_best_score(page: Any, index: CocoIndex) -> None:
    analysis = make_run(index, "one", FOUND).analysis
    assert page.locator("#score-value").inner_text() == f"{analysis.score:.2f}"
    choose_kinds(page, "missed")
    assert shown(page).split()[0] == str(analysis.images.missed.sum())
    choose_kinds(page, "correct")
    assert shown(page).split()[0] == str(analysis.images.correct.sum())


def test_tables_sort(page: Any) -> None:
    first = page.locator("#class-table tbody tr:first-child td:first-child")
    head = page.locator("#class-table th button", has_text="boxes")
    head.click()
    assert first.inner_text() == "cell"
    head.click()
    assert first.inner_text() == EVIL
    assert page.locator("#class-table th[aria-sort=ascending]").inner_text().startswith("boxes")


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#order").select_option("name")
    page.locator(".tile").first.focus()
    page.keyboard.press("Enter")
    name = page.locator("#viewer-name")
    assert name.inner_text().startswith(EVIL_FILE)
    assert page.locator("#viewer-picture text").count() > 0
    page.keyboard.press("ArrowRight")
    assert name.inner_text().startswith("2.png")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert name.inner_text().startswith("3.png")
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.locator("#score").focus()
    before = page.locator("#score-value").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#score-value").inner_text() != before


def test_light_and_dark(page: Any) -> None:
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.locator("#theme").click()
    assert background() == light
    page.locator("#theme").click()
    assert background() == dark


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".tile").first.click()
    box = page.locator("#viewer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
