"""An exported file with integer convolutions."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from detection.errors import UserError
from detection.export.files import written_whole


def quantize_onnx(source: str | Path, images: Sequence[np.ndarray], path: str | Path) -> int:
    """Write an ONNX file whose static convolutions compute in INT8.

    ONNX Runtime's static quantiser: weights of 7 bits by output channel (without VNNI, sums of
    products of 8 bits overflow), activations of 8 bits by tensor, from the least and largest
    value seen. Routing, kernels mixed at run time and their convolutions, decoding and suppression
    stay in float.

    Args:
        source: as `export_onnx` writes it.
        images: batches to calibrate with, as the file takes them.
        path: where to write; its metadata gains `quantized`.

    Returns:
        How many convolutions compute in INT8.

    Raises:
        UserError: where there are no images, no such convolution, or onnxruntime is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise UserError(
            f"quantize=true needs {error.name}: pip install 'condconv-detection[export]'"
        ) from error
    if not len(images):
        raise UserError("quantize=true needs images to calibrate with: the data has none")
    model = onnx.load(source)
    num_convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    if not num_convolutions:
        raise UserError(f"{source} has no static convolution to quantise")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with written_whole(path) as partial, _quiet(), tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(result)
        del quantized.metadata_props[:]
        quantized.metadata_props.extend(model.metadata_props)
        quantized.metadata_props.add(key="quantized", value="int8")
        onnx.save(quantized, partial)
    return num_convolutions


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
