#!/usr/bin/env python3
"""Trains a canny ControlNet for the demonstration model, on the drawn scenes that the model itself was trained on.

    pip install torch diffusers transformers safetensors numpy opencv-python-headless pillow
    train_demo_controlnet.py render   DEMO WORK                draw scenes, captions, hints; encode them
    train_demo_controlnet.py train    DEMO WORK --bf16         train for --seconds of processor time, a checkpoint every five
                                                               minutes; goes on from WORK/control.pt
    train_demo_controlnet.py export   DEMO WORK FOLDER           diffusers folder, f16, exponential averages
    train_demo_controlnet.py evaluate DEMO WORK FOLDER           how well pictures follow the edges, with and without it; a sheet

DEMO is the folder that holds `model/` and `recipe/`. One thread is used.
The network is diffusers' ControlNetModel.from_unet, but for transformers one layer deep instead of two in the deepest blocks and a
narrower hint embedding, so that it stays under 8 MB in f16. Hints are cv2.Canny(picture, 100, 200).

assets/demo-controlnet/ is what came of 750 scenes, mirrored too, and the first 777 of the 1,100 seconds: about 1,110 steps of
16 pictures at 128x128, later mostly of 5 at 256x256. Of twelve scenes that it had not seen (evaluate --count 12 --size 128),
edges had an F1 of 0.337 without it and 0.696 with it. torch 2.15.0, diffusers 0.42.1, opencv 5.0.0.
"""
import argparse, glob, math, os, sys, time
import numpy as np
import torch

torch.set_num_threads(1)
EMBEDDING = (16, 32, 64, 96)
LAYERS = [1, 1, 1]


def canny(image):
    import cv2
    return cv2.Canny(image, 100, 200)


def halved(image): return ((image.astype(np.float32).reshape(128, 2, 128, 2, 3).mean((1, 3))) + 0.5).astype(np.uint8)


def recipe(args):
    sys.path.insert(0, f"{args.demo}/recipe")
    import scenes, train
    return scenes, train


def pipe(args):
    from diffusers import StableDiffusionXLPipeline
    made = StableDiffusionXLPipeline.from_pretrained(f"{args.demo}/model", torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def new_controlnet(unet):
    """The UNet's encoder with fewer transformer layers; what both have is copied, the outputs start at zero."""
    from diffusers import ControlNetModel
    full = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)
    config = {k: v for k, v in full.config.items() if not k.startswith("_")}
    control = ControlNetModel(**dict(config, transformer_layers_per_block=LAYERS, conditioning_embedding_out_channels=EMBEDDING))
    wanted = control.state_dict().keys()
    control.load_state_dict({k: v for k, v in full.state_dict().items() if k in wanted})
    # Zeros on the way out are enough for a start that changes nothing; zeros on the way in as well would only delay it.
    control.controlnet_cond_embedding.conv_out.reset_parameters()
    return control


@torch.no_grad()
def render(args):
    """Parts of 50 scenes: caption states, latents and hints at 256x256 and 128x128, each as drawn and mirrored."""
    scenes, _ = recipe(args)
    model = pipe(args)
    os.makedirs(f"{args.work}/parts", exist_ok=True)
    for part in range(args.count // 50):
        path = f"{args.work}/parts/{part:04d}.pt"
        if os.path.exists(path): continue
        rng, captions, images = np.random.default_rng(500_000 + part), [], []
        for _ in range(50):
            text, image = scenes.sample(rng)
            captions.append(text); images.append((image * 255 + 0.5).astype(np.uint8))
        context, _, pooled, _ = model.encode_prompt(captions, do_classifier_free_guidance=False)
        out = dict(captions=captions, context=context.half(), pooled=pooled.half(), latents={}, hints={})
        for size in (256, 128):
            sized = images if size == 256 else [halved(im) for im in images]
            both = [np.ascontiguousarray(v) for im in sized for v in (im, im[:, ::-1])]
            x = torch.from_numpy(np.stack(both)).permute(0, 3, 1, 2).float() / 127.5 - 1
            out["latents"][size] = torch.cat([model.vae.encode(v).latent_dist.mean for v in x.split(10)]).half().reshape(50, 2, 4, size // 8, size // 8)
            out["hints"][size] = torch.from_numpy(np.packbits(np.stack([canny(v) > 0 for v in both]), axis=-1)).reshape(50, 2, size, size // 8)
        torch.save(out, path + ".new"); os.replace(path + ".new", path)
        print(part, flush=True)


def data_of(work):
    parts = [torch.load(f) for f in sorted(glob.glob(f"{work}/parts/*.pt"))]
    gather = lambda take: torch.cat([take(p) for p in parts])
    return dict(context=gather(lambda p: p["context"]), pooled=gather(lambda p: p["pooled"]),
                latents={s: gather(lambda p: p["latents"][s]) for s in (256, 128)}, hints={s: gather(lambda p: p["hints"][s]) for s in (256, 128)})


def hint_of(bits):
    """Packed edges [n, H, W/8] as the picture [n, 3, H, W] in [0, 1]."""
    edges = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)).float()
    return edges[:, None].repeat(1, 3, 1, 1)


def train(args):
    from diffusers import DDPMScheduler, UNet2DConditionModel
    _, base = recipe(args)
    unet = UNet2DConditionModel.from_pretrained(f"{args.demo}/model/unet", torch_dtype=torch.float32).requires_grad_(False).eval()
    scale = __import__("json").load(open(f"{args.demo}/model/vae/config.json"))["scaling_factor"]
    torch.manual_seed(5); control = new_controlnet(unet)
    print(sum(p.numel() for p in control.parameters()), "parameters", flush=True)
    path, adam_only = f"{args.work}/control.pt", ("embedding", "conv_in", "conv_out")
    optimizer, average, step, done = base.Muon(control.named_parameters(), args.lr, adam_only), None, 0, 0.0
    if os.path.exists(path):
        saved = torch.load(path)
        control.load_state_dict(saved["control"]); optimizer.load_state_dict(saved["optimizer"]); average, step, done = saved["average"], saved["step"], saved["seconds"]
    average = average or {k: v.clone() for k, v in control.state_dict().items()}
    torch.manual_seed(1000 + step)
    alphas = DDPMScheduler(**base.SCHEDULE).alphas_cumprod
    weight = (alphas / (1 - alphas)).reciprocal().mul(5).clamp(0.2, 1)
    data = data_of(args.work)

    def loss_of_batch(share):
        small = share < args.small or torch.rand(()).item() < 0.15
        size, n = (128, args.batch) if small else (256, max(1, args.batch // 3))
        i, side, t = torch.randint(len(data["pooled"]), (n,)), torch.randint(2, (n,)), (1000 * torch.rand(n) ** 0.6).long().clamp(max=999)    # where there is much noise, edges tell most
        x, hint = data["latents"][size][i, side].float() * scale, hint_of(data["hints"][size][i, side])
        noise = torch.randn_like(x); a = alphas[t].view(-1, 1, 1, 1); noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        keep = (torch.rand(n) > 0.25).float().view(-1, 1, 1)                 # a quarter without a caption: edges have to suffice
        context, pooled = data["context"][i].float() * keep, data["pooled"][i].float() * keep[:, 0]
        added = dict(text_embeds=pooled, time_ids=torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32).repeat(n, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            down, mid = control(noisy, t, encoder_hidden_states=context, controlnet_cond=hint, added_cond_kwargs=added, return_dict=False)
            e = unet(noisy, t, encoder_hidden_states=context, added_cond_kwargs=added, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        each = ((e.float() - noise) ** 2).mean((1, 2, 3))
        return (each * weight[t]).mean(), each.mean().item()

    def save(spent):
        torch.save(dict(control=control.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step, seconds=spent), path + ".new"); os.replace(path + ".new", path)

    # Of processor time, so that a busy machine changes when it ends and not what comes out.
    start, shown, kept, losses = time.process_time() - done, time.time(), time.time(), []
    while (spent := time.process_time() - start) < args.seconds:
        share = spent / args.seconds
        lr = args.lr * min(1, (step + 1) / 50) * (0.03 + 0.485 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups: group["lr"] = lr
        loss, figure = loss_of_batch(share)
        optimizer.zero_grad(set_to_none=True); loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step(); step += 1; losses.append(figure)
        keep = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in control.state_dict().items(): average[k].lerp_(v, 1 - keep)
        if time.time() - shown > 30:
            print(f"step {step}  {spent:.0f} s  figure {np.mean(losses[-100:]):.4f}  lr {lr:.1e}", flush=True); shown = time.time()
        if time.time() - kept > 300: save(spent); kept = time.time()
    save(spent)


def export(args):
    from diffusers import UNet2DConditionModel
    control = new_controlnet(UNet2DConditionModel.from_pretrained(f"{args.demo}/model/unet", torch_dtype=torch.float32))
    control.load_state_dict(torch.load(f"{args.work}/control.pt")["average"])
    control.half().save_pretrained(args.folder)


@torch.no_grad()
def evaluate(args):
    """Scenes that were not trained on: the F1 of edges within 2 pixels of the hint's, with and without control."""
    import cv2
    from PIL import Image
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
    scenes, _ = recipe(args)
    model = pipe(args)
    control = ControlNetModel.from_pretrained(args.folder, torch_dtype=torch.float32)
    steered = StableDiffusionXLControlNetPipeline(**model.components, controlnet=control); steered.set_progress_bar_config(disable=True)
    rng, rows, scores = np.random.default_rng(77), [], []
    near = lambda e: cv2.dilate(e, np.ones((5, 5), np.uint8)) > 0

    def score(hint, picture):
        made = canny(picture)
        if not made.any(): return 0.0
        precision, recall = (near(hint) & (made > 0)).sum() / (made > 0).sum(), (near(made) & (hint > 0)).sum() / (hint > 0).sum()
        return 2 * precision * recall / max(precision + recall, 1e-9)

    for k in range(args.count):
        text, image = scenes.sample(rng)
        image = (image * 255 + 0.5).astype(np.uint8); image = image if args.size == 256 else halved(image)
        hint = canny(image)
        wish = dict(prompt=text, width=args.size, height=args.size, num_inference_steps=20, guidance_scale=5.0, output_type="np")
        free = (model(**wish, generator=torch.Generator().manual_seed(k)).images[0] * 255 + 0.5).astype(np.uint8)
        shown = Image.fromarray(np.repeat(hint[..., None], 3, 2))
        led = (steered(**wish, image=shown, generator=torch.Generator().manual_seed(k)).images[0] * 255 + 0.5).astype(np.uint8)
        scores.append((score(hint, free), score(hint, led))); print(f"{scores[-1][0]:.3f} {scores[-1][1]:.3f}  {text}", flush=True)
        rows.append(np.concatenate([image, np.repeat(hint[..., None], 3, 2), led, free], 1))
    print("mean F1 without, with:", np.round(np.mean(scores, 0), 3))
    Image.fromarray(np.concatenate(rows, 0)).save(f"{args.work}/sheet.png")


if __name__ == "__main__":
    p = argparse.ArgumentParser(); p.add_argument("what", choices=["render", "train", "export", "evaluate"]); p.add_argument("demo"); p.add_argument("work"); p.add_argument("folder", nargs="?")
    p.add_argument("--count", type=int, default=750); p.add_argument("--seconds", type=float, default=1100); p.add_argument("--batch", type=int, default=16)
    p.add_argument("--small", type=float, default=0.6); p.add_argument("--lr", type=float, default=1.5e-3); p.add_argument("--bf16", action="store_true"); p.add_argument("--size", type=int, default=256)
    a = p.parse_args(); globals()[a.what](a)
