"""Picture files of any size and kind as arrays."""

import io
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no others: some start programs to read a file
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
Box = tuple[int, int, int, int]  # left, upper, right, lower


def decoded(
    path: Path, content: bytes, channels: int, least: int | None = None, box: Box | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a picture, upright, on white where it is transparent, of 16 bits the upper 8.

    Args:
        path: for the error.
        content: of the file.
        channels: 1 or 3, into which it is converted.
        least: a picture whose shorter side is longer is scaled down, so that this is its length.
        box: the part that is wanted.

    Raises:
        ValueError: naming the file, which is no picture, is cut short, or claims to be too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            if least is not None and box is None:
                picture.draft(None, (least, least))  # a large JPEG is decoded at a half, a quarter or an eighth
            return _pixels(picture, channels, least, box)
    except MemoryError:
        raise
    except Exception as error:  # a file from elsewhere raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "its content is none" if isinstance(error, Image.UnidentifiedImageError) else reason
        raise ValueError(f"{path} is no picture that can be read ({reason})") from error


def _pixels(picture: Image.Image, channels: int, least: int | None, box: Box | None) -> UInt8[np.ndarray, "h w c"]:
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise ValueError("its pixels are real numbers")
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if box is not None:
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"its part {list(box)} is empty")
        picture = picture.crop(box)
    shorter = min(picture.size)
    if least is not None and shorter > least:
        size = [max(1, round(side * least / shorter)) for side in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
