#!/usr/bin/env python3
"""Makes valid but unusual image files, and the pixels that Pillow reads from them, for tests/it/image_files.rs.

    pip install numpy pillow safetensors
    make_images.py        writes files/odd/* and images.safetensors (a key a file: [H, W, 3] bytes)
"""
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, __version__ as pillow
from safetensors.numpy import save_file

HERE = Path(__file__).parent
FOLDER = HERE / "files/odd"
FOLDER.mkdir(parents=True, exist_ok=True)
y, x = np.mgrid[0:24, 0:40]
# Smooth, so that JPEG keeps it; another colour in every corner, so that a wrong turn shows.
picture = Image.fromarray(np.stack([40 + 5 * x, 30 + 8 * y, 220 - 3 * x - 2 * y], -1).clip(0, 255).astype(np.uint8))
expected = {}


def keep(name, image=None, **how):
    path = FOLDER / name
    if image is not None: image.save(path, **how)
    with Image.open(path) as read:
        read.seek(0)
        expected[name] = np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(read).convert("RGB")))


def orientation(value):
    exif = Image.Exif(); exif[0x0112] = value
    return exif.tobytes()


for value in range(1, 9): keep(f"turned-{value}.jpg", picture, quality=95, subsampling=0, exif=orientation(value))
keep("turned-6.png", picture, exif=orientation(6))
keep("turned-6.webp", picture, lossless=True, exif=orientation(6))
keep("cmyk.jpg", picture.convert("CMYK"), quality=95, subsampling=0)
keep("gray.jpg", picture.convert("L"), quality=95)
keep("progressive.jpg", picture, quality=95, subsampling=0, progressive=True)
frames = [picture.convert("RGB"), ImageOps.invert(picture), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
keep("animated.webp", frames[0], save_all=True, append_images=frames[1:], duration=100, lossless=True)
keep("palette.png", picture.quantize(16))
keep("one-bit.png", picture.convert("1"))

# Pillow writes no grey of 16 bits with alpha: the file is put together here. What is transparent keeps its grey.
gray = (y * 2700 + x * 31).astype(">u2"); alpha = (x * 1600).astype(">u2")
rows = b"".join(b"\0" + np.stack([gray[r], alpha[r]], -1).astype(">u2").tobytes() for r in range(24))
chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
(FOLDER / "gray-alpha-16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 4, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
expected["gray-alpha-16.png"] = np.repeat(np.round(gray.astype(np.float64) / 257).astype(np.uint8)[..., None], 3, 2)
save_file(expected, HERE / "images.safetensors", {"made_by": f"make_images.py, pillow {pillow}, numpy {np.__version__}"})
print({k: v.shape for k, v in expected.items()})
