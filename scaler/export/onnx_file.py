"""One file of ONNX: input `images`, outputs `features`, `patches` and of a classifier `scores`, as many images as come.

What the images are to be divided by, and their size, is in the file's metadata. Models above 2 GB have their weights in
a second file beside it, as ONNX wants it.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaler.export.encoder import Encoder, PlainEncoder

_NEEDS = "ONNX files are written with onnxscript and checked with onnxruntime: pip install 'scaler[export]'"


def write(encoder: Encoder, place: Path, *, dynamic_size: bool) -> None:
    """Write the file by torch's exporter.

    Args:
        dynamic_size: for images of every size that the model takes, instead of `encoder.image_size`.

    Raises:
        ValueError: the packages are missing, or the exporter does not get on with the model.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(_NEEDS) from None
    dynamic = torch.export.Dim.DYNAMIC
    # Sizes stay open only if none of them is a special case in the example: one image, or the size of the positions.
    side = encoder.image_size + (2 * (encoder.patch_size or 32) if dynamic_size else 0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                PlainEncoder(encoder.model).eval(),
                (torch.zeros(2, 3, side, side),),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=list(encoder.outputs),
                dynamic_shapes={"images": {0: dynamic, **({2: dynamic, 3: dynamic} if dynamic_size else {})}},
            )
        except torch.onnx.OnnxExporterError as error:
            why = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(f"torch cannot write {encoder.architecture} as ONNX: {why}") from error
    mean, std = encoder.normalization
    program.model.metadata_props.update(
        {
            "architecture": encoder.architecture,
            "image_size": str(encoder.image_size),
            "mean": json.dumps(mean),
            "std": json.dumps(std),
            **({"class_names": json.dumps(encoder.class_names)} if encoder.class_names else {}),
        }
    )
    program.save(place)


def read(place: Path, encoder: Encoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What onnxruntime makes of the file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(list(encoder.outputs), {"images": images.numpy()})))

    return run
