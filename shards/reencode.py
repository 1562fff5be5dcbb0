"""Images made smaller before they are stored, and images decoded whole to see that they can be.

Pixels are what training would see of the original (shards/decode.py): 8-bit RGB in the picture's upright orientation;
transparency and colour profiles are dropped, as there.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from shards.decode import decode_picture
from shards.image_header import DecodeError, ImageInfo

_SHRUNK = (8, 4, 2)  # in the DCT, to 1/s
_SPARE = 2  # pixels a pixel of the result that are left to the antialiased resize, so that the scale is not seen
_MAX_SIDE = 65_500  # of a JPEG


def check_decodes(data: bytes, info: ImageInfo) -> None:
    """Decode an image at full size.

    Raises:
        DecodeError: it is damaged or cut off.
    """
    decode_picture(data, info, 1)


def shrink(data: bytes, info: ImageInfo, *, short_side: int, quality: int) -> bytes:
    """The image with a short side of `short_side` pixels (less than it has) as a JPEG, upright, antialiased (Lanczos).

    Raises:
        DecodeError: it does not decode.
    """
    short = min(info.width, info.height)
    width, height = (max(1, round(side * short_side / short)) for side in (info.width, info.height))
    if max(width, height) > _MAX_SIDE:
        raise DecodeError(f"{info.width} x {info.height} pixels would become {width} x {height}, too long for a JPEG")
    scale = next((s for s in _SHRUNK if info.format == "jpeg" and short >= s * _SPARE * short_side), 1)
    pixels, _ = decode_picture(data, info, scale)
    grey = info.components == 1
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    stream = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=quality)
    return stream.getvalue()
