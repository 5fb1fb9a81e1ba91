"""Pictures: read from files and bytes within limits, and decoded by Pillow.

A file is opened by name alone, never an address; its kind is one of :data:`FORMATS`. Reading a row looks at the header;
pixels are decoded when the row is tokenised and when it is scored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import expanded
from prefopt.core.plugins import how_to_install
from prefopt.errors import ConfigError, DataError, first_line
from prefopt.records import Picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of files that are decoded, by Pillow's names; others may start programs (EPS) or are no pictures."""
MAX_BYTES, MAX_PIXELS = 64 << 20, 100_000_000
"""Limits of a picture: its file, and its pixels once decoded."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_SEVERAL = "MPO"
"""Pillow's name for a JPEG with further pictures behind it (previews, depths), as telephones write them: the first is
what is shown."""
_EXIF_OF_PNG = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

BAD_PICTURE = "bad picture"
"""The kind of problem of a row whose picture cannot be used."""


class BadPicture(ValueError):
    """What is wrong with a picture, in a line without its row; ``source``: of the file at this path."""

    def __init__(self, what: str, source: str = "") -> None:
        super().__init__(what)
        self.source = source


class PictureByAddress(BadPicture):
    """A picture is named by an address, which is never fetched."""


class PictureOutside(BadPicture):
    """A path leads out of the folder that bounds it; the file is not looked for."""


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """The folder that rows may name files of pictures in, absolute; relative paths start there. ``named``: by
    ``--picture-folder``, not as the folder of the rows' own file."""

    path: Path
    named: bool = False

    @classmethod
    def of(cls, name: str) -> PictureFolder:
        """The folder that a user named. Raises :class:`ConfigError` where there is none."""
        path = expanded(name).absolute()
        if not path.is_dir():
            raise ConfigError(f"--picture-folder {name}: there is no such folder; check the path")
        return cls(path, named=True)

    def inside(self, text: str) -> Path:
        """The absolute path that ``text`` names. Raises :class:`PictureOutside` where it leads out of the folder, by
        ``..``, as an absolute path or by a link. Links of a snapshot in the Hub's cache to its own blobs stay inside.
        """
        path = (self.path / text).absolute()
        bounds = [self.path.resolve()]
        if repository := _HUB_SNAPSHOT.match(bounds[0].as_posix()):
            bounds.append(Path(repository[1], "blobs"))
        real = path.resolve()
        if not any(real.is_relative_to(bound) for bound in bounds):
            where = f"--picture-folder {self.path}" if self.named else f"{self.path}, the folder of the rows"
            what = "name a folder that holds all pictures" if self.named else "permit its folder by --picture-folder"
            raise PictureOutside(f"picture {text[:200]} is outside of {where}; {what}", str(path))
        return path


_HUB_SNAPSHOT = re.compile(r"(.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/|$)")
"""A folder within a revision in the Hub's cache; the group is its repository."""
ANYWHERE = PictureFolder(Path("/"))
"""No bound: of rows that this program wrote, whose paths were checked when they were read."""


def read_picture(value: object, folder: PictureFolder | None = None) -> Picture:
    """The picture that ``value`` names or holds.

    A path (in ``folder``; anywhere without one), a ``data:`` URL, bytes, the struct of a column of pictures in Arrow
    (``bytes`` and ``path``), or a picture of Pillow. Raises :class:`BadPicture` for all else, and for a file that is
    missing, no picture or beyond the limits; :class:`ConfigError` without Pillow.
    """
    if isinstance(value, dict):
        return _of_struct(value, folder)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return of_bytes(bytes(value))
    if isinstance(value, str):
        return _of_text(value, folder)
    if callable(save := getattr(value, "save", None)) and hasattr(value, "getbbox"):
        written = io.BytesIO()
        try:
            save(written, format="PNG")
        except Exception as error:  # of any class: modes that PNG does not have, files that are closed
            raise BadPicture(f"a picture of Pillow cannot be used ({first_line(error)})") from None
        return of_bytes(written.getvalue())
    raise BadPicture(f"a picture is {type(value).__name__}, not a path, bytes or a data: URL")


def of_bytes(data: bytes, source: str = "") -> Picture:
    """The picture in the bytes of a file, kept unless ``source`` names one. Raises :class:`BadPicture`."""
    if len(data) > MAX_BYTES:
        raise BadPicture(f"a picture has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    with _opened(data) as image:
        width, height = image.size
        turned = _may_turn(image) and image.getexif().get(0x0112) in _TURNED
    if turned:
        width, height = height, width
    return Picture(digest_of(data), width, height, source, b"" if source else data)


def digest_of(data: bytes) -> bytes:
    """:attr:`Picture.digest` of the bytes of a file: the first half of their SHA-256."""
    return hashlib.sha256(data).digest()[:16]


def changed_pictures(files: Mapping[str, bytes]) -> list[str]:
    """Which files no longer have these digests, or cannot be read. Hashes of unchanged files are remembered."""
    there = [path for path in files if Path(path).is_file() and os.access(path, os.R_OK)]
    hashes = dict(zip(there, file_hashes(list(map(Path, there)), error=DataError), strict=True))
    return [path for path, digest in files.items() if hashes.get(path, "")[:32] != digest.hex()]


def file_state(path: str) -> list[int]:
    """Size and times of a file, which tell whether it has changed; empty where there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def bytes_of(picture: Picture) -> bytes:
    """The bytes of a picture's file. Raises :class:`DataError` where the file is gone or has changed since."""
    if not picture.source:
        return picture.data
    try:
        data = Path(picture.source).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); restore the picture", file=picture.source) from None
    if digest_of(data) != picture.digest:
        raise DataError("this picture has changed since the data were read; run the command again", file=picture.source)
    return data


def decoded(picture: Picture, *, as_held: bool = False) -> Any:
    """The picture as Pillow's image, turned as its camera says: in RGB, what is transparent on white, or ``as_held`` by
    the file. Raises :class:`BadPicture` where it is damaged, :class:`DataError` as :func:`bytes_of`."""
    from PIL import Image, ImageOps

    with _opened(bytes_of(picture)) as image:
        upright = ImageOps.exif_transpose(image)
        if as_held:
            return upright
        if upright.has_transparency_data:
            front = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", front.size, (255, 255, 255, 255)), front)
        return upright.convert("RGB")


def reencoded(picture: Picture) -> Picture:
    """The picture as PNG, as people see it, without metadata. Raises as :func:`decoded`."""
    written = io.BytesIO()
    image = decoded(picture)
    image.info.clear()  # a profile of colours would be written
    image.save(written, "PNG")
    return of_bytes(written.getvalue())


def data_url(picture: Picture) -> str:
    """The picture as a ``data:`` URL."""
    data = bytes_of(picture)
    with _opened(data) as image:
        kind = "jpeg" if image.format == _SEVERAL else image.format.lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """Pillow's image of the bytes of a file, within the limits. Its errors become :class:`BadPicture`."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError(f"pictures need Pillow: {how_to_install('pictures')}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadPicture(f"a picture has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
                if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != _SEVERAL:
                    raise BadPicture(f"a picture has {frames} frames; give one of them")
                if image.mode.startswith("I") or image.mode == "F":  # RGB of them would be white where it is not black
                    raise BadPicture(f"a picture has greys of more than 8 bits (mode {image.mode}); save it with 8")
                yield image
    except (BadPicture, DataError):
        raise
    except UnidentifiedImageError:
        raise BadPicture(f"is not a picture in a supported format ({', '.join(FORMATS)})") from None
    except Exception as error:  # of any class: the file caused it
        raise BadPicture(f"the picture is damaged ({first_line(error)})") from None


def _may_turn(image: Any) -> bool:
    """Whether an image has EXIF. Of a PNG only that before its pixels counts, which are not decoded for it."""
    return image.format != "PNG" or any(name in image.info for name in _EXIF_OF_PNG)


def _of_text(text: str, folder: PictureFolder | None) -> Picture:
    if match := _DATA_URL.match(text):
        return of_bytes(_decoded_base64(text[match.end() :]))
    if text[:5].lower() == "data:":
        raise BadPicture("a data: URL that is not of the form data:image/...;base64,...")
    if _ADDRESS.match(text):
        raise PictureByAddress(f"{text[:60]} is an address, which is never fetched; save the picture and give its path")
    name = text.removeprefix("file://")
    try:
        path = Path(name).absolute() if folder is None else folder.inside(name)
    except (OSError, RuntimeError, ValueError) as error:  # names too long, links in a circle, zero bytes
        if isinstance(error, BadPicture):
            raise
        raise BadPicture(f"picture {text[:200]} cannot be read ({first_line(error)})") from None
    try:
        if not path.is_file():
            what = "is no file" if path.exists() else "there is no such file"
            raise BadPicture(f"picture {text[:200]}: {what}; relative paths start at {_start(folder)}", str(path))
        if path.stat().st_size > MAX_BYTES:
            what = f"has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read"
            raise BadPicture(f"picture {text[:200]} {what}", str(path))
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadPicture):
            raise
        raise BadPicture(f"picture {text[:200]} cannot be read ({first_line(error)})", str(path)) from None
    try:
        return of_bytes(data, str(path))
    except BadPicture as bad:
        raise BadPicture(f"picture {text[:200]}: {bad}", str(path)) from None


def _start(folder: PictureFolder | None) -> str:
    return "the working folder" if folder is None else "--picture-folder" if folder.named else str(folder.path)


def _of_struct(value: dict[Any, Any], folder: PictureFolder | None) -> Picture:
    """Of ``{"bytes": ..., "path": ...}`` as in Arrow, where bytes may be base64, or ``{"url": ...}``."""
    data = value.get("bytes")
    if isinstance(data, str) and data:
        data = _decoded_base64(data)
    if isinstance(data, (bytes, bytearray)) and data:
        return of_bytes(bytes(data))
    for key in ("path", "url", "image"):
        if isinstance(found := value.get(key), str) and found:
            return _of_text(found, folder)
    raise BadPicture(f"a picture is an object with {', '.join(map(str, value)) or 'nothing'}, not bytes, path or url")


def _decoded_base64(text: str) -> bytes:
    if len(text) > MAX_BYTES * 3 // 2:
        raise BadPicture(f"a picture has {len(text):,} characters of base64; at most {MAX_BYTES:,} bytes are read")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadPicture("the bytes of a picture are not base64") from None
