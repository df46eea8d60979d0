#!/usr/bin/env python3
"""Makes the goldens of T2I-Adapter and IP-Adapter: small random networks of the published layouts beside the
demonstration model, drawn by diffusers.

    make_adapters.py ../shared/demo-model/model

Writes beneath tests/steer:
  adapters/networks.json       the random networks: for each file its tensors, whose values are torch.randn of a CPU
                               generator seeded with `seed`, times `scale`, plus `shift`; and each `config.json`
  adapters/units.safetensors   preprocessed pictures, what the encoder and the adapters make of them
  files/adapter_*.png          the pictures
  t2i_adapter.json, ip_adapter.json and their .safetensors: requests and final latents
Versions: see `made_by` in the two JSON files.
"""
import json, pathlib, sys
import numpy as np
import diffusers, torch, transformers
from diffusers import MultiAdapter, StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "parity"))
from make_cases import scheduler  # noqa: E402

torch.set_num_threads(1)
SAMPLERS = ["ddim", "euler", "dpmpp_2m", "euler_ancestral"]
MADE_BY = f"tests/steer/make_adapters.py, diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
BASE = dict(prompt="a red barn under a blue sky", negative_prompt="dark", width=128, height=128, steps=6, cfg_scale=4.0, scheduler="leading")
ENCODER = dict(hidden_size=48, intermediate_size=96, projection_dim=40, num_hidden_layers=3, num_attention_heads=3, image_size=64,
               patch_size=16, hidden_act="gelu", layer_norm_eps=1e-5, num_channels=3)
OUTLINE = dict(in_channels=3, channels=[32, 96, 160, 160], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")
SKETCH = {**OUTLINE, "in_channels": 1, "num_res_blocks": 2}
GAIN = {"t2i/outline": 1.0, "t2i/sketch": 0.7}
networks = {}


def fill(file, shapes, config=None, gain=1.0):
    """Random weights by a recipe that needs nothing but torch's generator."""
    tensors, made = [], {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        shape = list(shape)
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        shift, scale = 0.0, gain / fan_in**0.5
        if len(shape) == 1:
            is_norm = "norm" in name or ".1.0." in name or "layrnorm" in name
            shift, scale = (1.0 if is_norm and name.endswith("weight") else 0.0), 0.1
        if "latents" in name or "class_embedding" in name or "position_embedding" in name:
            scale = 0.5
        scale, seed = round(scale, 6), 1000 * (len(networks) + 1) + index
        values = torch.randn(int(np.prod(shape)), generator=torch.Generator("cpu").manual_seed(seed)) * scale + shift
        made[name] = values.reshape(shape)
        tensors.append(dict(name=name, shape=shape, seed=seed, scale=scale, shift=shift))
    networks[file] = dict(tensors=tensors, **({"config": config} if config else {}))
    return made


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if value.is_floating_point()}


def ip_shapes(unet, image_proj):
    found, number = {f"image_proj.{name}": shape for name, shape in image_proj.items()}, 1
    modules = dict(unet.named_modules())
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            channels, width = modules[name.removesuffix(".processor")].to_k.weight.shape
            found[f"ip_adapter.{number}.to_k_ip.weight"] = found[f"ip_adapter.{number}.to_v_ip.weight"] = (channels, width)
            number += 2
    return found


def split(state):
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {"image_proj": part("image_proj."), "ip_adapter": part("ip_adapter.")}


def pictures():
    (HERE / "files").mkdir(exist_ok=True)
    made = {}
    for name, (width, height), seed in [("adapter_wide", (150, 100), 1), ("adapter_tall", (70, 130), 2), ("adapter_outline", (128, 128), 3)]:
        random = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        image = np.stack([np.sin(9 * x + 4 * y * c + seed) * 90 + 120 for c in (1, 2, 3)], -1)
        image[height // 4 : height // 2, width // 5 : width // 2] = random.integers(0, 255, 3)
        if name == "adapter_outline":
            circle = np.hypot(x - 0.5, y - 0.5)
            image = np.repeat(255.0 * (np.abs(circle - 0.3) < 0.02)[..., None], 3, -1) + [0, 0, 40]
        made[name] = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        made[name].save(HERE / "files" / f"{name}.png", optimize=True)
    return made


def save(mode, cases, latents):
    body = {"mode": mode, "made_by": MADE_BY, "cases": cases}
    (HERE / f"{mode}.json").write_text(json.dumps(body, indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in latents.items()}, HERE / f"{mode}.safetensors")


def draw(pipe, data, **more):
    pipe.scheduler = scheduler(data["sampler_name"], data["scheduler"])
    guidance = data.get("cfg_scale")
    return pipe(prompt=data["prompt"], negative_prompt=data["negative_prompt"], width=data["width"], height=data["height"],
                num_inference_steps=data["steps"], guidance_scale=guidance, generator=torch.Generator("cpu").manual_seed(data["seed"]),
                output_type="latent", **more).images


@torch.no_grad()
def main(model):
    torch.manual_seed(0)
    shown = pictures()
    path = lambda name: f"tests/steer/files/{name}.png"
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    units = {}

    # T2I-Adapter
    adapters = {}
    for name, config in [("t2i/outline", OUTLINE), ("t2i/sketch", SKETCH)]:
        adapters[name] = T2IAdapter(**config).eval()
        state = fill(f"{name}/diffusion_pytorch_model.safetensors", shapes(adapters[name]), config, GAIN[name])
        adapters[name].load_state_dict(state)
    odd = shown["adapter_wide"].resize((144, 112), Image.LANCZOS)
    for i, feature in enumerate(adapters["t2i/outline"](torch.from_numpy(np.array(odd).astype(np.float32) / 255).permute(2, 0, 1)[None])):
        units[f"outline.{i}"] = feature
    gray = shown["adapter_wide"].convert("L").resize((144, 112), Image.LANCZOS)
    for i, feature in enumerate(adapters["t2i/sketch"](torch.from_numpy(np.array(gray).astype(np.float32) / 255)[None, None])):
        units[f"sketch.{i}"] = feature
    parts = {k: getattr(pipe, k) for k in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")}

    def t2i(adapter):
        made = StableDiffusionXLAdapterPipeline(**parts, adapter=adapter)
        made.set_progress_bar_config(disable=True)
        return made

    cases, latents = {}, {}
    one = t2i(adapters["t2i/outline"])
    wish = {"model": "t2i/outline", "image": path("adapter_outline")}
    for seed, sampler in enumerate(SAMPLERS):
        data = {**BASE, "sampler_name": sampler, "seed": seed, "t2i_adapter": wish}
        cases[sampler], latents[sampler] = data, draw(one, data, image=shown["adapter_outline"])
    data = {**BASE, "sampler_name": "euler", "seed": 11, "t2i_adapter": [{**wish, "image": path("adapter_wide"), "weight": 0.6, "end": 0.5}]}
    cases["weight and end"] = data
    latents["weight and end"] = draw(one, data, image=shown["adapter_wide"], adapter_conditioning_scale=0.6, adapter_conditioning_factor=0.5)
    data = {**BASE, "sampler_name": "dpmpp_2m", "seed": 12, "cfg_scale": 1.0, "height": 144, "t2i_adapter": {**wish, "image": path("adapter_tall")}}
    cases["unguided, odd size"], latents["unguided, odd size"] = data, draw(one, data, image=shown["adapter_tall"])
    sketch = {"model": "t2i/sketch", "image": path("adapter_tall"), "weight": 0.8}
    data = {**BASE, "sampler_name": "euler", "seed": 13, "t2i_adapter": sketch}
    cases["grey"] = data
    latents["grey"] = draw(t2i(adapters["t2i/sketch"]), data, image=shown["adapter_tall"].convert("L"), adapter_conditioning_scale=0.8)
    data = {**BASE, "sampler_name": "ddim", "seed": 14, "t2i_adapter": [{**wish, "weight": 0.7}, {**sketch, "weight": 0.4}]}
    cases["two adapters"] = data
    both = t2i(MultiAdapter(list(adapters.values())))
    latents["two adapters"] = draw(both, data, image=[shown["adapter_outline"], shown["adapter_tall"].convert("L")], adapter_conditioning_scale=[0.7, 0.4])
    save("t2i_adapter", cases, latents)

    # The image encoder
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)).eval()
    encoder.load_state_dict(fill("ip/encoder/model.safetensors", shapes(encoder), ENCODER), strict=False)
    Processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil
    processor = Processor(size=ENCODER["image_size"], crop_size=ENCODER["image_size"])
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    for name in ("adapter_wide", "adapter_tall"):
        pixels = processor(shown[name], return_tensors="pt").pixel_values
        large = Processor(size=224, crop_size=224)(shown[name], return_tensors="pt").pixel_values
        seen = encoder(pixels, output_hidden_states=True)
        units |= {f"{name}.pixels": pixels, f"{name}.large": large[:, :, ::7, ::7], f"{name}.whole": seen.image_embeds, f"{name}.patches": seen.hidden_states[-2]}

    # IP-Adapter
    width, inner, across = pipe.unet.config.cross_attention_dim, 80, 128
    plain = {"proj.weight": (4 * width, ENCODER["projection_dim"]), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,)}
    plus = {"latents": (1, 8, inner), "proj_in.weight": (inner, ENCODER["hidden_size"]), "proj_in.bias": (inner,),
            "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,), "norm_out.bias": (width,)}
    for i in range(4):  # diffusers builds four layers, whatever the file has
        for norm in ("0.norm1", "0.norm2", "1.0"):
            plus |= {f"layers.{i}.{norm}.weight": (inner,), f"layers.{i}.{norm}.bias": (inner,)}
        plus |= {f"layers.{i}.0.to_q.weight": (across, inner), f"layers.{i}.0.to_kv.weight": (2 * across, inner), f"layers.{i}.0.to_out.weight": (inner, across),
                 f"layers.{i}.1.1.weight": (4 * inner, inner), f"layers.{i}.1.3.weight": (inner, 4 * inner)}
    plain = fill("ip/plain.safetensors", ip_shapes(pipe.unet, plain))
    plus = fill("ip/plus.safetensors", ip_shapes(pipe.unet, plus))

    def load(*states):
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
        pipe.load_ip_adapter([split(state) for state in states], subfolder=[""] * len(states), weight_name=[""] * len(states), low_cpu_mem_usage=False)

    def windowed(data, wishes, images):
        """Scales that change from step to step, set before each."""
        def scales(step):
            n = data["steps"]
            keep = lambda w: 1.0 - float(step / n < w.get("start", 0.0) or (step + 1) / n > w.get("end", 1.0))
            pipe.set_ip_adapter_scale([keep(w) * w.get("weight", 1.0) for w in wishes])

        def after(_, step, __, kwargs):
            scales(step + 1)
            return kwargs

        scales(0)
        return draw(pipe, data, ip_adapter_image=images, callback_on_step_end=after)

    cases, latents = {}, {}
    wish = lambda kind, name, **more: {"model": f"ip/{kind}.safetensors", "image": path(name), "image_encoder": "ip/encoder", **more}

    def case(name, data, images):
        wishes = data["ip_adapter"] if isinstance(data["ip_adapter"], list) else [data["ip_adapter"]]
        cases[name], latents[name] = data, windowed(data, wishes, images)
        print(name, latents[name].std().item(), flush=True)

    load(plain)
    for seed, sampler in enumerate(SAMPLERS):
        data = {**BASE, "sampler_name": sampler, "seed": 20 + seed, "ip_adapter": wish("plain", "adapter_wide")}
        case(f"plain, {sampler}", data, [shown["adapter_wide"]])
    units["plain.tokens"] = pipe.unet.encoder_hid_proj([units["adapter_wide.whole"][None]])[0][0]
    data = {**BASE, "sampler_name": "euler", "seed": 30, "ip_adapter": [{**wish("plain", "adapter_tall"), "weight": 0.5, "start": 0.3, "end": 0.9}]}
    case("plain, weight, start and end", data, [shown["adapter_tall"]])
    two = {**wish("plain", ""), "image": [path("adapter_wide"), path("adapter_tall")]}
    data = {**BASE, "sampler_name": "ddim", "seed": 31, "ip_adapter": [two]}
    case("plain, two images", data, [[shown["adapter_wide"], shown["adapter_tall"]]])
    data = {**BASE, "sampler_name": "euler", "seed": 32, "cfg_scale": 1.0, "ip_adapter": wish("plain", "adapter_wide")}
    case("plain, unguided", data, [shown["adapter_wide"]])
    load(plus)
    for seed, sampler in enumerate(["ddim", "dpmpp_2m"]):
        data = {**BASE, "sampler_name": sampler, "seed": 40 + seed, "ip_adapter": wish("plus", "adapter_tall")}
        case(f"plus, {sampler}", data, [shown["adapter_tall"]])
    units["plus.tokens"] = pipe.unet.encoder_hid_proj([units["adapter_tall.patches"][None]])[0][0]
    two = {**wish("plus", ""), "image": [path("adapter_wide"), path("adapter_tall")], "weight": 0.8}
    data = {**BASE, "sampler_name": "euler", "seed": 42, "ip_adapter": two}
    case("plus, two images", data, [[shown["adapter_wide"], shown["adapter_tall"]]])
    load(plain, plus)
    both = [{**wish("plain", "adapter_wide"), "weight": 0.6, "end": 0.5}, {**wish("plus", "adapter_tall"), "weight": 0.4, "start": 0.2}]
    data = {**BASE, "sampler_name": "euler_ancestral", "seed": 43, "ip_adapter": both}
    case("plain and plus", data, [shown["adapter_wide"], shown["adapter_tall"]])
    save("ip_adapter", cases, latents)
    save_file({k: v.contiguous() for k, v in units.items()}, HERE / "adapters" / "units.safetensors")
    (HERE / "adapters" / "networks.json").write_text(json.dumps(networks, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
