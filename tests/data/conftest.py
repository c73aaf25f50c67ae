"""What several tests of data use: images in memory, in every format that is read, and the memory
of this process."""
import io
import re
from pathlib import Path

import numpy
from PIL import Image


class Memory:
    """Images in memory, each of one shade; those whose number is in `broken` are cut short."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def name(self, i):
        return f"picture{i}"

    def __getitem__(self, i):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (i % 256, i // 256, 0)).save(buffer, "PNG")
        return buffer.getvalue()[:40 if i in self.broken else None]


def every_format() -> dict[str, bytes]:
    """Name -> bytes of small images in every format that is read."""
    rng = numpy.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=numpy.uint8))
    coarse = coarse.resize((64, 48), Image.BICUBIC)
    deep = Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=numpy.uint16))
    clear = coarse.convert("RGBA")
    clear.putalpha(coarse.convert("L"))
    frames = [coarse.rotate(angle) for angle in (90, 180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, image, format, options in [
            ("plain.jpg", coarse, "JPEG", {}),
            ("progressive.jpg", coarse, "JPEG", dict(progressive=True)),
            ("cmyk.jpg", coarse.convert("CMYK"), "JPEG", {}),
            ("gray.jpg", coarse.convert("L"), "JPEG", {}),
            ("turned.jpg", coarse, "JPEG", dict(exif=exif)), ("plain.png", coarse, "PNG", {}),
            ("clear.png", clear, "PNG", {}), ("deep.png", deep, "PNG", {}),
            ("palette.png", coarse.quantize(16), "PNG", dict(transparency=3)),
            ("moving.gif", coarse, "GIF", dict(save_all=True, append_images=frames)),
            ("moving.webp", coarse, "WEBP", dict(save_all=True, append_images=frames)),
            ("plain.webp", coarse, "WEBP", dict(lossless=True)), ("plain.bmp", coarse, "BMP", {}),
            ("plain.ppm", coarse, "PPM", {}), ("plain.tif", coarse, "TIFF", {}),
            ("packed.tif", coarse, "TIFF", dict(compression="tiff_lzw")),
            ("deep.tif", deep, "TIFF", {}), ("plain.jp2", coarse, "JPEG2000", {}),
            ("plain.avif", coarse, "AVIF", {})]:
        buffer = io.BytesIO()
        try:
            image.save(buffer, format, **options)
        except (KeyError, OSError):                 # not every PIL has JPEG 2000 and AVIF
            continue
        files[name] = buffer.getvalue()
    return files


def resident_mb() -> float:
    """Of this process, by /proc."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
