"""The errors of a detector by kind, and the AP that each kind costs.

As D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020),
define them, at IoU 0.50 for a match and 0.10 for background. Two things are COCO's: detections on
crowds are no errors, and classes without ground truth have no part in the mean.

Shapes: D detections, G ground truths, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from detection.evaluation.curves import average_precisions
from detection.evaluation.matches import Matches, Pairs, find_pairs

FOREGROUND, BACKGROUND = 0.5, 0.1

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
MISSED = KINDS.index("missed")
NONE = -1  # a detection that is right or ignored


class Errors(NamedTuple):
    """What `find_errors` finds.

    Args:
        kinds: (D,) the kind of each detection's error, a place in `KINDS`, or `NONE`.
        missed: (G,) ground truths that no detection found, nor would have found with another class
            or a better box.
        counts: (6, K) errors of a kind, by the class of the detection or of the missed one.
        costs: (6,) how much the mean AP50 would rise without the errors of one kind.
        class_costs: (6, K) the same of the AP50 of each class; a class can lose by it.
    """

    kinds: np.ndarray
    missed: np.ndarray
    counts: np.ndarray
    costs: np.ndarray
    class_costs: np.ndarray


def find_errors(matches: Matches) -> Errors:
    """Sort all wrong detections and unfound ground truths by kind, and weigh the kinds.

    A classification or localisation error is mended by making its best detection right, where its
    ground truth was not found; all other wrong detections by leaving them out; a missed ground
    truth by not asking for it.
    """
    kinds, targets = _sort(matches, find_pairs(matches, BACKGROUND))
    found = np.zeros(len(matches.counted), bool)
    found[matches.truths[0, matches.correct]] = True

    # Of the detections that could be made right for an unfound ground truth, the best is.
    mendable = np.flatnonzero(targets >= 0)
    mendable = mendable[~found[targets[mendable]]]
    mendable = mendable[np.argsort(-matches.scores[mendable], kind="stable")]
    reached, first = np.unique(targets[mendable], return_index=True)
    mended = np.zeros(len(kinds), bool)
    mended[mendable[first]] = True
    missed = matches.counted & ~found
    missed[reached] = False

    counts = np.array(
        [np.bincount(matches.labels[kinds == kind], minlength=len(matches.names))
         for kind in range(len(KINDS))]
    )  # fmt: skip
    counts[MISSED] = np.bincount(matches.truth_labels[missed], minlength=len(matches.names))

    num_truths = matches.num_truths
    kept = ~matches.ignored[0]
    labels, correct = matches.labels, matches.correct
    now = average_precisions(labels, matches.scores, correct, kept, num_truths)
    rises, class_costs = [], []
    for kind in range(len(KINDS)):
        of_kind = kinds == kind
        right = of_kind & mended
        # A classification error goes to the class of its ground truth.
        own_labels = labels.copy()
        own_labels[right] = matches.truth_labels[targets[right]]
        without = average_precisions(
            own_labels,
            matches.scores,
            correct | right,
            kept & (~of_kind | right),
            num_truths - counts[MISSED] if kind == MISSED else num_truths,
        )
        # A class of which nothing is asked any more gets 0 for its detections; with none, it leaves
        # the mean.
        without[np.isnan(without) & (np.bincount(labels[kept], minlength=len(now)) > 0)] = 0.0
        without[num_truths == 0] = np.nan
        rises.append(_mean(without) - _mean(now))
        class_costs.append(without - now)
    return Errors(kinds, missed, counts, np.maximum(rises, 0.0), np.array(class_costs))


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _sort(matches: Matches, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(D,) the kind of each detection's error, and (D,) the ground truth it was meant for or -1."""
    num_detections = len(matches.labels)
    same = matches.labels[pairs.detections] == matches.truth_labels[pairs.truths]
    found = np.zeros(len(matches.counted), bool)
    found[matches.truths[0, matches.correct]] = True

    def find_best(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(D,) the highest IoU among some pairs, and (D,) its ground truth or -1."""
        order = np.flatnonzero(of)
        order = order[
            np.lexsort((pairs.truths[order], -pairs.ious[order], pairs.detections[order]))
        ]
        detections, first = np.unique(pairs.detections[order], return_index=True)
        ious, truths = np.zeros(num_detections), np.full(num_detections, -1)
        ious[detections] = pairs.ious[order[first]]
        truths[detections] = pairs.truths[order[first]]
        return ious, truths

    own_ious, own_truths = find_best(same)
    other_ious, other_truths = find_best(~same)
    taken_ious, _ = find_best(same & found[pairs.truths])
    kinds = np.select(
        [
            ~matches.wrong,
            (own_ious >= BACKGROUND) & (own_ious <= FOREGROUND),
            other_ious >= FOREGROUND,
            taken_ious >= FOREGROUND,
            np.maximum(own_ious, other_ious) <= BACKGROUND,
        ],
        [
            NONE,
            *(
                KINDS.index(k)
                for k in ("localization", "classification", "duplicate", "background")
            ),
        ],
        KINDS.index("both"),
    )
    targets = np.where(kinds == KINDS.index("localization"), own_truths, -1)
    targets = np.where(kinds == KINDS.index("classification"), other_truths, targets)
    return kinds, targets
