#!/usr/bin/env python3
"""Makes the goldens of ControlNets: what diffusers draws from the demonstration model with random ControlNets.

    pip install torch diffusers transformers accelerate safetensors scipy pillow
    make_control.py ../shared/demo-model/model tests/steer

Made with torch 2.15, diffusers 0.42.1. Writes
  layouts/NAME.json       names, shapes and scales of the tensors of a network. Its weights are one draw of torch.randn, in
                          the order of the list: value · scale + offset. The test makes the same files from them.
  files/control_*.png     what the networks are shown
  control.json            the requests, control.safetensors their final latents
All in f32 on the CPU, with one torch CPU generator, seeded with the request's seed.
"""
import json, math, pathlib, sys

import diffusers, numpy, torch
from diffusers import (ControlNetModel, ControlNetUnionModel, MultiControlNetModel, StableDiffusionXLControlNetImg2ImgPipeline,
                       StableDiffusionXLControlNetInpaintPipeline, StableDiffusionXLControlNetPipeline,
                       StableDiffusionXLControlNetUnionPipeline, StableDiffusionXLPipeline)
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image, ImageDraw
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
from make_cases import scheduler

torch.set_num_threads(1)
KINDS = {"openpose": 0, "depth": 1, "hed": 2, "scribble": 2, "canny": 3, "normal": 4, "segment": 5, "tile": 6, "repaint": 7}


def scale_and_offset(name, shape):
    """Weights that keep the size of activations, with residuals about a tenth of the features they are added to."""
    if name.endswith("weight") and len(shape) == 1: return 0.1, 1.0
    if len(shape) == 1: return 0.05, 0.0
    if name == "task_embedding": return 0.5, 0.0
    fan = math.prod(shape[1:])
    if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")): return 0.3 / math.sqrt(fan), 0.0
    return (1.5 if "controlnet_cond" in name else 1.0) / math.sqrt(fan), 0.0


def fill(net, seed):
    """Fills the network with random weights, and gives its layout."""
    tensors, state = [], net.state_dict()
    for name, tensor in state.items():
        scale, offset = scale_and_offset(name, tensor.shape)
        tensors.append([name, list(tensor.shape), float(torch.tensor(scale, dtype=torch.float32)), offset])
    draw = torch.randn(sum(math.prod(shape) for _, shape, _, _ in tensors), generator=torch.Generator("cpu").manual_seed(seed))
    at = 0
    for name, shape, scale, offset in tensors:
        count = math.prod(shape)
        state[name] = draw[at:at + count].reshape(shape) * torch.tensor(scale) + torch.tensor(offset)
        at += count
    net.load_state_dict(state)
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    return {"made_by": versions(), "seed": seed, "config": {"_class_name": type(net).__name__, **config}, "tensors": tensors}, state


def versions():
    return f"tests/steer/make_control.py, torch {torch.__version__}, diffusers {diffusers.__version__}"


def old_name(name, layers):
    """The name of a tensor in a single file: what diffusers' own converter reads."""
    for new, old in [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
                     ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
                     ("conv_in", "input_blocks.0.0"), ("controlnet_mid_block", "middle_block_out.0"),
                     ("controlnet_cond_embedding.conv_in", "input_hint_block.0"), ("controlnet_cond_embedding.conv_out", "input_hint_block.14")]:
        if name.startswith(new + "."): return old + name[len(new):]
    part = name.split(".")
    if part[0] == "controlnet_down_blocks": return f"zero_convs.{part[1]}.0.{part[2]}"
    if part[0] == "controlnet_cond_embedding": return f"input_hint_block.{2 * int(part[2]) + 2}.{part[3]}"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if part[0] == "mid_block":
        if part[1] == "attentions": return "middle_block.1." + ".".join(part[3:])
        return f"middle_block.{2 * int(part[2])}.{inner[part[3]]}.{part[4]}"
    block, kind, layer = int(part[1]), part[2], int(part[3])
    at = 1 + block * (layers + 1) + layer
    if kind == "downsamplers": return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{part[5]}"
    if kind == "attentions": return f"input_blocks.{at}.1." + ".".join(part[4:])
    return f"input_blocks.{at}.0.{inner[part[4]]}.{part[5]}"


def images(folder):
    edges = Image.new("RGB", (128, 128))
    draw = ImageDraw.Draw(edges)
    draw.line([(0, 90), (40, 50), (64, 70), (100, 30), (127, 60)], fill="white", width=2)
    draw.ellipse([80, 8, 104, 32], outline="white", width=1)
    edges.save(folder / "control_edges.png")
    y, x = numpy.mgrid[0:128, 0:128]
    depth = numpy.stack([(x * 2) % 256, 255 - y, (x + 2 * y) % 256], -1).astype(numpy.uint8)
    Image.fromarray(depth).save(folder / "control_depth.png")


def main(model, out):
    out = pathlib.Path(out)
    for folder in ("layouts", "files"): (out / folder).mkdir(parents=True, exist_ok=True)
    images(out / "files")
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    unet = pipe.unet
    # The small one has no transformers, as diffusers/controlnet-canny-sdxl-1.0-small.
    small = dict(ControlNetModel.from_unet(unet).config)
    small.update(down_block_types=["DownBlock2D"] * 3, mid_block_type="UNetMidBlock2D", conditioning_embedding_out_channels=[4, 8, 12, 16], controlnet_conditioning_channel_order="bgr")
    union = {k: v for k, v in ControlNetModel.from_unet(unet).config.items() if k != "mid_block_type"}
    union.update(conditioning_embedding_out_channels=[8, 12, 16, 24], num_control_type=8, num_trans_channel=32, num_trans_head=8, num_trans_layer=2, num_proj_channel=32)
    plain = lambda config: {k: v for k, v in config.items() if not k.startswith("_")}
    nets = {
        "control": ControlNetModel.from_unet(unet),
        "control_small": ControlNetModel(**plain(small)),
        "control_union": ControlNetUnionModel(**plain(union)),
    }
    for seed, (name, net) in enumerate(nets.items()):
        net.eval()
        layout, state = fill(net, 100 + seed)
        (out / "layouts" / f"{name}.json").write_text(json.dumps(layout) + "\n")
        if name == "control":
            old = {old_name(key, net.config.layers_per_block): value for key, value in state.items()}
            back = convert_controlnet_checkpoint(dict(old), dict(net.config))
            # That converter is for SD 1.5's networks, which have no added conditioning; its name is that of SDXL's UNet.
            assert {k for k in state if not k.startswith("add_embedding")} == back.keys(), back.keys() ^ state.keys()
            assert all(torch.equal(back[k], state[k]) for k in back)
            tensors = [["control_model." + old_name(key, net.config.layers_per_block), *rest] for key, *rest in layout["tensors"]]
            (out / "layouts" / "control_single.json").write_text(json.dumps({**layout, "config": None, "tensors": tensors}) + "\n")

    # A Control-LoRA: what it changes of the UNet, and of its own whatever the UNet has not or has no matrix for.
    lora_net = ControlNetModel.from_unet(unet)
    lora_net.eval()
    own, tensors = lora_net.state_dict(), [["lora_controlnet", [0], 1.0, 0.0]]
    for key, value in own.items():
        scale, offset = scale_and_offset(key, value.shape)
        if key.startswith("controlnet_") or value.dim() == 1:
            tensors.append([key, list(value.shape), float(torch.tensor(scale)), offset])
        else:
            tensors.append([key[:-len("weight")] + "up", [value.shape[0], 4] + [1] * (value.dim() - 2), 0.25, 0.0])
            tensors.append([key[:-len("weight")] + "down", [4, *value.shape[1:]], float(torch.tensor(0.5 * scale)), 0.0])
    draw, at, drawn = torch.randn(sum(math.prod(shape) for _, shape, _, _ in tensors), generator=torch.Generator("cpu").manual_seed(110)), 0, {}
    for key, shape, scale, offset in tensors:
        count = math.prod(shape)
        drawn[key] = draw[at:at + count].reshape(shape) * torch.tensor(scale) + torch.tensor(offset)
        at += count
    for key, value in own.items():
        layer = key[:-len("weight")]
        own[key] = drawn[key] if key in drawn else value + (drawn[layer + "up"].flatten(1) @ drawn[layer + "down"].flatten(1)).reshape(value.shape)
    lora_net.load_state_dict(own)
    nets["control_lora"] = lora_net
    named = [["lora_controlnet" if key == "lora_controlnet" else old_name(key, lora_net.config.layers_per_block), *rest] for key, *rest in tensors]
    (out / "layouts" / "control_lora.json").write_text(json.dumps({"made_by": versions(), "seed": 110, "config": None, "tensors": named}) + "\n")

    base = {"prompt": "a sunset over mountains", "seed": 7, "steps": 6, "cfg_scale": 5.0, "width": 128, "height": 128, "scheduler": "leading", "sampler_name": "euler"}
    edges, depth = "tests/steer/files/control_edges.png", "tests/steer/files/control_depth.png"
    scene, sky = "tests/steer/files/scene.png", "tests/steer/files/sky.png"
    one = lambda **more: {"model": "control", "image": edges, **more}
    two = lambda **more: {"model": "control_small", "image": depth, **more}
    kind = lambda name, image, **more: {"model": "control_union", "image": image, "control_type": name, **more}
    cases = {f"one net, {s}": {"sampler_name": s, "controlnet": [one()]} for s in ("ddim", "euler", "dpmpp_2m", "euler_ancestral")}
    cases |= {
        "an object alone": {"controlnet": one()},
        "single file": {"controlnet": [one(model="control_single")]},
        "small, blue first": {"controlnet": [two()]},
        "weight": {"controlnet": [one(weight=0.4)]},
        "start and end": {"controlnet": [one(start=0.2, end=0.7)]},
        "start and end, heun": {"sampler_name": "heun", "controlnet": [one(start=0.2, end=0.7)]},
        "start and end, pndm": {"sampler_name": "pndm", "controlnet": [one(end=0.5)]},
        "guess mode": {"controlnet": [one(guess_mode=True)], "cfg_scale": 3.0},
        "guess mode without guidance": {"controlnet": [one(guess_mode=True)], "cfg_scale": 1.0},
        "no guidance": {"controlnet": [one()], "cfg_scale": 1.0},
        "two nets": {"controlnet": [one(weight=0.7), two(weight=1.3)], "negative_prompt": "night"},
        "two nets, each its time": {"controlnet": [one(end=0.5), two(start=0.3)], "sampler_name": "ddim"},
        "two nets, guess mode": {"controlnet": [one(guess_mode=True), two(guess_mode=True, weight=0.5)]},
        "union, canny": {"controlnet": [kind("canny", edges)], "sampler_name": "ddim"},
        "union, weight": {"controlnet": [kind("tile", depth, weight=0.6)]},
        # diffusers' pipeline of unions fails in guess mode where there is guidance.
        "union, guess mode": {"controlnet": [kind("scribble", edges, guess_mode=True)], "cfg_scale": 1.0},
        "union, two images": {"controlnet": [kind("canny", edges), kind("depth", depth)]},
        "union, two images, weights": {"controlnet": [kind("canny", edges, weight=0.8), kind("depth", depth, weight=0.5, end=0.6)], "sampler_name": "dpmpp_2m"},
        "control lora": {"controlnet": [one(model="control_lora")]},
        "control lora beside a net": {"controlnet": [one(model="control_lora", weight=0.6), two(end=0.5)], "sampler_name": "ddim"},
        "canny": {"controlnet": [one(image=scene, preprocessor="canny")]},
        "image to image": {"init_image": scene, "denoising_strength": 0.6, "controlnet": [one(end=0.8)]},
        "image to image, two nets": {"init_image": scene, "denoising_strength": 0.8, "sampler_name": "ddim", "controlnet": [one(), two()]},
        "inpainting": {"init_image": scene, "mask": sky, "mask_blur": 0.0, "denoising_strength": 0.8, "controlnet": [one()]},
        "inpainting, region": {"init_image": scene, "mask": "tests/steer/files/spot.png", "mask_blur": 0.0, "denoising_strength": 0.8, "width": 128, "height": 96,
                               "inpaint_full_res": True, "inpaint_full_res_padding": 12, "controlnet": [one()]},
        "inpainting, guess mode": {"init_image": scene, "mask": sky, "mask_blur": 0.0, "denoising_strength": 1.0, "sampler_name": "dpmpp_2m", "controlnet": [two(guess_mode=True)]},
        "a size of its own": {"width": 192, "height": 128, "controlnet": [one()], "resize": True},
    }
    parts = dict(pipe.components)
    load = lambda path, width, height: Image.open(path).convert("RGB")
    goldens, requests = {}, {}
    for name, case in cases.items():
        case = {**base, **case}
        resize = case.pop("resize", False)
        asked = case["controlnet"] if isinstance(case["controlnet"], list) else [case["controlnet"]]
        if resize:
            # A picture of another shape than the image, of whole-number ratio to it in neither direction; resizing is
            # compared on what both sides do alike: a flat grey.
            Image.new("RGB", (50, 70), (90, 140, 200)).save(out / "files" / "control_flat.png")
            asked[0]["image"] = "tests/steer/files/control_flat.png"
        requests[name] = case
        names = ["control" if a["model"] == "control_single" else a["model"] for a in asked]
        pick = lambda key, default: [a.get(key, default) for a in asked]
        weights, starts, ends = pick("weight", 1.0), pick("start", 0.0), pick("end", 1.0)
        shown = [Image.open(a["image"]).convert("RGB") for a in asked]
        if asked[0].get("preprocessor") == "canny":
            import cv2
            shown = [Image.fromarray(numpy.stack([cv2.Canny(numpy.array(shown[0]), 100, 200)] * 3, -1))]
        kwargs = dict(prompt=case["prompt"], negative_prompt=case.get("negative_prompt"), num_inference_steps=case["steps"], guidance_scale=case["cfg_scale"],
                      width=case["width"], height=case["height"], guess_mode=asked[0].get("guess_mode", False),
                      generator=torch.Generator("cpu").manual_seed(case["seed"]), output_type="latent",
                      controlnet_conditioning_scale=weights, control_guidance_start=starts, control_guidance_end=ends)
        if "init_image" in case:
            picked = [nets[n] for n in names]
            kind_of = StableDiffusionXLControlNetInpaintPipeline if "mask" in case else StableDiffusionXLControlNetImg2ImgPipeline
            steered = kind_of(**{k: parts[k] for k in parts if k not in ("feature_extractor", "image_encoder")}, controlnet=picked[0] if len(picked) == 1 else MultiControlNetModel(picked))
            if len(picked) == 1:
                shown, kwargs = shown[0], {**kwargs, "controlnet_conditioning_scale": weights[0], "control_guidance_start": starts[0], "control_guidance_end": ends[0]}
            kwargs |= dict(image=Image.open(case["init_image"]).convert("RGB"), control_image=shown, strength=case["denoising_strength"])
            if "mask" in case: kwargs |= dict(mask_image=Image.open(case["mask"]).convert("L"))
            if case.get("inpaint_full_res"):
                # What the pipeline does with `padding_mask_crop`, which it refuses for latents.
                size = dict(width=case["width"], height=case["height"])
                crop = steered.mask_processor.get_crop_region(kwargs["mask_image"], **size, pad=case["inpaint_full_res_padding"])
                for key in ("image", "mask_image", "control_image"):
                    kwargs[key] = steered.image_processor.resize(kwargs[key].crop(crop), size["height"], size["width"], resize_mode="fill")
        elif names[0] == "control_union":
            steered = StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=nets["control_union"])
            kwargs |= dict(control_image=shown, control_mode=[KINDS[a["control_type"]] for a in asked])
        elif len(names) == 1:
            steered = StableDiffusionXLControlNetPipeline(**parts, controlnet=nets[names[0]])
            kwargs |= dict(image=shown[0], controlnet_conditioning_scale=weights[0], control_guidance_start=starts[0], control_guidance_end=ends[0])
        else:
            steered = StableDiffusionXLControlNetPipeline(**parts, controlnet=MultiControlNetModel([nets[n] for n in names]))
            kwargs |= dict(image=shown)
        steered.scheduler = scheduler(case["sampler_name"], case["scheduler"])
        steered.set_progress_bar_config(disable=True)
        goldens[name] = steered(**kwargs).images.contiguous()
        print(f"{name:<36} std {goldens[name].std().item():.3f}  first {goldens[name].flatten()[:3].tolist()}", flush=True)
    free = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    free.scheduler = scheduler("euler", "leading"); free.set_progress_bar_config(disable=True)
    bare = free(prompt=base["prompt"], num_inference_steps=6, guidance_scale=5.0, width=128, height=128, generator=torch.Generator("cpu").manual_seed(7), output_type="latent").images
    print(f"without a net: std {bare.std().item():.3f}, one net differs by {(goldens['one net, euler'] - bare).std().item() / bare.std().item():.2f} of it")
    save_file(goldens, out / "control.safetensors")
    (out / "control.json").write_text(json.dumps({"mode": "controlnet", "made_by": versions(), "cases": requests}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
