"""The tutorial's commands, top to bottom, as a reader types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# A training to the end takes half an hour; TUTORIAL_FULL=1 does it.
SHORT = (
    "trainer.steps=4 trainer.evaluate_every=4 trainer.batch_size=4 model.input_size=96"
    " trainer.num_workers=0 evaluation.num_workers=0 evaluation.num_pictures=2"
)


def find_commands() -> list[str]:
    """The indented lines that start a program of this project, continued lines joined."""
    lines = re.sub(r"\\\n +", "", PAGE).splitlines()
    return [line.strip() for line in lines if line.startswith("    python ")]


def save_as_voc(bccd: Path, folder: Path) -> None:
    """The set in the layout of its own repository."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(bccd / "images")
    for name, split in (("trainval", "train"), ("test", "val")):
        content = json.loads((bccd / "annotations" / f"instances_{split}.json").read_text())
        names = {own["id"]: own["name"] for own in content["categories"]}
        things = defaultdict(str)
        for own in content["annotations"]:
            x, y, width, height = own["bbox"]
            things[own["image_id"]] += (
                f"<object><name>{escape(names[own['category_id']])}</name><bndbox>"
                f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + width}</xmax>"
                f"<ymax>{y + height}</ymax></bndbox></object>"
            )
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        for stem, image in zip(stems, content["images"], strict=True):
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename><size><width>{image['width']}</width>"
                f"<height>{image['height']}</height></size>{things[image['id']]}</annotation>"
            )
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")


def test_pictures_of_the_page_are_there() -> None:
    pictures = re.findall(r"\]\((images/.+?)\)", PAGE)
    assert len(pictures) == 4
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 200_000


@pytest.mark.slow
def test_every_command_runs(real_data: Path, tmp_path: Path) -> None:
    save_as_voc(real_data / "bccd", tmp_path / "BCCD_Dataset" / "BCCD")
    for script in ("train_det.py", "eval_det.py", "visualize_det.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    commands = find_commands()
    assert len(commands) == 8
    snippet = re.findall(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)[0]
    (tmp_path / "snippet.py").write_text(snippet)
    for command in [*commands, "python snippet.py"]:
        if "train_det.py" in command and not os.environ.get("TUTORIAL_FULL"):
            command = f"{command} {SHORT}"
        done = subprocess.run(
            [sys.executable, *command.split()[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    made = ["val/metrics.json", "drawn/detections.json", "routing/routing.json", "drawn.png"]
    assert all((tmp_path / "runs" / "bccd" / name).is_file() for name in made)
    assert len(list((tmp_path / "runs" / "bccd" / "split").iterdir())) == 4
