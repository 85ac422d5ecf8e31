from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from detection.config import config_dir

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests, and the processes they start, keep what they parse in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests keep the embedded set, so that it is drawn once."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def tiny_data(shapes_root: Path) -> list[str]:
    """A handful of generated images."""
    return [
        f"data.root={shapes_root}",
        "data.num_train=10",
        "data.num_val=5",
        "data.image_size=[64,80]",
    ]


@pytest.fixture(scope="session")
def tiny_model() -> list[str]:
    """The smallest CondConv SSD: a step takes milliseconds."""
    return [
        "model.width=0.25",
        "model.num_experts=2",
        "model.input_size=64",
        "trainer.batch_size=4",
        "trainer.num_workers=0",
        "trainer.log_every=1",
        "trainer.device=cpu",
        "evaluation.num_workers=0",
        "evaluation.num_pictures=2",
        "logger=none",
    ]


@pytest.fixture(scope="session")
def compose_config() -> Callable[[str, Sequence[str]], Any]:
    """Composes a config as a script would."""

    def compose_config(name: str, overrides: Sequence[str]) -> Any:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides=list(overrides))

    return compose_config


@pytest.fixture
def run(
    compose_config: Callable[..., Any],
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Trains in this process and gives the run folder."""
    from train_det import train

    def run(*overrides: str, name: str = "run", data: list[str] = tiny_data) -> Path:
        folder = tmp_path / name
        arguments = [*tiny_model, *data, f"run_dir={folder}", *overrides]
        train(compose_config("train", arguments), overrides=arguments)
        return folder

    return run


@pytest.fixture(scope="session")
def load_weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The last weights of a run folder, by name, those of a moving average as well."""
    from detection.checkpoint import load_checkpoint

    def load(folder: Path) -> dict[str, torch.Tensor]:
        content = load_checkpoint(folder / "checkpoints" / "last.pt")
        ema = content["ema"] or {}
        return {**content["model"], **{f"ema.{name}": value for name, value in ema.items()}}

    return load


@pytest.fixture(scope="session")
def assert_equal_weights(
    load_weights: Callable[[Path], dict[str, torch.Tensor]],
) -> Callable[[Path, Path], None]:
    """Sees that two runs ended in the same weights, bit by bit."""

    def compare(a: Path, b: Path) -> None:
        first, second = load_weights(a), load_weights(b)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name

    return compare


@pytest.fixture
def start_script() -> Callable[..., subprocess.Popen[str]]:
    """Starts a script of the project as a user would, on one thread."""

    def start(
        script: str, *arguments: str, launcher: Sequence[str] = (), cwd: Path = ROOT, **options: Any
    ) -> Any:
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / script), *arguments],
            **options,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def run_script(start_script: Callable[..., Any]) -> Callable[..., tuple[int, str]]:
    """Runs a script to its end: its exit status and what it printed."""

    def run(script: str, *arguments: str, **options: Any) -> tuple[int, str]:
        process = start_script(script, *arguments, **options)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    return run


@pytest.fixture(scope="session")
def trained(
    compose_config: Callable[..., Any],
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run of a few steps."""
    from train_det import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(
        compose_config("train", [*tiny_model, *tiny_data, "trainer.steps=3", f"run_dir={folder}"])
    )
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real images beside the checkout; tests that need them skip where they are absent."""
    if not DATA.is_dir():
        pytest.skip("no real images: ../shared/data is absent")
    return DATA


@pytest.fixture(scope="session")
def photographs() -> Callable[..., list[Image.Image]]:
    """Cuts of the real images, or where these are absent, of the documents'."""
    files = sorted((DATA / "coco128" / "images").glob("*.jpg"))
    files = files or sorted((ROOT / "docs" / "images").glob("*.jpg"))

    def cut(number: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
        random = np.random.default_rng(0)
        pictures = []
        for i in range(number):
            picture = Image.open(files[i % len(files)]).convert("RGB")
            side = min(picture.size) // 2
            left, top = (int(random.integers(0, length - side)) for length in picture.size)
            pictures.append(picture.resize(size, box=(left, top, left + side, top + side)))
        return pictures

    return cut


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """An installed Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    file = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if file is None:
        pytest.skip("no Chromium here: install it, or name it in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=file, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def calibrate() -> Callable[[torch.nn.Module, torch.Tensor], torch.nn.Module]:
    """Gives batch norm the statistics of these images, as training would."""

    def calibrate(network: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network.train()(images)
        return network.eval()

    return calibrate


EXPORTED = {
    "ssd": ["model.width=0.25", "model.num_experts=2"],
    "static_ssd": ["model.width=0.25", "model.num_experts=1"],
    # Maps of odd sizes, and fewer detections than there is place for.
    "odd_ssd": [
        "model.width=0.25",
        "model.num_experts=2",
        "model.input_size=75",
        "model.postprocess.score_threshold=0.5",
    ],
    "ssdlite": ["model=ssdlite320_mobilenet_v1", "model.width=0.25", "model.num_experts=2"],
    "efficientnet": ["model=ssdlite320_mobilenet_v1", "model/backbone=efficientnet_cc_b0"],
    "fpnlite": [
        "model=retinanet_mobilenet_v1_fpnlite",
        "model.width=0.25",
        "model.num_experts=2",
        "model.head.num_convs=1",
        "model.preprocess.centered=true",
    ],
    "static_fpnlite": [
        "model=retinanet_mobilenet_v1_fpnlite",
        "model.width=0.25",
        "model.num_experts=1",
        "model.head.num_convs=1",
    ],
    "retinanet": [
        "model=retinanet",
        "model.backbone.name=resnet18",
        "model.num_experts=2",
        "model.pyramid.channels=64",
        "model.head.num_convs=1",
        "model.postprocess.score_threshold=1e-8",
    ],
}


@pytest.fixture(scope="session")
def save_model(
    compose_config: Callable[..., Any],
    calibrate: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Gives the checkpoint of a small model of random weights.

    Scores are spread and features normalised, as those of trained models are. The classes are those
    of the embedded set. A file is written once.
    """
    from detection.build import build_model
    from detection.checkpoint import save_checkpoint
    from detection.config import plain
    from detection.data.shapes import CLASSES
    from detection.structures import Category

    # One for all processes of pytest-xdist: an export takes half a minute.
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exported"
    folder.mkdir(exist_ok=True)

    def save(name: str) -> Path:
        path = folder / f"{name}.pt"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not path.exists():
                overrides = ["model.input_size=64", *EXPORTED[name]]
                model = plain(compose_config("train", overrides))["model"]
                torch.manual_seed(0)
                network = build_model(model, len(CLASSES)).network
                for layer in network.class_layers:
                    torch.nn.init.normal_(network.get_submodule(layer).weight, std=0.12)
                side = model["input_size"]
                calibrate(network, torch.randn(8, 3, side, side))
                save_checkpoint(
                    path,
                    model=network.state_dict(),
                    config={"model": model},
                    categories=[Category(i, own) for i, own in enumerate(CLASSES, start=1)],
                )
        return path

    return save


@pytest.fixture(scope="session")
def export_model(
    compose_config: Callable[..., Any], save_model: Callable[[str], Path]
) -> Callable[..., Path]:
    """Exports what `save_model` gives, into its folder, once."""
    from detection.export.__main__ import export

    def export_model(name: str, *overrides: str) -> Path:
        checkpoint = save_model(name)
        output = checkpoint.with_name(".".join([name, *overrides, "onnx"]))
        with output.with_suffix(".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            words = [f"checkpoint={checkpoint}", f"output='{output}'", *overrides]
            return output if output.exists() else export(compose_config("export", words))

    return export_model


@pytest.fixture(scope="session")
def detected_data(
    save_model: Callable[[str], Path],
    photographs: Callable[..., list[Image.Image]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[str]]:
    """Data whose objects are, nearly, the best that the small SSD finds, so that its AP is high."""
    from detection.detector import Detector

    @cache
    def write(size: tuple[int, int] = (64, 64)) -> list[str]:
        folder = tmp_path_factory.mktemp("detected")
        detector = Detector.from_checkpoint(save_model("ssd"))
        pictures, random = photographs(8, size), np.random.default_rng(0)
        images, annotations = [], []
        for i, (picture, found) in enumerate(
            zip(pictures, detector.predict(pictures), strict=True), start=1
        ):
            picture.save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
            for (x0, y0, x1, y1), label in zip(
                found.boxes[:5].tolist(), found.labels[:5].tolist(), strict=True
            ):
                w, h = x1 - x0, y1 - y0
                x, y = random.normal([x0, y0], [w / 50, h / 50])
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1,
                     "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                )  # fmt: skip
        file = folder / "instances.json"
        categories = [{"id": i, "name": name} for i, name in enumerate(detector.names, start=1)]
        file.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
        return [
            "data=custom",
            *(f"data.{split}.images={folder}" for split in ("train", "val")),
            *(f"data.{split}.annotations={file}" for split in ("train", "val")),
        ]

    return write
