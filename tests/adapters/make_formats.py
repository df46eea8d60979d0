#!/usr/bin/env python3
"""Makes goldens of every adapter format: what diffusers draws from the demonstration model when a few layers of its UNet and
of its text encoders have been changed by the format's formula.

    pip install torch diffusers transformers accelerate peft safetensors
    make_formats.py ../shared/demo-model/model

Writes files/as_FORMAT.safetensors with kohya's names, and formats.json and formats.safetensors, requests and final latents by
`FORMAT COMPONENT`, beside itself: f32 on the CPU. The formulas are those of make_formulas.py, where they are compared with LyCORIS
and PEFT.
"""
import json, pathlib, sys
import diffusers, torch, transformers
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from make_loras import calmest

STRENGTH = 0.8
BASE = dict(prompt="A sunset over mountains", negative_prompt="snow", steps=3, cfg_scale=5.0, seed=7, width=64, height=64,
            sampler_name="euler", scheduler="leading")
KOHYA = dict(unet="lora_unet", text_encoder="lora_te1", text_encoder_2="lora_te2")
TEXT = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]
LINEAR = dict(unet=["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
                    "up_blocks.0.attentions.1.transformer_blocks.1.ff.net.0.proj", "mid_block.attentions.0.proj_in"])
CONV = dict(unet=["mid_block.resnets.0.conv1", "down_blocks.1.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut"])
NORMS = dict(unet=["mid_block.resnets.0.norm1", "down_blocks.1.attentions.0.transformer_blocks.0.norm2"])
GENERATOR = torch.Generator().manual_seed(11)


def rand(*shape, scale=1.0):
    return torch.randn(*shape, generator=GENERATOR) * scale


def sized(change, weight, *parts):
    """Scales the last part so that the change is a third as large as the weights."""
    parts[-1].mul_(0.35 * weight.std() / change.std())


def lora(w):
    p = {"lora_down.weight": rand(2, *w.shape[1:]), "lora_up.weight": rand(w.shape[0], 2, *[1] * (w.dim() - 2)), "alpha": torch.tensor(1.0)}
    sized(p["lora_up.weight"].flatten(1) @ p["lora_down.weight"].flatten(1) / 2, w, p["lora_up.weight"])
    return p, lambda w, s: w + s * 0.5 * (p["lora_up.weight"].flatten(1) @ p["lora_down.weight"].flatten(1)).reshape(w.shape)


def tucker(w):
    k = w.shape[2:]
    p = {"lora_down.weight": rand(2, w.shape[1], 1, 1), "lora_up.weight": rand(w.shape[0], 2, 1, 1), "lora_mid.weight": rand(2, 2, *k)}
    change = lambda: torch.einsum("mnhw,om,ni->oihw", p["lora_mid.weight"], p["lora_up.weight"].flatten(1), p["lora_down.weight"].flatten(1))
    sized(change(), w, p["lora_mid.weight"])
    return p, lambda w, s: w + s * change()


def loha(w):
    flat = w.flatten(1)
    p = {"hada_w1_a": rand(flat.shape[0], 2), "hada_w1_b": rand(2, flat.shape[1]), "hada_w2_a": rand(flat.shape[0], 2),
         "hada_w2_b": rand(2, flat.shape[1]), "alpha": torch.tensor(2.0)}
    change = lambda: ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])).reshape(w.shape)
    sized(change(), w, p["hada_w2_b"])
    return p, lambda w, s: w + s * change()


def lokr(w):
    o, i = w.shape[0] // 4, w.shape[1] // 4
    p = {"lokr_w1": rand(4, 4), "lokr_w2_a": rand(o, 2), "lokr_w2_b": rand(2, i * w[0, 0].numel()), "alpha": torch.tensor(1.0)}
    def change():
        w2 = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(o, i, *w.shape[2:])
        return 0.5 * torch.kron(p["lokr_w1"].reshape(4, 4, *[1] * (w.dim() - 2)), w2)
    sized(change(), w, p["lokr_w2_b"])
    return p, lambda w, s: w + s * change()


def dora(w):
    p, _ = lora(w)
    axes = list(range(1, w.dim()))
    size = w.pow(2).sum(axes, keepdim=True).sqrt()
    p["dora_scale"] = size * (1 + 0.2 * rand(*size.shape))
    def merge(w, s):
        merged = w + 0.5 * (p["lora_up.weight"].flatten(1) @ p["lora_down.weight"].flatten(1)).reshape(w.shape)
        return w + s * (p["dora_scale"] * merged / merged.pow(2).sum(axes, keepdim=True).sqrt() - w)
    return p, merge


def rotation(blocks, s):
    q = blocks - blocks.transpose(-1, -2)
    eye = torch.eye(q.shape[-1])
    return s * ((eye + q) @ torch.linalg.inv(eye - q)) + (1 - s) * eye


def oft(w):
    p = {"oft_blocks": rand(w.shape[0] // 8, 8, 8, scale=0.05), "alpha": torch.tensor(0.0)}
    def merge(w, s):
        return torch.einsum("knm,kn...->km...", rotation(p["oft_blocks"], s), w.reshape(-1, 8, *w.shape[1:])).reshape(w.shape)
    return p, merge


def ia3(w):
    p = {"weight": rand(w.shape[0], 1, scale=0.3), "on_input": torch.tensor(0)}
    return p, lambda w, s: w * (1 + s * p["weight"].reshape(-1, *[1] * (w.dim() - 1)))


def glora(w):
    p = {"a1.weight": rand(w.shape[1], 2, scale=0.1), "a2.weight": rand(2, w.shape[1], scale=0.1), "b1.weight": rand(w.shape[0], 2),
         "b2.weight": rand(2, w.shape[1])}
    sized(p["b1.weight"] @ p["b2.weight"], w, p["b2.weight"])
    return p, lambda w, s: w + s * (w @ p["a1.weight"] @ p["a2.weight"] + p["b1.weight"] @ p["b2.weight"])


def full(w):
    p = {"diff": rand(*w.shape), "diff_b": rand(w.shape[0], scale=0.02)}
    sized(p["diff"], w, p["diff"])
    return p, lambda w, s: w + s * p["diff"]


def norm(w):
    p = {"w_norm": rand(*w.shape, scale=0.2), "b_norm": rand(*w.shape, scale=0.1)}
    return p, lambda w, s: w + s * p["w_norm"]


FORMATS = {"lora": (lora, LINEAR, TEXT), "locon": (lora, CONV, []), "locon-tucker": (tucker, dict(unet=CONV["unet"][:2]), []),
           "loha": (loha, LINEAR, TEXT), "lokr": (lokr, LINEAR, TEXT), "dora": (dora, LINEAR, TEXT), "oft": (oft, dict(unet=LINEAR["unet"][:2]), TEXT[:2]),
           "glora": (glora, LINEAR, TEXT), "ia3": (ia3, LINEAR, TEXT), "full": (full, dict(unet=LINEAR["unet"][:2]), TEXT[:1]),
           "norm": (norm, NORMS, ["layer_norm1", "layer_norm2"])}


def main(model):
    load = lambda: StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    cases, goldens = {}, {}
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    for format, (make, unet, text) in FORMATS.items():
        tensors = {}
        for component, kohya in KOHYA.items():
            network = getattr(pipe, component)
            modules = {name.removeprefix("text_model."): module for name, module in network.named_modules()}
            names = unet["unet"] if component == "unet" else [f"encoder.layers.1.{name}" for name in text]
            kept = []
            for name in names:
                module = modules[name]
                prefix = "" if component == "unet" else "text_model."
                parts, merge = make(module.weight.detach())
                has_bias = getattr(module, "bias", None) is not None
                parts = {part: tensor for part, tensor in parts.items() if has_bias or part != "diff_b"}
                tensors |= {f"{kohya}_{(prefix + name).replace('.', '_')}.{part}": tensor.contiguous() for part, tensor in parts.items()}
                kept.append((module.weight, module.weight.detach().clone()))
                module.weight.data = merge(module.weight.detach(), STRENGTH)
                for bias in {"diff_b", "b_norm"} & set(parts):
                    kept.append((module.bias, module.bias.detach().clone()))
                    module.bias.data = module.bias.detach() + STRENGTH * parts[bias]
            if not names:
                continue
            case = {**BASE, "loras": [{"model": f"as_{format}", "weight": 0.0, "text_encoder_2_weight": 0.0, f"{component}_weight": STRENGTH}]}
            out = calmest(pipe, case)
            cases[f"{format} {component}"], goldens[f"{format} {component}"] = case, out.contiguous()
            for parameter, before in kept:
                parameter.data = before
        save_file(tensors, HERE / "files" / f"as_{format}.safetensors")
        print(format, len(tensors), flush=True)
    save_file(goldens, HERE / "formats.safetensors")
    versions = {m.__name__: m.__version__ for m in (diffusers, torch, transformers)}
    by = "tests/adapters/make_formats.py, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    (HERE / "formats.json").write_text(json.dumps({"made_by": by, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
