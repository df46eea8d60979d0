#!/usr/bin/env python3
"""Makes noise.safetensors: what torch's CPU generator draws, and the Philox noise of AUTOMATIC1111's "NV".

Made with torch 2.15.0 and numpy 2.4.6. Philox is computed here with numpy from Salmon et al. 2011 and the layout of
torch's CUDA `randn`; it was not compared with a GPU.

    python make_noise.py            # writes beside itself

Keys: KIND.SEED.CxHxW.DRAW, each [1, C, H, W]; sum.SEED.CxHxW has the sum of (2i + 1) times the bits of value i, modulo
2^64, of each of three draws. Made where torch uses AVX2 or more.
"""
import pathlib
import numpy as np, torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPES = [(4, 8, 8), (4, 5, 7), (1, 1, 17), (1, 4, 4), (1, 3, 5), (1, 1, 1), (4, 32, 24)]
SEEDS = [0, 1, 42, 2**32 - 1, 4294979640, 2**63 + 12345]
out = {}


def philox(seed, draw, count):
    mask = np.uint64(0xFFFFFFFF)
    c = [np.full(count, draw, np.uint64), np.zeros(count, np.uint64), np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & mask, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    inverse = np.float32(2.0**-32); turn = np.float32(inverse * np.float32(2 * np.pi))
    u = c[0].astype(np.float64) * inverse + inverse / 2
    v = c[1].astype(np.float64) * turn + turn / 2
    return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)


for seed in SEEDS:
    for shape in SHAPES:
        if shape == (4, 32, 24) and seed != 42: continue
        g = torch.Generator("cpu").manual_seed(seed); name = "x".join(map(str, shape))
        for draw in range(3):
            out[f"cpu.{seed}.{name}.{draw}"] = torch.randn((1, *shape), generator=g)
            out[f"nv.{seed}.{name}.{draw}"] = torch.from_numpy(philox(seed, draw, int(np.prod(shape)))).reshape(1, *shape)
for seed, shape in [(7, (4, 128, 128)), (2026, (4, 96, 133)), (11, (16, 64, 64))]:
    g = torch.Generator("cpu").manual_seed(seed); name = "x".join(map(str, shape))
    draws = [torch.randn((1, *shape), generator=g).flatten().view(torch.int32).long() & 0xFFFFFFFF for _ in range(3)]
    out[f"sum.{seed}.{name}"] = torch.stack([(bits * (2 * torch.arange(len(bits)) + 1)).sum() for bits in draws])
save_file(out, HERE / "noise.safetensors")
print(len(out), "draws")
