"""Look at detections: `python visualize_det.py checkpoint=FILE source=IMAGE|FOLDER|VIDEO|0`.

configs/visualize.yaml has the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli import run_script
from detection.config import find_data, plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from detection.data.coco import CocoIndex
    from detection.detector import Detector
    from detection.visualization.frames import DrawnFrame


def main() -> None:
    """The command `visualize-det`."""
    run_script(visualize, config_name="visualize", folder="output")


def visualize(config: DictConfig) -> list[Path]:
    """Draw what a checkpoint detects in a source, or in a split beside its ground truth.

    Args:
        config: composed from configs/visualize.yaml.

    Returns:
        The files written.

    Raises:
        UserError: where the config, the checkpoint or the source is wrong.
    """
    from rich.console import Console

    from detection.build import build
    from detection.checkpoint import load_checkpoint, load_model, read_categories
    from detection.data.sources import data_source, find_split, load_split
    from detection.detector import Detector
    from detection.engine.memory import keep_freed_memory
    from detection.engine.processes import choose_device
    from detection.engine.run_folder import start_logging
    from detection.errors import UserError
    from detection.files import check_folder

    content = plain(config)
    if content["checkpoint"] is None:
        raise UserError("checkpoint is not set: give checkpoint=FILE, as train_det.py writes it")
    if content["format"] not in (None, "jpg", "png"):
        raise UserError(f"format={content['format']}: give jpg or png, or leave it out")
    if content["batch_size"] < 1:
        raise UserError(f"batch_size={content['batch_size']}: give at least 1")
    if not 0 <= content["score_threshold"] <= 1:
        raise UserError(f"score_threshold={content['score_threshold']}: give one from 0 to 1")
    limit = content["max_images"]
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UserError(f"max_images={limit}: give at least 1, or null")
    if content["source"] is not None and content["routing"]:
        raise UserError("routing=true is of a split: leave source out")
    if content["source"] is None and content["save_json"]:
        raise UserError("save_json=true is of a source: give source=; eval_det.py is for a split")
    check_folder(content["output"])
    start_logging(Console(), None)
    device = choose_device(content["device"])
    if device.type == "cpu":
        keep_freed_memory()
    checkpoint = load_checkpoint(content["checkpoint"])
    detector = Detector(load_model(checkpoint), read_categories(checkpoint), device)
    if content["source"] is not None:
        return _draw_source(detector, content)
    source = data_source(find_data(content, checkpoint))
    index = load_split(find_split(build(source), content["split"]))
    draw = _draw_routing if content["routing"] else _draw_split
    return draw(detector, index, content)


def _draw_source(detector: Detector, content: dict[str, Any]) -> list[Path]:
    from contextlib import closing
    from time import perf_counter

    from rich.progress import MofNCompleteColumn, Progress

    from detection.engine.run_folder import LOGGER
    from detection.visualization.frames import draw_frames
    from detection.visualization.media import read_source

    source = read_source(content["source"], output=content["output"])
    limit, batch_size = content["max_images"], content["batch_size"]
    num_expected = min(filter(None, (source.num_frames, limit)), default=None)
    if num_expected != 1:
        detector.warm_up(min(batch_size, num_expected or batch_size))
    drawn: list[DrawnFrame] = []
    frames = draw_frames(
        detector,
        source,
        content["output"],
        suffix=f".{content['format']}" if content["format"] else None,
        score_threshold=content["score_threshold"],
        batch_size=batch_size,
        max_frames=limit,
    )
    started = perf_counter()
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("detecting", total=num_expected)
        with closing(frames):
            try:
                for frame in frames:
                    drawn.append(frame)
                    progress.advance(task)
            except KeyboardInterrupt:
                # The way to end a camera.
                LOGGER.info("interrupted")
    rate = len(drawn) / (perf_counter() - started)
    written = list(dict.fromkeys(frame.path for frame in drawn))
    if content["save_json"]:
        written.append(Path(content["output"]) / "detections.json")
        _write_detections(drawn, detector, written[-1])
    for name in source.unreadable:
        LOGGER.warning("cannot read %s: left out", name)
    if source.num_ignored:
        LOGGER.warning(
            "%d files are no pictures by their suffix, or in the output folder: left out",
            source.num_ignored,
        )
    num_detections = sum(len(frame.detections.scores) for frame in drawn)
    LOGGER.info(
        f"{num_detections} detections in {len(drawn)} pictures, {rate:.1f} pictures a second: "
        f"{content['output']}"
    )
    return written


def _write_detections(drawn: list[DrawnFrame], detector: Detector, path: Path) -> None:
    """Everything that a COCO data set has, with scores: the source has no ids of its own."""
    from detection.evaluation.coco import coco_results
    from detection.files import write_json

    images, annotations = [], []
    for image_id, (name, (height, width), found, _) in enumerate(drawn, start=1):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for result in coco_results(*found[:3], image_id, detector.categories):
            area = result["bbox"][2] * result["bbox"][3]
            own = {"id": len(annotations) + 1, "area": area, "iscrowd": 0}
            annotations.append({**own, **result})
    categories = [category._asdict() for category in detector.categories]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(content, path)


def _draw_split(detector: Detector, index: CocoIndex, content: dict[str, Any]) -> list[Path]:
    from rich.progress import track

    from detection.data.sampler import spread
    from detection.engine.run_folder import LOGGER
    from detection.images import UnreadableImage
    from detection.visualization.gallery import side_by_side
    from detection.visualization.media import write_picture

    own_labels = detector.match_categories(index.categories)
    for line in index.describe():
        LOGGER.warning(line)
    written: list[Path] = []
    chosen = spread(len(index), content["max_images"] or len(index))
    for i in track(chosen, description="detecting"):
        try:
            image = index.load_image(i)
        except UnreadableImage as error:
            LOGGER.warning("cannot read %s: %s", index.file_names[i], error)
            continue
        detections = detector.predict(image)[0]
        picture = side_by_side(
            image,
            index.boxes(i),
            own_labels[index.labels(i)],
            detections,
            names=detector.names,
            score_threshold=content["score_threshold"],
        )
        suffix = content["format"] or "jpg"
        written.append(Path(content["output"]) / f"{index.image_ids[i]}.{suffix}")
        write_picture(picture, written[-1])
    LOGGER.info("%d pictures, ground truth beside detections: %s", len(written), content["output"])
    return written


def _draw_routing(detector: Detector, index: CocoIndex, content: dict[str, Any]) -> list[Path]:
    from rich.progress import track

    from detection.data.sampler import spread
    from detection.engine.run_folder import LOGGER
    from detection.visualization.routing import (
        collect_routing,
        find_collapse,
        load_batches,
        write_routing,
    )

    chosen = spread(len(index), content["max_images"] or len(index))
    unreadable: list[str] = []
    batches = load_batches(
        detector,
        index,
        track(chosen, description="routing"),
        batch_size=content["batch_size"],
        unreadable=unreadable,
    )
    routing = collect_routing(detector, batches, index.names)
    written = write_routing(routing, content["output"])
    for line in [*(f"cannot read {name}" for name in unreadable), *find_collapse(routing)]:
        LOGGER.warning(line)
    LOGGER.info("routing of %d images: %s", len(routing.presence), content["output"])
    return written


if __name__ == "__main__":
    main()
