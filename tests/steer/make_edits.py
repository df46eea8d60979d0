#!/usr/bin/env python3
"""Goldens of image to image, inpainting, the ensemble of experts and the larger second pass, by diffusers.

    make_edits.py MODEL          MODEL is the demonstration model's folder; writes beside this script

Final latents, in f32 on the CPU, one generator a request. `edits.json` names the versions. `resized/pillow.json`
holds what Pillow makes of the scene at other sizes.
"""
import json, pathlib, sys, zlib
import diffusers, numpy as np, PIL, torch, transformers
from diffusers import (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))
from make_cases import SCHEDULERS, scheduler  # noqa: E402
from make_control import fill  # noqa: E402

SAMPLERS = ["ddim", "euler", "dpmpp_2m", "euler_ancestral"]
MADE_BY = (f"tests/steer/make_edits.py, diffusers {diffusers.__version__}, torch {torch.__version__}, "
           f"transformers {transformers.__version__}, Pillow {PIL.__version__}")
FILES = "tests/steer/files/"
BASE = {"prompt": "a lake under a night sky with stars", "negative_prompt": "fog", "seed": 7, "steps": 8, "cfg_scale": 5.0}


def pictures(pipe):
    """A scene drawn by the model, one of other proportions, and a mask with a soft edge."""
    files = HERE / "files"
    files.mkdir(exist_ok=True)
    pipe.scheduler = scheduler("euler", "leading")
    scene = pipe("a sunset over mountains", num_inference_steps=20, guidance_scale=5.0, width=128, height=128,
                 generator=torch.Generator("cpu").manual_seed(3)).images[0]
    scene.save(files / "scene.png")
    scene.resize((150, 101), Image.BICUBIC).save(files / "scene_wide.png")
    rows = np.clip((70 - np.arange(128)) * 16 + 128, 0, 255)
    columns = np.clip(np.arange(128) * 8, 0, 255)
    mask = np.minimum(rows[:, None], columns[None, :]).astype("uint8")
    Image.fromarray(mask).save(files / "sky.png")
    spot = np.zeros((128, 128), "uint8")
    spot[40:75, 60:100] = 255
    Image.fromarray(spot).save(files / "spot.png")


def resized():
    """Pillow's bytes of the scene at other sizes, as CRC-32."""
    scene = Image.open(HERE / "files" / "scene.png").convert("RGB")
    found = []
    for name, filter in (("lanczos", Image.LANCZOS), ("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)):
        for size in ((128, 64), (61, 200), (300, 301), (17, 5), (1, 1)):
            found.append({"filter": name, "size": size, "crc32": zlib.crc32(scene.resize(size, filter).tobytes())})
    (HERE / "resized").mkdir(exist_ok=True)
    (HERE / "resized" / "pillow.json").write_text("[\n " + ",\n ".join(map(json.dumps, found)) + "\n]\n")


def cases():
    image = {"init_image": FILES + "scene.png"}
    mask = {**image, "mask": FILES + "sky.png", "mask_blur": 0.0}
    for sampler in SAMPLERS:
        with_sampler = {**BASE, "sampler_name": sampler, "scheduler": "leading"}
        yield f"img2img-{sampler}", {**with_sampler, **image, "denoising_strength": 0.6}
        yield f"inpaint-{sampler}", {**with_sampler, **mask, "denoising_strength": 0.8}
        yield f"inpaint-all-{sampler}", {**with_sampler, **mask, "denoising_strength": 1.0}
        yield f"inpaint9-{sampler}", {**with_sampler, **mask, "denoising_strength": 0.8, "model": "inpaint9", "seed": 12}
        yield f"refiner-{sampler}", {**with_sampler, "width": 128, "height": 128, "refiner": {"model": "demo", "switch_at": 0.6}}
        yield f"refiner-own-{sampler}", {**with_sampler, "width": 128, "height": 128, "refiner": {"model": "refiner", "switch_at": 0.6}}
        yield f"hires-{sampler}", {**with_sampler, "width": 128, "height": 128, "enable_hr": True, "hr_scale": 1.5,
                                   "hr_upscaler": "latent", "denoising_strength": 0.7}
    for sampler in SCHEDULERS:
        if sampler not in SAMPLERS:
            spacing = "linspace" if sampler == "dpmpp_2s" else "leading"
            yield f"img2img-of-{sampler}", {**BASE, "sampler_name": sampler, "scheduler": spacing, **image, "denoising_strength": 0.6,
                                           **({"eta": 0.0} if sampler == "tcd" else {})}
    euler = {**BASE, "sampler_name": "euler", "scheduler": "leading"}
    yield "img2img-whole", {**euler, **image, "denoising_strength": 1.0}
    yield "img2img-mode", {**euler, **image, "denoising_strength": 0.5, "init_sample": "mode"}
    yield "img2img-karras", {**euler, **image, "denoising_strength": 0.5, "scheduler": "karras"}
    yield "img2img-heun", {**euler, **image, "denoising_strength": 0.5, "sampler_name": "heun"}
    for mode in ("stretch", "crop", "fill"):
        yield f"img2img-{mode}", {**euler, "init_image": FILES + "scene_wide.png", "width": 128, "height": 96,
                                  "denoising_strength": 0.5, "resize_mode": mode}
    yield "img2img-start", {**euler, **image, "denoising_start": 0.5}
    yield "img2img-refiner", {**euler, **image, "denoising_strength": 0.5, "model": "refiner", "aesthetic_score": 7.5,
                              "negative_aesthetic_score": 1.0}
    yield "img2img-size", {**euler, "init_image": FILES + "scene_wide.png", "denoising_strength": 0.5}
    yield "inpaint-soft", {**euler, **mask, "denoising_strength": 0.8, "soft_mask": True}
    yield "inpaint-mode", {**euler, **mask, "denoising_strength": 0.8, "init_sample": "mode", "sampler_name": "euler_ancestral"}
    yield "inpaint-region", {**euler, **image, "mask": FILES + "spot.png", "mask_blur": 0.0, "denoising_strength": 0.8,
                             "inpaint_full_res": True, "inpaint_full_res_padding": 12, "width": 128, "height": 96}
    for fill in ("fill", "noise", "zeros"):
        yield f"inpaint-{fill}", {**euler, **image, "mask": FILES + "spot.png", "mask_blur": 0.0, "denoising_strength": 0.8,
                                  "inpainting_fill": fill}
    yield "inpaint9-all", {**euler, **mask, "denoising_strength": 1.0, "model": "inpaint9"}
    for between in ("latent_nearest", "latent_bicubic"):
        yield f"hires-{between}", {**euler, "width": 128, "height": 128, "enable_hr": True, "hr_scale": 1.25,
                                   "hr_upscaler": between, "hr_second_pass_steps": 6, "denoising_strength": 0.7}
    yield "hires-lanczos", {**euler, "width": 128, "height": 128, "enable_hr": True, "hr_scale": 1.5,
                            "hr_upscaler": "lanczos", "denoising_strength": 0.7}


def nine(unet):
    """The demonstration UNet with five more input channels, drawn from a seed as tests/it/steer.rs draws them."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": 9})
    weights = dict(unet.state_dict())
    first = weights["conv_in.weight"]
    more = torch.randn((5, first.shape[0], 9), generator=torch.Generator("cpu").manual_seed(9)) * 0.05
    weights["conv_in.weight"] = torch.cat([first, more.permute(1, 0, 2).reshape(first.shape[0], 5, 3, 3)], 1)
    wide.load_state_dict(weights)
    return wide


def refiner(parts):
    """A pipeline of the refiner's layout: the second encoder alone, aesthetic scores, and a UNet drawn from a seed."""
    config = {k: v for k, v in parts["unet"].config.items() if not k.startswith("_")}
    unet = UNet2DConditionModel(**{**config, "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 64 + 5 * 16,
                                   "transformer_layers_per_block": [1, 1, 1]})
    unet.eval()
    layout, _ = fill(unet, 120)
    layout["made_by"] = MADE_BY
    (HERE / "refiner").mkdir(exist_ok=True)
    (HERE / "refiner" / "unet.json").write_text(json.dumps(layout) + "\n")
    return StableDiffusionXLImg2ImgPipeline(**{**parts, "text_encoder": None, "tokenizer": None, "unet": unet},
                                            requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False)


def filled(image, mask):
    """AUTOMATIC1111's `fill`: ever sharper blurs of what is seen, laid over each other."""
    result, seen = Image.new("RGBA", image.size), Image.new("RGBa", image.size)
    seen.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = seen.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    return result.convert("RGB")


class Mode:
    """The encoder's distribution, of which only the mode is taken."""

    def __init__(self, pipe, wanted):
        self.vae, self.wanted = pipe.vae, wanted

    def __enter__(self):
        if self.wanted:
            self.encode = self.vae.encode
            def encode(x, **kwargs):
                output = self.encode(x, **kwargs)
                output.latent_dist.sample = lambda generator=None: output.latent_dist.mode()
                return output
            self.vae.encode = encode

    def __exit__(self, *_):
        if self.wanted:
            self.vae.encode = self.encode


def main(model):
    text = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    text.set_progress_bar_config(disable=True)
    parts = text.components
    keep = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts = {k: parts[k] for k in keep}
    image = StableDiffusionXLImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=text.config.force_zeros_for_empty_prompt, add_watermarker=False)
    paint = StableDiffusionXLInpaintPipeline(**parts, force_zeros_for_empty_prompt=text.config.force_zeros_for_empty_prompt, add_watermarker=False)
    paint9 = StableDiffusionXLInpaintPipeline(**{**parts, "unet": nine(text.unet)}, force_zeros_for_empty_prompt=text.config.force_zeros_for_empty_prompt, add_watermarker=False)
    own = refiner(parts)
    for pipe in (image, paint, paint9, own):
        pipe.set_progress_bar_config(disable=True)
    pictures(text)
    resized()
    root = HERE.parent.parent
    goldens, requests = {}, {}

    def corrected(steps, strength, device, denoising_start=None):
        times = image.scheduler.timesteps.unique().flip(0)[steps - int(steps * strength):]
        return torch.cat([times[:2], times[1:]]), len(times) + 1

    for name, data in cases():
        noise = torch.Generator("cpu").manual_seed(data["seed"])
        kwargs = dict(prompt=data["prompt"], negative_prompt=data["negative_prompt"], num_inference_steps=data["steps"],
                      guidance_scale=data["cfg_scale"], generator=noise, output_type="latent")
        fresh = lambda: scheduler(data["sampler_name"], data["scheduler"])
        open_image = lambda key: Image.open(root / data[key]).convert("RGB")
        size = {k: data[k] for k in ("width", "height") if k in data}
        if "refiner" in data:
            switch = data["refiner"]["switch_at"]
            text.scheduler = fresh()
            latents = text(**kwargs, **size, denoising_end=switch).images
            second = own if data["refiner"]["model"] == "refiner" else image
            second.scheduler = fresh()
            latents = second(**{**kwargs, "image": latents, "denoising_start": switch}).images
        elif "enable_hr" in data:
            text.scheduler = fresh()
            latents = text(**kwargs, **size).images
            to = [int(side * data["hr_scale"]) // 8 for side in (data["height"], data["width"])]
            kind = data["hr_upscaler"]
            noise = torch.Generator("cpu").manual_seed(data["seed"])
            if kind == "lanczos":
                with torch.no_grad():
                    decoded = text.vae.decode(latents / text.vae.config.scaling_factor).sample
                picture = text.image_processor.postprocess(decoded, output_type="pil")[0]
                start = picture.resize((to[1] * 8, to[0] * 8), Image.LANCZOS)
            else:
                mode = {"latent": "bilinear", "latent_nearest": "nearest", "latent_bicubic": "bicubic"}[kind]
                start = torch.nn.functional.interpolate(latents, size=to, mode=mode)
            image.scheduler = fresh()
            steps = data.get("hr_second_pass_steps", data["steps"])
            latents = image(**{**kwargs, "num_inference_steps": steps, "generator": noise}, image=start,
                            strength=data["denoising_strength"]).images
        elif "mask" in data:
            pipe = paint9 if data.get("model") == "inpaint9" else paint
            pipe.scheduler = fresh()
            pipe.mask_processor = VaeImageProcessor(
                vae_scale_factor=8, do_normalize=False, do_binarize=not data.get("soft_mask", False), do_convert_grayscale=True)
            picture, mask = open_image("init_image"), open_image("mask").convert("L")
            wanted = size or dict(width=128, height=128)
            if data.get("inpainting_fill") == "fill":
                picture = filled(picture, mask)
            elif "inpainting_fill" in data:
                # AUTOMATIC1111's latent noise and latent nothing: other latents beneath the mask, at the start alone.
                proper, inner = pipe.scheduler.add_noise, (np.asarray(mask)[::8, ::8] >= 128)
                beneath = torch.from_numpy(inner.astype("float32"))[None, None]
                def start(latents, noise, timesteps, calls=[]):
                    if not calls:
                        latents = latents * (1 - beneath) + (noise * beneath if data["inpainting_fill"] == "noise" else 0)
                    calls.append(1)
                    return proper(latents, noise, timesteps)
                pipe.scheduler.add_noise = start
            if data.get("inpaint_full_res"):
                # What the pipeline does with `padding_mask_crop`, which it refuses for latents.
                crop = pipe.mask_processor.get_crop_region(mask, **wanted, pad=data["inpaint_full_res_padding"])
                part = lambda image: pipe.image_processor.resize(image.crop(crop), wanted["height"], wanted["width"], resize_mode="fill")
                picture, mask = part(picture), part(mask)
            with Mode(pipe, data.get("init_sample") == "mode"):
                latents = pipe(**kwargs, image=picture, mask_image=mask, strength=data["denoising_strength"], **wanted).images
        else:
            picture = open_image("init_image")
            mode = {"stretch": "default"}.get(data.get("resize_mode", "stretch"), data.get("resize_mode"))
            width, height = size.get("width", picture.width // 8 * 8), size.get("height", picture.height // 8 * 8)
            picture = image.image_processor.resize(picture, height, width, resize_mode=mode)
            pipe = own if data.get("model") == "refiner" else image
            pipe.scheduler = fresh()
            # diffusers cuts PNDM's list, in which the second timestep stands twice, as if it did not, and then leaves a
            # level out. Its own steps are right from any timestep on.
            pipe.get_timesteps = corrected if data["sampler_name"] == "pndm" else type(pipe).get_timesteps.__get__(pipe)
            scores = {k: data[k] for k in ("aesthetic_score", "negative_aesthetic_score") if k in data}
            start = {"denoising_start": data["denoising_start"]} if "denoising_start" in data else {"strength": data["denoising_strength"]}
            with Mode(pipe, data.get("init_sample") == "mode"):
                latents = pipe(**kwargs, **scores, image=picture, **start).images
        goldens[name], requests[name] = latents.contiguous(), data
        print(name, tuple(latents.shape), "std %.3f" % latents.std().item(), flush=True)
    save_file(goldens, HERE / "edits.safetensors")
    (HERE / "edits.json").write_text(json.dumps({"mode": "edits", "made_by": MADE_BY, "cases": requests}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
