#!/usr/bin/env python3
"""Makes the goldens of the preprocessors: what OpenCV and NumPy give for pictures, among them two real photographs.

    pip install opencv-python-headless numpy pillow safetensors
    make_hints.py                     writes hints.safetensors
    make_hints.py DATA                also cuts files/coffee.png and files/chelsea.png from scikit-image's data folder

The photographs are those of `skimage.data.coffee()` (CC0 by its photographer, Rachel Michetti) and
`skimage.data.chelsea()` (CC0 by its photographer, Stefan van der Walt).

Keys: `PICTURE` holds the bytes [H, W, 3], `PICTURE.NAME` what the preprocessor NAME gives, [H, W] where its three
channels are the same and [H, W, 3] otherwise; numbers behind NAME are parameters that are not the default.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, __version__ as pillow
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(20)


def cut(data):
    Image.open(f"{data}/coffee.png").convert("RGB").crop((100, 40, 420, 280)).save(HERE / "files/coffee.png", optimize=True)
    Image.open(f"{data}/chelsea.png").convert("RGB").crop((60, 10, 316, 202)).save(HERE / "files/chelsea.png", optimize=True)


def photograph(name):
    return np.asarray(Image.open(HERE / f"files/{name}.png"))


def drawn():
    """Gradients, shapes of every slope, a texture and noise, in colours whose luminances are near each other."""
    y, x = np.mgrid[0:97, 0:131].astype(np.float64)
    image = np.stack([x * 1.9, y * 2.6, 255 - x - y / 2], -1)
    image[(x - 40) ** 2 + (y - 45) ** 2 < 700] = (200, 40, 60)
    image[np.abs(x - 90) + 2 * np.abs(y - 60) < 30] = (60, 120, 60)
    image[70:90, 8:30] += 60 * np.sin(x[70:90, 8:30] * 1.7)[..., None] * (1, -1, 0.5)
    image[:30, 80:] += rng.normal(0, 25, (30, 51, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def lineart(image):
    x = image.astype(np.float32)
    difference = np.min(cv2.GaussianBlur(x, (0, 0), 6.0) - x, axis=2).clip(0, 255)
    strong = difference[difference > 8]
    scale = max(16.0, float(np.median(strong))) if strong.size else 16.0
    return (difference / np.float32(scale) * np.float32(127)).clip(0, 255).astype(np.uint8)


def scharr(image):
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    across, down = (cv2.convertScaleAbs(cv2.Scharr(gray, cv2.CV_16S, *way)) for way in ((1, 0), (0, 1)))
    return cv2.addWeighted(across, 0.5, down, 0.5, 0)


def hints(image):
    yield "canny", cv2.Canny(image, 100, 200)
    yield "canny.40.90", cv2.Canny(image, 40, 90)
    yield "canny.200.100", cv2.Canny(image, 200, 100)
    yield "scharr", scharr(image)
    yield "grayscale", cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    yield "threshold", cv2.threshold(image.min(2), 127, 255, cv2.THRESH_BINARY)[1]
    yield "threshold.60", cv2.threshold(image.min(2), 60, 255, cv2.THRESH_BINARY)[1]
    yield "lineart", lineart(image)
    yield "invert", cv2.bitwise_not(image)
    yield "blur", cv2.GaussianBlur(image, (0, 0), 9.0)
    yield "blur.1.3", cv2.GaussianBlur(image, (0, 0), 1.3)
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    yield "tile.small", small


pictures = {
    "drawn": drawn(),
    "noise": rng.integers(0, 256, (40, 53, 3), np.uint8),
    "blocks": np.kron(rng.integers(0, 4, (12, 13, 3), np.uint8) * 80, np.ones((4, 4, 1), np.uint8)),
    **{f"{w}x{h}": rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in ((1, 1), (2, 2), (1, 9), (9, 1), (3, 3), (5, 4))},
}
if len(sys.argv) > 1: cut(sys.argv[1])
out = {}
for name, image in pictures.items():
    out[name] = image
    for hint, made in hints(image): out[f"{name}.{hint}"] = made
for name in ("coffee", "chelsea"):
    image = photograph(name)
    out[name] = image[:1, :1].copy()          # the picture itself is the file
    for hint, made in hints(image):
        if hint in ("canny", "canny.40.90", "scharr", "lineart"): out[f"{name}.{hint}"] = made
versions = f"make_hints.py, opencv {cv2.__version__}, numpy {np.__version__}, pillow {pillow}"
save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, HERE / "hints.safetensors", {"made_by": versions})
print(versions, len(out))
