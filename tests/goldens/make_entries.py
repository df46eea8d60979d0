#!/usr/bin/env python3
"""Writes the golden of one sampler, preprocessor or upscaler: entries/KIND-NAME.json, read by tests/it/entries.rs.

    pip install numpy pillow              (each golden records the versions that made it)
    python make_entries.py                writes all goldens of this script
    python make_entries.py sampler-euler  writes one

Every entry of the registries SAMPLERS, PREPROCESSORS and UPSCALERS needs a golden. To add one, write the reference below
as a function of the entry's name, from the paper or project that defines it, never from the Rust code. Samplers that draw noise are
compared with diffusers instead: add them to make_schedules.py.
"""
import json
import pathlib
import sys

import numpy as np
import PIL
from PIL import Image

HERE = pathlib.Path(__file__).parent
SAMPLERS, PREPROCESSORS, UPSCALERS = {}, {}, {}


# Samplers: f(model, x, sigmas, timesteps) -> x, in the k-diffusion parameterization x = x0 + sigma * noise.
# model(x, sigma, t) is the denoised x. sigmas has one value more than timesteps; the last is 0.

def sampler(schedule, steps=10):
    return lambda function: SAMPLERS.setdefault(function.__name__, (function, schedule, steps))


@sampler("karras")
def euler(model, x, sigmas, timesteps):
    """k-diffusion's sample_euler without churn: Karras et al. 2022, algorithm 2."""
    for sigma, following, t in zip(sigmas, sigmas[1:], timesteps):
        derivative = (x - model(x, sigma, t)) / sigma
        x = x + derivative * (following - sigma)
    return x


# Preprocessors: f(image) -> hint, both uint8 [H, W, 3]; parameters are those of the request.

def preprocessor(**parameters):
    return lambda function: PREPROCESSORS.setdefault(function.__name__, (function, parameters))


@preprocessor()
def none(image):
    return image


@preprocessor(down_sampling_rate=1.0)
def tile(image):
    """A rate of 1 keeps the image; other rates are compared with OpenCV in tests/steer/make_hints.py."""
    return image


# Upscalers: f(image, width, height). Pixels: uint8 [H, W, 3]. Latents: float [C, H, W].

def upscaler(kind):
    return lambda function: UPSCALERS.setdefault(function.__name__, (function, kind))


def interpolate(latents, width, height, weights):
    """Separable interpolation; weights(from, to) is the matrix [to, from] of one axis."""
    rows, columns = weights(latents.shape[1], height), weights(latents.shape[2], width)
    return np.einsum("yh,chw,xw->cyx", rows, latents, columns)


def matrix(size, to, taps):
    out = np.zeros((to, size))
    for i in range(to):
        for source, weight in taps(i, size / to):
            out[i, min(max(source, 0), size - 1)] += weight
    return out


@upscaler("latents")
def latent(latents, width, height):
    """torch.nn.functional.interpolate, mode bilinear, align_corners=False."""
    def taps(i, scale):
        x = max((i + 0.5) * scale - 0.5, 0.0)
        return [(int(x), 1 - x % 1), (int(x) + 1, x % 1)]
    return interpolate(latents, width, height, lambda size, to: matrix(size, to, taps))


@upscaler("latents")
def latent_bicubic(latents, width, height):
    """torch.nn.functional.interpolate, mode bicubic (a = -0.75), align_corners=False."""
    def cubic(x, a=-0.75):
        x = abs(x)
        if x <= 1: return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def taps(i, scale):
        x = (i + 0.5) * scale - 0.5
        base = int(np.floor(x))
        return [(base + k, cubic(x - base - k)) for k in range(-1, 3)]
    return interpolate(latents, width, height, lambda size, to: matrix(size, to, taps))


@upscaler("latents")
def latent_nearest(latents, width, height):
    """torch.nn.functional.interpolate, mode nearest."""
    return interpolate(latents, width, height, lambda size, to: matrix(size, to, lambda i, scale: [(int(i * scale), 1)]))


@upscaler("pixels")
def lanczos(image, width, height):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


@upscaler("pixels")
def bicubic(image, width, height):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def network(x, t):
    """The elementwise network of make_schedules.py and tests/it/scheduler.rs; predicts the noise."""
    return 0.8 * np.tanh(0.9 * x + 0.3 * np.sin(t / 150.0)) + 0.1 * x


def sampler_golden(name):
    function, schedule, steps = SAMPLERS[name]
    tables = json.loads((HERE / "schedules.json").read_text())["tables"]  # diffusers' σ of Euler's method
    table = next(t for t in tables if (t["sampler"], t["schedule"], t["steps"]) == ("euler", schedule, steps))
    noise = np.random.default_rng(7).standard_normal((1, 4, 3, 3)).astype(np.float32)

    def model(x, sigma, t):
        return x - sigma * network(x / np.hypot(sigma, 1.0), t)
    x = function(model, noise.astype(np.float64) * table["init_scale"], table["sigmas"], table["timesteps"])
    return dict(schedule=schedule, steps=steps, noise=numbers(noise), result=numbers(x))


def picture():
    """A gradient, a disc and noise, 13 × 11."""
    y, x = np.mgrid[0:11, 0:13].astype(np.float64)
    image = np.stack([x * 19, y * 23, 255 - 8 * x - 9 * y], -1)
    image[(x - 8) ** 2 + (y - 5) ** 2 < 9] = (200, 40, 60)
    return np.clip(image + np.random.default_rng(3).normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def preprocessor_golden(name):
    function, parameters = PREPROCESSORS[name]
    image = picture()
    return dict(parameters=parameters, width=13, height=11, image=numbers(image), result=numbers(function(image)))


def upscaler_golden(name, width=29, height=20):
    function, kind = UPSCALERS[name]
    latents = np.random.default_rng(5).standard_normal((4, 11, 13)).astype(np.float32)
    image = picture() if kind == "pixels" else latents
    result = function(image if kind == "pixels" else latents.astype(np.float64), width, height)
    return dict(image_width=13, image_height=11, image=numbers(image), width=width, height=height, result=numbers(result))


def numbers(array):
    values = np.asarray(array).ravel().tolist()
    return [v if isinstance(v, int) else float(f"{v:.9g}") for v in values]


KINDS = {"sampler": (SAMPLERS, sampler_golden), "preprocessor": (PREPROCESSORS, preprocessor_golden),
         "upscaler": (UPSCALERS, upscaler_golden)}


def main(wanted):
    known = [f"{kind}-{name}" for kind, (entries, _) in KINDS.items() for name in entries]
    if unknown := set(wanted) - set(known): sys.exit(f"no golden {sorted(unknown)}; known are {known}")
    for kind, (entries, golden) in KINDS.items():
        for name in entries:
            if not wanted or f"{kind}-{name}" in wanted:
                made_by = f"make_entries.py, numpy {np.__version__}, pillow {PIL.__version__}"
                path = HERE / "entries" / f"{kind}-{name}.json"
                path.write_text(json.dumps(dict(made_by=made_by, **golden(name)), separators=(",", ":")) + "\n")
                print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
