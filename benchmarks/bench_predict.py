"""Images a second of `Detector.predict` and `visualize_det.py` against one image after the other.

    python benchmarks/bench_predict.py checkpoint.pt IMAGES [--rounds 5] [--batch-size 8]
        [--threads 2] [--device cuda]

The plain side opens an image, predicts, and (drawing) draws and writes, before it takes the next.
The sides run in turn, round after round, on the same files, after one round that does not count;
times are medians over the rounds. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from PIL import Image

from detection.detector import Detector
from detection.images import load_image
from detection.visualization.drawing import draw_detections
from detection.visualization.frames import draw_frames
from detection.visualization.media import read_source, write_picture

THRESHOLD = 0.4


def check_equal(detector: Detector, paths: list[Path], batch_size: int) -> float:
    """The largest difference of a score between the sides."""
    together = detector.predict(paths, batch_size=batch_size)
    alone = [detector.predict(path)[0] for path in paths]
    differences = [
        (a.scores - b.scores).abs().max().item()
        for a, b in zip(together, alone, strict=True)
        if len(a.scores) == len(b.scores) > 0
    ]
    return max(differences, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--max-images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    detector = Detector.from_checkpoint(args.checkpoint, device=args.device)
    source = read_source(args.images)
    source.files = source.files[: args.max_images]
    source.num_frames = len(source.files)
    paths = source.files

    with TemporaryDirectory() as folder:

        def predict_plain() -> None:
            for path in paths:
                detector.predict(load_image(path), score_threshold=THRESHOLD)

        def predict() -> None:
            detector.predict(paths, score_threshold=THRESHOLD, batch_size=args.batch_size)

        def draw_plain() -> None:
            for path in paths:
                image: Image.Image = load_image(path)
                (found,) = detector.predict(image, score_threshold=THRESHOLD)
                write_picture(draw_detections(image, found), Path(folder) / path.name)

        def draw() -> None:
            frames = draw_frames(
                detector, source, folder, score_threshold=THRESHOLD, batch_size=args.batch_size
            )
            deque(frames, maxlen=0)

        print(
            f"{len(paths)} images of {args.images}, batches of {args.batch_size}, torch "
            f"{torch.__version__}, {args.device}, {args.threads} threads"
        )
        print(f"scores differ by {check_equal(detector, paths[:16], args.batch_size):.1e} at most")
        print(f"{'images a second':16} {'one by one':>12} {'ours':>12} {'ratio':>8}")
        rows: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "predict": (predict_plain, predict),
            "draw and write": (draw_plain, draw),
        }
        for name, sides in rows.items():
            times: list[tuple[float, ...]] = []
            for _ in range(args.rounds + 1):
                own = []
                for side in sides:
                    start = perf_counter()
                    side()
                    own.append(perf_counter() - start)
                times.append(tuple(own))
            plain, ours = (median(column) for column in zip(*times[1:], strict=True))
            ratios = sorted(own[0] / own[1] for own in times[1:])
            print(
                f"{name:16} {len(paths) / plain:12.1f} {len(paths) / ours:12.1f} "
                f"{plain / ours:8.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
