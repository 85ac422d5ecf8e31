"""An exported file with integer convolutions."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from detection.errors import UserError
from detection.export.conditional import calibrate
from detection.export.files import written_whole
from detection.export.integer_layers import quantize_layers


def quantize_onnx(
    source: str | Path, images: Sequence[np.ndarray], path: str | Path, *, experts: bool = True
) -> int:
    """Write an ONNX file whose convolutions compute in INT8.

    Static ones by ONNX Runtime's quantiser: weights of 7 bits by output channel (without VNNI,
    sums of products of 8 bits overflow), activations of 8 bits by tensor, from the least and
    largest value seen. CondConv layers mix integers and convolve with them, see
    `detection.export.integer_layers`. Routers, decoding and suppression stay in float.

    Args:
        source: as `export_onnx` writes it.
        images: batches to calibrate with, as the file takes them.
        path: where to write; its metadata gains `quantized`.
        experts: else CondConv layers stay as they are.

    Returns:
        How many convolutions compute in INT8.

    Raises:
        UserError: where there are no images, no convolutions, or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnx_ir
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise UserError(f"quantize=true needs {error.name}: pip install -e '.[export]'") from error
    if not len(images):
        raise UserError("quantize=true needs images to calibrate with: the data has none")
    model = onnx.load(source)
    num_convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    ranges = calibrate(onnx_ir.load(source), images) if experts else {}
    if not num_convolutions + len(ranges):
        raise UserError("quantize=true: the network has no convolution")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            # What clips a convolution's output is left to its codes, which end where it does.
            op_types_to_quantize=["Conv", "Clip", "Relu"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx_ir.load(result)
        if experts:
            num_convolutions += quantize_layers(quantized, ranges)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        quantized.metadata_props.clear()
        quantized.metadata_props.update(properties, quantized="int8")
        with written_whole(path) as partial:
            onnx_ir.save(quantized, partial)
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
