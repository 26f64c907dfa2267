"""One picture file -> one array; what becomes of every depth, alpha, colour profile and orientation.

- **Files**: PNG, JPEG, BMP, WebP and TIFF by their content, whatever the suffix says. An animation and a TIFF of several pages
  are refused; of a JPEG with more pictures (MPO: stereo, previews) the first is read, which is the main one, with a note.
  Refused by name is what Pillow 13 opens but reads as another picture: see `check_header`, `check_tiff` and `check_bmp`.
- **Depth**: unsigned integers of 1 to 16 bits span black to white with the whole range of their type; floats are 0 (black) to
  1 (white). Floats beyond that, signed integers and integers of 32 bits have no white of their own and are refused. Grey keeps
  all its bits until it is resized; 16-bit colour keeps the high byte of each value, which is at most one level of 255 darker.
- **Alpha** (a channel, a palette's, one transparent colour; premultiplied or not): laid on white, before it is resized, so that
  colour hidden under transparency shows nowhere.
- **Colour**: an embedded ICC profile is converted to sRGB (perceptual intent); one that is broken, or of another colour space
  than the picture, is ignored with a note. CMYK without a profile is (255 - C)(255 - K) / 255. PNG's gAMA is not applied,
  with a note where it is not sRGB's; neither are cHRM and cICP. Grey of colour is Rec. 601's luma.
- **Orientation**: EXIF's or XMP's is applied; EXIF that cannot be read counts as upright, with a note.
- **Size**: the shorter side is scaled to the size wanted and the centre cropped, bicubic, antialiased where it shrinks.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
DAMAGED = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, EOFError,
           MemoryError, struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow raises for files that are broken
TAKEN = "taken are unsigned integers of 1 to 16 bits, and floats from 0 to 1"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # one channel of more than 8 bits
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF 2.3's orientations; Pillow's rotations are anticlockwise
SRGB_GAMMA = 1 / 2.2
LEVELS = np.arange(0, 256, 15, dtype=np.uint8)
COLOURS = Image.fromarray(np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), -1).reshape(-1, 18, 3))  # RGB, 18 levels a channel
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # L, 0 to 255
BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES, COLORMAP, SAMPLE_FORMAT, SUBSAMPLING = 258, 259, 262, 277, 284, 320, 339, 530
UNCOMPRESSED, WHITE_IS_ZERO, YCBCR, SEPARATE, SIGNED = 1, 0, 6, 2, 2  # values of these tags of TIFF
FLAT = ("RGB", "RGBA", "CMYK")  # modes that Pillow reads well where channels are stored one after the other

BAD_PROFILE = "a colour profile that cannot be used and is ignored"
BAD_EXIF = "EXIF that cannot be read; it counts as upright"
GAMMA = "a gAMA that is not sRGB's; it is not applied"
CLEAR = "nothing but transparency; it is white"
DARK = "16-bit values below 4096 alone; it is nearly black"
FIRST = "several pictures in one JPEG; the first is taken"


def read_picture(file: Path, size: int, channels: int) -> tuple[np.ndarray, list[str]]:
    """-> uint8 (channels, size, size), and what is to be said of the picture. Raises one of DAMAGED for what cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of EXIF and of sizes below its limit
        image, notes = open_picture(file)
        with image:
            image.load()
            return fit(flatten(turn(image, notes), notes), size, channels), notes


def check_picture(file: Path) -> None:
    """What its header tells; nothing is decoded. Raises one of DAMAGED."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_picture(file)[0].close()


def open_picture(file: Path) -> tuple[Image.Image, list[str]]:
    """Opened, not yet decoded: what its header says is checked, and what is said of it. Raises one of DAMAGED."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"its content is none of {', '.join(FORMATS)}, or a kind of them that Pillow does not read") from None
    try:
        check_header(image)
        if image.format == "TIFF":
            check_tiff(image)
        if image.format == "BMP":
            check_bmp(image)
    except DAMAGED:
        image.close()
        raise
    complete(image)
    return image, [FIRST] if image.format == "MPO" else []


def check_header(image: Image.Image) -> None:
    if min(image.size) < 1:
        raise ValueError(f"{image.width} x {image.height} pixels")
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise ValueError(f"{frames} frames or pages; taken is one picture a file")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        raise ValueError("CMYK without Adobe's marker, which says that 0 is full ink; taken is CMYK with it")
    if image.mode == "RGB" and ";16" in rawmode(image) and "transparency" in image.info:
        raise ValueError("16-bit RGB with one transparent colour, of which Pillow keeps half; taken is an alpha channel")


def check_tiff(image: Image.Image) -> None:
    """Kinds that Pillow opens, but not as they are meant."""
    tags = image.tag_v2
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError(f"signed integers; {TAKEN}")
    if image.mode == "I":
        raise ValueError(f"integers of {tags[BITS][0]} bits; {TAKEN}")
    if image.mode == "F" and tags.prefix == b"MM" and tags.get(COMPRESSION, UNCOMPRESSED) != UNCOMPRESSED:
        raise ValueError("compressed big-endian floats, whose bytes Pillow swaps; taken are little-endian or uncompressed ones")
    if PHOTOMETRIC not in tags:
        raise ValueError("a TIFF that does not say whether 0 is black (PhotometricInterpretation)")
    if tags.get(PLANES) == SEPARATE and (max(tags.get(BITS, (1,))) > 8 or tags.get(SAMPLES, 1) > 1 and image.mode not in FLAT):
        raise ValueError(f"channels stored one after the other (PlanarConfiguration 2), {max(tags[BITS])} bits, {image.mode}; "
                         f"taken so are 8-bit {', '.join(FLAT)}")
    if image.mode in ("P", "PA") and 0 < max(tags[COLORMAP]) < 256:
        raise ValueError("a palette of 8-bit values, where TIFF has 16")
    if (tags[PHOTOMETRIC] == YCBCR and tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
            and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1)):
        raise ValueError("uncompressed YCbCr with fewer colours than pixels; taken is one colour a pixel, or JPEG in TIFF")


def check_bmp(image: Image.Image) -> None:
    """Pillow takes 4 or 8 bits a pixel for 1 where the palette is black and white."""
    image.fp.seek(14)
    head = image.fp.read(16)
    bits = struct.unpack_from("<H", head, 10 if head[0] == 12 else 14)[0]
    if image.mode == "1" and bits != 1:
        raise ValueError(f"{bits} bits a pixel with a palette of black and white alone; taken is 1 bit, or a longer palette")


def rawmode(image: Image.Image) -> str:
    """How the file packs its pixels, in Pillow's words; only until it is loaded."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def complete(image: Image.Image) -> None:
    """Put into `info` what later steps need and pixels do not say: the value of white, whether it is 0, and PNG's transparent
    grey, which counts in the file's own bits, in the 8 bits that Pillow makes of them."""
    if image.format == "TIFF" and image.mode in DEEP:
        image.info["white"] = 2 ** image.tag_v2[BITS][0] - 1
        image.info["inverted"] = image.tag_v2[PHOTOMETRIC] == WHITE_IS_ZERO
    scale = {"L;2": 85, "L;4": 17}.get(rawmode(image))
    if scale and "transparency" in image.info:
        image.info["transparency"] *= scale


def turn(image: Image.Image, notes: list[str]) -> Image.Image:
    """Upright, as Pillow turns a TIFF while it loads. Its exif_transpose writes all of EXIF anew: odd entries make it fail."""
    try:
        method = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except DAMAGED:
        notes.append(BAD_EXIF)
        return image
    return image if method is None else image.transpose(method)


def flatten(image: Image.Image, notes: list[str]) -> Image.Image:
    """Any mode -> L, RGB or F (grey, 0 to 255), in sRGB, without alpha."""
    icc = image.info.get("icc_profile")
    if not icc and "srgb" not in image.info and abs(image.info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) > 0.01:
        notes.append(GAMMA)
    if image.mode in DEEP:
        return Image.fromarray(deep_levels(image, icc, notes))
    if image.mode == "La":
        image = image.convert("LA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = to_srgb(without_alpha(image), icc, notes)
    if alpha is None:
        return colours
    if alpha.getextrema()[1] == 0:
        notes.append(CLEAR)
    return Image.composite(colours, Image.new(colours.mode, colours.size, "white"), alpha)


def without_alpha(image: Image.Image) -> Image.Image:
    """-> L, RGB, CMYK or LAB."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    return image.convert("L") if image.mode in ("1", "LA") else image.convert("RGBA").convert("RGB")


def deep_levels(image: Image.Image, icc: bytes | None, notes: list[str]) -> np.ndarray:
    """One channel of integers or floats -> float32 (H, W), 0 to 255."""
    raw = np.asarray(image)
    if image.mode == "I":
        raise ValueError(f"integers of 32 bits, {raw.min()} to {raw.max()}; {TAKEN}")
    if image.mode == "F" and not (raw.min() >= 0 and raw.max() <= 1):  # NaN is neither
        raise ValueError(f"floats from {raw.min():.6g} to {raw.max():.6g}; {TAKEN}")
    white = 1 if image.mode == "F" else image.info.get("white", 65535)
    if white == 65535 and 0 < raw.max() < 4096:
        notes.append(DARK)
    levels = raw.astype(np.float32) * (255 / white)
    if image.info.get("inverted"):
        levels = 255 - levels
    if icc:
        curve = np.asarray(to_srgb(RAMP, icc, notes).convert("L"))[0]
        levels = np.interp(levels, np.arange(256), curve).astype(np.float32)
    if (clear := image.info.get("transparency")) is not None:
        levels[raw == clear] = 255
    return levels


def to_srgb(colours: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """L, RGB, CMYK or LAB -> L or RGB."""
    if icc:
        try:
            colours = conversion(icc, colours.mode)(colours)
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append(BAD_PROFILE)
    return colours if colours.mode == "L" else colours.convert("RGB")


@lru_cache(maxsize=16)  # the pictures of a folder share a few profiles
def conversion(icc: bytes, mode: str) -> Callable[[Image.Image], Image.Image]:
    """-> what makes sRGB of a picture of this mode. Raises ValueError, OSError or PyCMSError where the profile does not fit.

    A profile that changes no colour by more than one level is sRGB itself and changes none. Little CMS resamples its curve of
    grey by default, up to 10 levels off in the dark of linear light: so its optimisation is off, and its curve is kept.
    """
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    space = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}.get(profile.profile.xcolor_space, "")
    if (mode, space) not in {("L", "L"), ("L", "RGB"), ("RGB", "RGB"), ("CMYK", "CMYK")}:
        raise ValueError(f"a profile of {profile.profile.xcolor_space}, a picture of {mode}")
    flags = ImageCms.Flags.NOOPTIMIZE if space == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB", flags=flags)
    if space != "CMYK" and difference(transform.apply(COLOURS.convert(space)), COLOURS.convert(space)) <= 1:
        return lambda picture: picture
    if space == "L":
        curve = list(transform.apply(RAMP).convert("L").tobytes())
        return lambda grey: grey.point(curve)
    return lambda picture: transform.apply(picture.convert(space))


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, of any channel, as RGB."""
    return int(np.abs(np.asarray(one.convert("RGB")).astype(int) - np.asarray(other.convert("RGB"))).max())


def fit(picture: Image.Image, size: int, channels: int) -> np.ndarray:
    """L, RGB or F -> uint8 (channels, size, size)."""
    if picture.mode != "F":
        picture = picture.convert("L" if channels == 1 else "RGB")
    fitted = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))
    if picture.mode == "F":
        fitted = np.rint(fitted.clip(0, 255)).astype(np.uint8)
    return fitted.transpose(2, 0, 1) if fitted.ndim == 3 else np.repeat(fitted[None], channels, axis=0)
