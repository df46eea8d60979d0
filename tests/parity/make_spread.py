#!/usr/bin/env python3
"""Measures how far the reference itself moves when only rounding changes: some cases are chaotic.

    pip install torch diffusers transformers accelerate safetensors scipy pillow      (made with the versions in versions.json)
    make_spread.py MODEL spread.json [CASE ...]

MODEL is the demonstration model as a whole diffusers folder, tokenizers included. For the named cases, or every entry of
cases.json, in units of the latents' standard deviation, the largest difference from the stored latents of
  again  the same request in f32 on the machine at hand (another CPU than the stored one's may round otherwise)
  ulp    the same with the initial noise scaled by 1 + 2^-23
  ulp2   the same with the initial noise scaled by 1 + 2^-22
  below  the same with the initial noise scaled by 1 - 2^-23
  f64    the same in f64, from the same f32 noise; these latents are kept in NAME.f64.safetensors beside the stored ones
"""
import json, pathlib, sys
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from make_cases import scheduler

HERE = pathlib.Path(__file__).parent


def draw(pipe, data, dtype, scale):
    """Latents of one request; every noise is drawn in f32, as the stored ones were."""
    def noise(shape, generator=None, dtype=None, **_):
        each = generator if isinstance(generator, list) else [generator]
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in each]).to(dtype)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("diffusers") and hasattr(module, "randn_tensor"):
            module.randn_tensor = noise
    pipe.scheduler = scheduler(data["sampler_name"], data["scheduler"])
    n = data.get("batch_size", 1)
    generators = [torch.Generator("cpu").manual_seed(data["seed"] + i) for i in range(n)]
    shape = (n, 4, data["height"] // 8, data["width"] // 8)
    init = noise(shape, generators, torch.float32) * scale
    extra = {key: [data[key]] * n for key in ("prompt_2", "negative_prompt", "negative_prompt_2") if key in data}
    extra |= {key: tuple(data[key]) for key in ("original_size", "crops_coords_top_left", "target_size") if key in data}
    return pipe(prompt=[data["prompt"]] * n, num_inference_steps=data["steps"], guidance_scale=data["cfg_scale"], width=data["width"],
                height=data["height"], guidance_rescale=data.get("guidance_rescale", 0.0), eta=data.get("eta", 0.0),
                clip_skip=data.get("clip_skip"), generator=generators, latents=init.to(dtype), output_type="latent", **extra).images


def main(model, out, *names):
    table = {}
    pipes = {d: StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=d, add_watermarker=False) for d in (torch.float32, torch.float64)}
    for pipe in pipes.values(): pipe.set_progress_bar_config(disable=True)
    for case in json.load(open(HERE / "cases.json")):
        if names and case["name"] not in names:
            continue
        stored = load_file(HERE / f"{case['name']}.safetensors")["latents"].double()
        row = {}
        for label, dtype, scale in (("again", torch.float32, 1.0), ("ulp", torch.float32, 1.0 + 2.0 ** -23),
                                    ("ulp2", torch.float32, 1.0 + 2.0 ** -22), ("below", torch.float32, 1.0 - 2.0 ** -23), ("f64", torch.float64, 1.0)):
            latents = draw(pipes[dtype], case["data"], dtype, scale).double()
            if label == "f64":
                save_file({"latents": latents.float().contiguous()}, HERE / f"{case['name']}.f64.safetensors")
            row[label] = float(f"{((latents - stored).abs().max() / stored.std()).item():.2e}")
        table[case["name"]] = row
        print(case["name"], row, flush=True)
    pathlib.Path(out).write_text("{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in table.items()) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
