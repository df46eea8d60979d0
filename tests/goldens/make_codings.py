"""Writes codings.safetensors: bytes in every block format of weights, and their decoded values.

Eight-bit floats by torch 2.15, all 256 codes of each; blocks by gguf 0.19.0 (`gguf.quants.dequantize`), random bytes
with scales of f16 that are numbers. Run: python make_codings.py
"""

import pathlib

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

random = np.random.default_rng(1)
out = {}
codes = torch.arange(256, dtype=torch.uint8)
for name, dtype in [("f8_e4m3", torch.float8_e4m3fn), ("f8_e5m2", torch.float8_e5m2)]:
    out[f"{name}.bytes"] = codes.clone()
    out[f"{name}.numbers"] = codes.view(dtype).to(torch.float32)
# Offsets of the f16 scales in a block.
blocks = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
for name, scales in blocks.items():
    kind = gguf.GGMLQuantizationType[name]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (2048 // numbers, size), dtype=np.uint8)
    for at in scales:
        scale = (random.standard_normal(len(data)) * 0.02).astype("<f2")
        data[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    out[f"{name.lower()}.bytes"] = torch.from_numpy(data.reshape(-1).copy())
    out[f"{name.lower()}.numbers"] = torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(-1).copy())
save_file(out, pathlib.Path(__file__).with_name("codings.safetensors"))
