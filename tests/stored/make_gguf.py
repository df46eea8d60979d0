"""Writes gguf.json and gguf.safetensors: layouts of GGUF UNets of the demonstration model's shape, as ComfyUI-GGUF
stores SDXL, and the latents that diffusers draws with the numbers in them.

Bytes of blocks are a hash of their place, so that the test makes the same files. Made with torch 2.15, diffusers 0.42.1,
gguf 0.19.0. Run: python make_gguf.py MODEL, the demonstration model with its tokenizers
"""

import json
import pathlib
import sys

import gguf
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

# Of each type: where its scale and its minimum lie in a block, and the minimum in scales.
BLOCKS = {
    "Q8_0": (0, None, 0), "Q5_0": (0, None, 0), "Q4_0": (0, None, 0), "Q5_1": (0, 2, -15.5), "Q4_1": (0, 2, -7.5),
    "Q2_K": (80, 82, 1.5), "Q3_K": (108, None, 0), "Q4_K": (0, 2, 7.5), "Q5_K": (0, 2, 15.5), "Q6_K": (208, None, 0),
}
CASES = {"q8_0": ["Q8_0"], "q5_0 and q4_0": ["Q5_0", "Q4_0"], "every type": list(BLOCKS)}
REQUEST = dict(prompt="A sunset over mountains", seed=7, steps=3, cfg_scale=4.0, width=128, height=128,
               sampler_name="euler", scheduler="leading")


def hashed(count, seed):
    """`count` numbers of 32 bits."""
    h = (np.arange(count, dtype=np.uint64) + seed * 7919).astype(np.uint32)
    with np.errstate(over="ignore"):
        h = h * np.uint32(2654435761)
        h ^= h >> np.uint32(15)
        h = h * np.uint32(2246822519)
        h ^= h >> np.uint32(13)
    return h


def blocks(kind, count, seed, scale):
    """Bytes of `count` numbers, one row a block, and the scales in them."""
    at, least_at, ratio = BLOCKS[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = (hashed(count // numbers * size, seed) & 255).astype(np.uint8).reshape(-1, size)
    scale, least = np.float16(scale), np.float16(scale * ratio)
    data[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if least_at is not None:
        data[:, least_at : least_at + 2] = np.frombuffer(least.tobytes(), np.uint8)
    return data, float(scale), float(least)


def single(name, layers=1):
    """The name of single files."""
    renames = [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
               ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
               ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    for old, new in renames:
        if name.startswith(old + "."):
            return new + name[len(old):]
    parts = name.split(".")
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if parts[0] == "mid_block":
        if parts[1] == "attentions":
            return ".".join(["middle_block", "1", *parts[3:]])
        return ".".join(["middle_block", str(2 * int(parts[2])), resnet[parts[3]], *parts[4:]])
    way, block, kind, layer, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), parts[4:]
    down = way == "down_blocks"
    at = 1 + block * (layers + 1) if down else block * (layers + 1)
    start = "input_blocks" if down else "output_blocks"
    if kind == "resnets":
        return ".".join([start, str(at + layer), "0", resnet[rest[0]], *rest[1:]])
    if kind == "attentions":
        return ".".join([start, str(at + layer), "1", *rest])
    if kind == "downsamplers":
        return ".".join([start, str(at + layers), "0", "op", *rest[1:]])
    has_attention = block < 2  # of the demonstration model
    return ".".join([start, str(at + layers), "2" if has_attention else "1", "conv", *rest[1:]])


def main(demo):
    here = pathlib.Path(__file__).parent
    pipe = StableDiffusionXLPipeline.from_pretrained(demo, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    config = json.loads((pathlib.Path(demo) / "unet/config.json").read_text())
    base, shapes = dict(pipe.unet.config), {k: tuple(v.shape) for k, v in pipe.unet.state_dict().items()}
    cases, goldens = {}, {}
    for case, kinds in CASES.items():
        tensors, state = [], {}
        for number, (name, shape) in enumerate(shapes.items()):
            count = int(np.prod(shape))
            fan = count // shape[0]
            entry = dict(name=single(name), shape=list(shape), seed=number + 1)
            # As ComfyUI-GGUF's converter chooses.
            if len(shape) == 1 or count <= 1024:
                entry.update(type="F32", scale=0.1, least=float(name.endswith("weight") and len(shape) == 1))
                if len(shape) > 1:
                    entry["scale"] = float(1 / np.sqrt(fan))
                h = hashed(count, number + 1).astype(np.float64) / 2**31 - 1
                values = (h * entry["scale"] + entry["least"]).astype(np.float32)
            else:
                kind = kinds[number % len(kinds)]
                numbers, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
                rows = count % 256 == 0 and shape[-1] % 256 != 0
                row = 256 if rows else shape[-1]
                if row % numbers:
                    entry.update(type="F16", scale=float(1.7 / np.sqrt(fan)), least=0.0, rows=rows)
                    h = hashed(count, number + 1).astype(np.float64) / 2**31 - 1
                    values = (h * entry["scale"]).astype(np.float16).astype(np.float32)
                else:
                    quant = gguf.GGMLQuantizationType[kind]
                    unit = gguf.quants.dequantize(blocks(kind, count, number + 1, 1.0)[0], quant).std()
                    data, scale, least = blocks(kind, count, number + 1, 1 / np.sqrt(fan) / unit)
                    entry.update(type=kind, scale=scale, least=least, rows=rows)
                    values = gguf.quants.dequantize(data, quant).reshape(-1)
            tensors.append(entry)
            state[name] = torch.from_numpy(values.reshape(shape).copy())
        unet = UNet2DConditionModel.from_config(base)
        unet.load_state_dict(state)
        pipe.unet = unet.eval()
        pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                timestep_spacing="leading", steps_offset=1)
        latents = pipe(prompt=REQUEST["prompt"], num_inference_steps=REQUEST["steps"], guidance_scale=REQUEST["cfg_scale"],
                       width=REQUEST["width"], height=REQUEST["height"], output_type="latent",
                       generator=torch.Generator("cpu").manual_seed(REQUEST["seed"])).images
        print(case, "latents of deviation %.3f" % latents.std().item(), {t["type"] for t in tensors})
        cases[case], goldens[case] = tensors, latents.contiguous()
    (here / "gguf.json").write_text(json.dumps({
        "made_by": "make_gguf.py, torch 2.15, diffusers 0.42.1, gguf 0.19.0", "config": config, "request": REQUEST,
        "cases": {case: [[t["name"], t["shape"], t["type"], t["seed"], t["scale"], t["least"], t.get("rows", False)]
                         for t in tensors] for case, tensors in cases.items()},
    }))
    save_file(goldens, here / "gguf.safetensors")


main(sys.argv[1])
