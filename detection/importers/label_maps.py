"""Category tables for networks that come without one.

The TensorFlow Object Detection API numbers a network's class slots by the ids of its label map,
from 1; slot 0 is background.
"""

from __future__ import annotations

import json
from pathlib import Path

from detection.errors import UserError
from detection.structures import Category

# COCO's label map has 80 classes with ids up to 90.
COCO_NUM_IDS = 90
COCO_UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_NAMES = (  # noqa: SIM905
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")


def default_categories(num_classes: int) -> dict[int, Category]:
    """COCO's label map for 90 classes, else ids from 1; a class without a name is "id_N".

    Returns:
        The category of each class slot.
    """
    names = {id: f"id_{id}" for id in range(1, num_classes + 1)}
    if num_classes == COCO_NUM_IDS:
        used = (id for id in names if id not in COCO_UNUSED_IDS)
        names.update(zip(used, COCO_NAMES, strict=True))
    return {id: Category(id, name) for id, name in names.items()}


def read_categories(path: str | Path, num_classes: int) -> dict[int, Category]:
    """The categories of a COCO JSON, or of a text file with one name a line (ids from 1).

    As many categories as classes: they are the classes in the order of their ids. Fewer in a JSON:
    each is the class of its id.

    Returns:
        The category of each class slot that has one.

    Raises:
        UserError: where the file cannot be read, or its categories are not the network's classes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json.loads(text)["categories"]
            categories = sorted(Category(int(item["id"]), str(item["name"])) for item in records)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
            categories = [Category(id, name) for id, name in enumerate(names, start=1)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read categories from {path}: {error!r}") from error

    by_id = {category.id: category for category in categories}
    if len(by_id) < len(categories):
        raise UserError(f"{path} has categories with the same id: ids must differ")
    if len(categories) == num_classes:
        return dict(enumerate(categories, start=1))
    if path.suffix == ".json" and categories and set(by_id) <= set(range(1, num_classes + 1)):
        return by_id
    raise UserError(
        f"{path} has {len(categories)} categories, the network has {num_classes} classes: "
        "give as many, or a .json whose ids lie within 1 to the number of classes"
    )
