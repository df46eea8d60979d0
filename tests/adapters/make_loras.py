#!/usr/bin/env python3
"""Makes the goldens of LoRA: what diffusers draws from the demonstration model with random adapters.

    pip install torch diffusers transformers accelerate peft safetensors
    make_loras.py ../shared/demo-model/model

Writes files/*.safetensors, the adapters, and loras.json and loras.safetensors, requests and final latents, beside itself: f32 on the
CPU, a torch CPU generator. Every adapter is loaded by `load_lora_weights` and set by `set_adapters`.
"""
import json, pathlib, sys
import diffusers, peft, torch, transformers
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline, TCDScheduler
from safetensors.torch import save_file

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent
RANK = 2
BASE = dict(prompt="A sunset over mountains", negative_prompt="snow", steps=6, cfg_scale=5.0, seed=7, width=128, height=128,
            sampler_name="euler", scheduler="leading")
KOHYA = dict(unet="lora_unet", text_encoder="lora_te1", text_encoder_2="lora_te2")


def layers(pipe, component, kind):
    """Names of linear layers or convolutions, and their weights."""
    wanted = torch.nn.Linear if kind == "linear" else torch.nn.Conv2d
    blocks = ("down_blocks.1.", "mid_block.", "up_blocks.0.") if kind == "linear" else ("down_blocks.", "mid_block.", "up_blocks.1.")
    for name, module in getattr(pipe, component).named_modules():
        inside = name.startswith(blocks) if component == "unet" else ".layers." in name
        if isinstance(module, wanted) and inside and "time_emb_proj" not in name:
            yield name, module.weight.detach()


def random(pipe, components, seed, kind="linear", dora=False):
    """`down`, `up` and `alpha` of each layer; the change is an eighth as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for component in components:
        for name, weight in layers(pipe, component, kind):
            down = torch.randn(RANK, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], RANK, *[1] * (weight.dim() - 2), generator=generator)
            change = up.flatten(1) @ down.flatten(1)
            up = up * (0.12 * weight.std() / change.std()) * 2.0
            parts = {"down": down.half(), "up": up.half(), "alpha": torch.tensor(RANK / 2.0)}
            if dora:
                size = weight.flatten(1).norm(dim=1)
                parts["magnitude"] = size * (1 + 0.2 * torch.randn(weight.shape[0], generator=generator))
            changes[component, name] = parts
    return changes


def kohya(changes):
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return {f"{KOHYA[c]}_{n.replace('.', '_')}.{names[p]}": t for (c, n), parts in changes.items() for p, t in parts.items()}


def peft_names(changes, alpha=False):
    """PEFT has one alpha for all layers, here the rank, so `up` carries the scale."""
    out = {}
    for (c, n), parts in changes.items():
        out[f"{c}.{n}.lora_A.weight"] = parts["down"]
        out[f"{c}.{n}.lora_B.weight"] = (parts["up"].float() * (parts["alpha"] / RANK)).half()
        if "magnitude" in parts:
            out[f"{c}.{n}.lora_magnitude_vector"] = parts["magnitude"]
    return out


SCHEDULERS = {"euler": EulerDiscreteScheduler, "lcm": LCMScheduler, "tcd": TCDScheduler}


def draw(model, case, files):
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    spacing = case["scheduler"] if case["scheduler"] in ("leading", "trailing") else "leading"
    extra = dict(timestep_spacing=spacing)
    if case["sampler_name"] == "lcm":
        # Its own steps are a matter of `timesteps`, or of the training's 50.
        extra = dict()
    pipe.scheduler = SCHEDULERS[case["sampler_name"]].from_config(pipe.scheduler.config, **extra)
    names, weights = [], []
    for index, wish in enumerate(case["loras"]):
        pipe.load_lora_weights(str(files / f"{wish['model']}.safetensors"), adapter_name=f"a{index}")
        names.append(f"a{index}")
        weights.append(wish.get("weight", 1.0))
    pipe.set_adapters(names, adapter_weights=weights)
    return calmest(pipe, case)


def calmest(pipe, case):
    """Of several seeds the one at which rounding matters least: the demonstration model makes much of small differences. Sets the case's
    seed, and gives its latents."""
    steps = dict(timesteps=case["timesteps"]) if "timesteps" in case else dict(num_inference_steps=case["steps"])

    def final(seed, nudge):
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(1, 4, case["height"] // 8, case["width"] // 8, generator=generator)
        noise = noise + nudge * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return pipe(prompt=case["prompt"], negative_prompt=case["negative_prompt"], guidance_scale=case["cfg_scale"], latents=noise,
                        width=case["width"], height=case["height"], generator=generator, output_type="latent", eta=case.get("eta", 0.0),
                        **steps).images

    best = None
    for seed in range(1, 9):
        golden = final(seed, 0.0)
        spread = ((final(seed, 1e-6) - golden).abs().max() / golden.std()).item()
        if best is None or spread < best[0]:
            best = spread, seed, golden
    case["seed"] = best[1]
    print(f"seed {best[1]}: a nudge of 1e-6 becomes {best[0]:.1e}", flush=True)
    return best[2]


def main(model):
    files = HERE / "files"
    files.mkdir(exist_ok=True)
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    every = ["unet", "text_encoder", "text_encoder_2"]
    made = {
        "kohya": kohya(random(pipe, every, 1)),
        "peft": peft_names(random(pipe, every, 2)),
        "unet": kohya(random(pipe, ["unet"], 3)),
        "first": kohya(random(pipe, ["text_encoder"], 4)),
        "second": peft_names(random(pipe, ["text_encoder_2"], 5)),
        "conv": kohya(random(pipe, ["unet"], 6, kind="conv")),
        "dora": peft_names(random(pipe, ["unet"], 7, dora=True)),
    }
    for name, tensors in made.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, files / f"{name}.safetensors")
    one = lambda name, **more: {**BASE, "loras": [{"model": name}], **more}
    fast = dict(cfg_scale=1.0, steps=4)
    cases = {name: one(name) for name in made}
    cases["weighted"] = {**BASE, "loras": [{"model": "kohya", "weight": -0.6}]}
    cases["two"] = {**BASE, "loras": [{"model": "kohya", "weight": 0.7}, {"model": "peft", "weight": -0.4}]}
    cases["three"] = {**BASE, "loras": [{"model": "conv", "weight": 0.8}, {"model": "unet", "weight": 0.5}, {"model": "first", "weight": 1.2}]}
    cases["euler-trailing"] = one("kohya", **fast, scheduler="trailing")
    cases["lcm"] = one("kohya", **fast, sampler_name="lcm")
    cases["lcm-timesteps"] = {**one("kohya", **fast, sampler_name="lcm"), "timesteps": [999, 749, 499, 249]}
    cases["tcd"] = one("kohya", **fast, sampler_name="tcd", scheduler="trailing", eta=0.3)
    goldens = {}
    for name, case in cases.items():
        goldens[name] = draw(model, case, files).contiguous()
        if "timesteps" in case:
            del case["steps"], case["scheduler"]
        print(f"{name:<16} std {goldens[name].std():.4f}", flush=True)
    save_file(goldens, HERE / "loras.safetensors")
    versions = {m.__name__: m.__version__ for m in (diffusers, peft, torch, transformers)}
    by = "tests/adapters/make_loras.py, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    (HERE / "loras.json").write_text(json.dumps({"made_by": by, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
