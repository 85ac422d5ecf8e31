"""What opening COCO costs: time and memory, on a generated file of train2017's size.

    python benchmarks/bench_index.py [--images 118287] [--boxes 860001] [--repeats 3]

Times are medians of fresh processes taken in turns, in seconds: `json.load` of the file alone, our
index without its cache, and with it. Memory is the USS of a data loader's workers (what no other
process shares) after the first batch and after a whole epoch of annotations, images left out:
a data set of nothing, ours, and torchvision's CocoDetection, which at full size takes gigabytes in
each process. Exits with status 1 where a target is missed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection

from detection.data.coco import CocoIndex

NUM_CLASSES = 80
NUM_WORKERS = 2
# train2017 has 39 polygon coordinates a box in the mean.
POLYGON_POINTS = (4, 35)
# Targets: a first opening in `json.load`s, a later one in seconds, a worker's memory over that of a
# worker of nothing in MB, and what an epoch adds to it. A forked worker copies some MB of the
# interpreter's pages in its first batches, whatever the size of the data.
MAX_COLD, MAX_WARM, MAX_MEMORY, MAX_GROWTH = 1.5, 0.5, 20.0, 5.0


def write_data(folder: Path, num_images: int, num_boxes: int) -> None:
    """A COCO JSON with all the fields of the official one, and an empty file for each image."""
    draw = random.Random(0)
    (folder / "images").mkdir()
    images = []
    for i in range(1, num_images + 1):
        name = f"{i:012d}.jpg"
        (folder / "images" / name).touch()
        images.append(
            {
                "license": 1,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{i}_d5c6ef6a0f_z.jpg",
                "id": i,
            }
        )
    coordinates = [round(draw.uniform(0, 480), 2) for _ in range(20_000)]
    annotations = []
    for number in range(num_boxes):
        start = draw.randrange(len(coordinates) - 2 * POLYGON_POINTS[1])
        x, y = coordinates[start] / 2, coordinates[start + 1] / 2
        annotations.append(
            {
                "segmentation": [coordinates[start : start + 2 * draw.randint(*POLYGON_POINTS)]],
                "area": coordinates[start] * 7,
                "iscrowd": 0,
                "image_id": draw.randint(1, num_images),
                "bbox": [x, y, round(draw.uniform(1, 240), 2), round(draw.uniform(1, 240), 2)],
                "category_id": draw.randint(1, NUM_CLASSES),
                "id": number + 1,
            }
        )
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    os.utime(file, (0, 0))  # what has just been written is not cached


def time_json(folder: Path) -> float:
    start = time.perf_counter()
    with (folder / "instances.json").open() as file:
        content = json.load(file)
    seconds = time.perf_counter() - start
    assert content
    return seconds


def time_index(folder: Path) -> float:
    start = time.perf_counter()
    open_index(folder)
    return time.perf_counter() - start


def open_index(folder: Path) -> CocoIndex:
    return CocoIndex.load(images=folder / "images", annotations=folder / "instances.json")


class Nothing(Dataset[int]):
    """So many items of nothing."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        return i


class OurAnnotations(Nothing):
    def __init__(self, index: CocoIndex) -> None:
        super().__init__(len(index))
        self.index = index

    def __getitem__(self, i: int) -> int:
        found = self.index.boxes(i), self.index.labels(i), self.index.file_names[i]
        return len(found) + self.index.image_ids[i] + self.index.sizes[i][0]


class TheirAnnotations(CocoDetection):
    def __getitem__(self, i: int) -> int:
        return sum(annotation["category_id"] for annotation in self._load_target(self.ids[i]))


def measure_workers(folder: Path, which: str, start_method: str) -> list[tuple[float, float]]:
    """USS of each worker in MB, (after its first batch, after the epoch)."""
    if which == "CocoDetection":
        dataset: Any = TheirAnnotations(folder / "images", folder / "instances.json")
    else:
        index = open_index(folder)
        dataset = OurAnnotations(index) if which == "ours" else Nothing(len(index))
    loader = DataLoader(
        *(dataset, 64),
        num_workers=NUM_WORKERS,
        prefetch_factor=1,
        multiprocessing_context=start_method,
    )
    batches = iter(loader)
    workers = [worker.pid for worker in batches._workers]  # pyright: ignore
    for _ in workers:
        next(batches)
    first = [read_uss(pid) for pid in workers]
    for _ in range(len(loader) - len(workers)):  # one more call would end the workers
        next(batches)
    return list(zip(first, map(read_uss, workers), strict=True))


def read_uss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context
    ) as pool:  # unlike Pool's, these may have workers
        return pool.submit(function, *arguments).result()


def compare_times(folder: Path, num_repeats: int) -> list[str]:
    """Prints them; returns the targets missed."""
    times: dict[str, list[float]] = {"json.load": [], "cold": [], "warm": []}
    for _ in range(num_repeats):
        for file in folder.glob("cache/**/*.pt"):
            file.unlink()
        times["json.load"].append(in_fresh_process(time_json, folder))
        times["cold"].append(in_fresh_process(time_index, folder))
        times["warm"].append(in_fresh_process(time_index, folder))
    alone, cold, warm = map(statistics.median, times.values())
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:9}  {median:6.2f} s ({spread})  {median / alone:.2f} x json.load")
    missed = []
    if cold > MAX_COLD * alone:
        missed.append(f"the first opening takes more than {MAX_COLD} x json.load")
    if warm > MAX_WARM:
        missed.append(f"a later opening takes more than {MAX_WARM} s")
    return missed


def compare_memory(found: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Prints what `measure_workers` found of each data set; returns the targets missed."""
    missed = []
    for which, workers in found.items():
        for number, ((first, last), (bare_first, bare_last)) in enumerate(
            zip(workers, found["nothing"], strict=True)
        ):
            start, end = first - bare_first, last - bare_last
            print(
                f"worker {number} of {which:13}  USS {first:7.1f} MB, after an epoch {last:7.1f}; "
                f"over nothing {start:+.1f} and {end:+.1f}"
            )
            if which == "ours":
                if max(start, end) > MAX_MEMORY:
                    missed.append(f"worker {number} takes more than {MAX_MEMORY:.0f} MB")
                if end - start > MAX_GROWTH:
                    missed.append(
                        f"worker {number} grows by more than {MAX_GROWTH:.0f} MB an epoch"
                    )
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of opening COCO.")
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["time", "memory"])
    options = parser.parse_args(arguments)
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_data(folder, options.images, options.boxes)
        size = (folder / "instances.json").stat().st_size
        print(f"{options.images} images, {options.boxes} boxes, {size / 1e6:.0f} MB of JSON")
        if "time" in options.parts:
            missed += compare_times(folder, options.repeats)
        if "memory" in options.parts:
            # Of workers as a training has them; a fresh process would spawn its own.
            start_method = multiprocessing.get_start_method()
            print(f"{NUM_WORKERS} workers, start method {start_method}")
            found = {
                which: in_fresh_process(measure_workers, folder, which, start_method)
                for which in ("nothing", "ours", "CocoDetection")
            }
            missed += compare_memory(found)
    print("\n".join(f"target missed: {line}" for line in missed) or "all targets are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
