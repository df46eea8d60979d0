"""Makes the goldens of the networks: networks.json (configurations) and networks_*.safetensors (weights, inputs, outputs).

Made with torch 2.15.0, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.0, in f32 on the CPU.

    python tests/goldens/make_networks.py        # from the root of the project

The tiny networks have random weights, rounded to f16, stored under `weights.`; inputs stand under `in.`, outputs under
`out.`. Feature maps are NCHW, as torch has them. The demonstration model's own weights are read from assets/demo.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).parent
DEMO = HERE.parent.parent / "assets" / "demo"
torch.set_num_threads(2)


def randomise(model, seed):
    """Weights large enough that every layer matters, each exact in f16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                fan_in = value[0].numel() if "embedding" not in name else 16
                noise = noise / fan_in**0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.1 * noise
            value.copy_(noise.half().float())
    return model.eval()


def weights(model):
    return {f"weights.{name}": value.half() for name, value in model.state_dict().items()}


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(model):
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def run_unet(model, height, width, timesteps, time_ids, pooled, controlled=False):
    config = model.config
    batch = len(time_ids)
    context = config.cross_attention_dim
    context = context[0] if isinstance(context, (list, tuple)) else context
    # Values that are exact in f16, which halves the size of inputs.
    inputs = {
        "in.sample": noise((batch, config.in_channels, height, width), 1).half(),
        "in.context": noise((batch, 7, context), 2).half(),
        "in.pooled": noise((batch, pooled), 3).half(),
        "in.time_ids": torch.tensor(time_ids, dtype=torch.float32),
        "in.timesteps": torch.tensor(timesteps, dtype=torch.float32),
    }
    residuals = {}
    if controlled:  # as a ControlNet adds to the skip connections
        shapes = []
        hooks = [model.conv_in.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))]
        hooks += [block.register_forward_hook(lambda _m, _i, out: shapes.extend(x.shape for x in out[1])) for block in model.down_blocks]
        hooks.append(model.mid_block.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape)))
        with torch.no_grad():
            model(inputs["in.sample"].float(), 1, inputs["in.context"].float(),
                  added_cond_kwargs={"text_embeds": inputs["in.pooled"].float(), "time_ids": inputs["in.time_ids"]})
        for hook in hooks:
            hook.remove()
        made = [noise(shape, 100 + i).half() for i, shape in enumerate(shapes)]
        inputs |= {f"in.down.{i}": tensor for i, tensor in enumerate(made[:-1])} | {"in.mid": made[-1]}
        residuals = {
            "down_block_additional_residuals": [tensor.float() for tensor in made[:-1]],
            "mid_block_additional_residual": made[-1].float(),
        }
    with torch.no_grad():
        out = model(
            inputs["in.sample"].float(),
            inputs["in.timesteps"] if len(timesteps) > 1 else inputs["in.timesteps"][0],
            encoder_hidden_states=inputs["in.context"].float(),
            added_cond_kwargs={"text_embeds": inputs["in.pooled"].float(), "time_ids": inputs["in.time_ids"]},
            **residuals,
        ).sample
    assert out.isfinite().all()
    return inputs | {"out.sample": out}


TINY = {
    "sample_size": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
BASE_IDS = [[512, 768, 0, 16, 1024, 1024], [333, 41, 7, 0, 256, 128]]
SHAPE = {"height": 10, "width": 14, "timesteps": [601.0], "time_ids": BASE_IDS, "pooled": 10}
# name → changes of the configuration, changes of the evaluation
UNETS = {
    "refiner": (
        {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 16, 16],
            "attention_head_dim": [1, 2, 2],
            "transformer_layers_per_block": 2,
            "layers_per_block": 2,
            "projection_class_embeddings_input_dim": 10 + 5 * 8,
        },
        {
            "height": 12,
            "width": 8,
            "timesteps": [199.25],
            "time_ids": [[1024, 1024, 0, 0, 6.0], [1024, 1024, 0, 0, 2.5]],
        },
    ),
    "conv_projection": (
        {"use_linear_projection": False, "attention_head_dim": 4, "act_fn": "swish", "flip_sin_to_cos": False, "freq_shift": 1},
        {"timesteps": [3.0, 998.5]},
    ),
    "uneven_layers": (
        {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 12, 16],
            "layers_per_block": [1, 3, 2],
            "attention_head_dim": [2, 3, 4],
            "transformer_layers_per_block": [1, 0, 2],
            "norm_eps": 1e-4,
        },
        {"height": 16, "width": 8, "controlled": True},
    ),
    "inpaint_odd_size": (
        {
            "in_channels": 9,
            "block_out_channels": [8, 16, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [1, 2, 4],
            "transformer_layers_per_block": [1, 1, 1],
        },
        {"height": 25, "width": 39},
    ),
    "no_mid_block": ({"mid_block_type": None, "conv_in_kernel": 5, "conv_out_kernel": 1}, {}),
    "plain_mid_block": (
        {
            "mid_block_type": "UNetMidBlock2D",
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, [2, 1]],
            "reverse_transformer_layers_per_block": [[1, 0, 2], 1],
            "time_embedding_dim": 24,
        },
        {},
    ),
}

VAES = {
    "vae": ({"layers_per_block": 2}, 20, 28),
    "vae_no_quant": (
        {
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "latent_channels": 6,
            "latents_mean": [0.1, -0.2, 0.3, 0.0, 0.5, -0.6],
            "latents_std": [1.1, 0.9, 1.3, 0.7, 1.0, 2.0],
        },
        13,
        18,
    ),
}
TINY_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 12, 16],
    "norm_num_groups": 4,
}

CLIPS = {
    "clip_legacy_eos": {"eos_token_id": 2, "hidden_act": "gelu"},
    "clip": {"eos_token_id": 63, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-4},
}
TINY_CLIP = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 40,
    "projection_dim": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "bos_token_id": 62,
}


def run_vae(model, height, width):
    x = noise((1, 3, height, width), 4).clamp(-1, 1).half()
    with torch.no_grad():
        latents = model.encode(x.float()).latent_dist
        z = noise((2, model.config.latent_channels, 5, 3), 5).half()
        out = {
            "in.picture": x,
            "out.mean": latents.mean,
            "out.logvar": latents.logvar,
            "in.latents": z,
            "out.picture": model.decode(z.float()).sample,
        }
    return {key: value.contiguous() for key, value in out.items()}


def run_clip(model, ids):
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    tensors = {"in.ids": ids, "out.skip_0": out.hidden_states[-2], "out.skip_1": out.hidden_states[-3]}
    if hasattr(out, "text_embeds"):
        tensors["out.pooled"] = out.text_embeds
    return {key: value.contiguous() for key, value in tensors.items()}


def main():
    configs = {}
    for number, (name, (changes, evaluation)) in enumerate(UNETS.items()):
        model = randomise(UNet2DConditionModel(**(TINY | changes)), number)
        save_file(weights(model) | run_unet(model, **(SHAPE | evaluation)), HERE / f"networks_{name}.safetensors")
        configs[name] = config_of(model)

    for number, (name, (changes, height, width)) in enumerate(VAES.items()):
        model = randomise(AutoencoderKL(**(TINY_VAE | changes)), 20 + number)
        tensors = weights(model) | run_vae(model, height, width)
        save_file(tensors, HERE / f"networks_{name}.safetensors")
        configs[name] = config_of(model)

    for number, (name, changes) in enumerate(CLIPS.items()):
        model = randomise(CLIPTextModelWithProjection(CLIPTextConfig(**(TINY_CLIP | changes))), 30 + number)
        # The second text repeats the end, the third has it early, the fourth has none.
        ids = torch.tensor(
            [
                [62, 5, 9, 17, 33, 2, 8, 41, 50, 4, 63],
                [62, 7, 63, 63, 63, 63, 63, 63, 63, 63, 63],
                [62, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                [60, 1, 61, 0, 61, 0, 0, 3, 0, 0, 0],
            ]
        )
        save_file(weights(model) | run_clip(model, ids), HERE / f"networks_{name}.safetensors")
        configs[name] = config_of(model)

    # The demonstration model: its weights are in assets/demo, so only inputs and outputs are stored.
    end = 49407
    ids = torch.full((2, 77), end)
    ids[:, 0] = 49406
    ids[1, 1:7] = torch.tensor([320, 3424, 962, 3965, 537, 539])
    padded = ids.clone()
    padded[0, 2:] = 0
    padded[1, 8:] = 0
    load = {"torch_dtype": torch.float32}
    first = CLIPTextModel.from_pretrained(DEMO / "text_encoder", **load).eval()
    second = CLIPTextModelWithProjection.from_pretrained(DEMO / "text_encoder_2", **load).eval()
    save_file(run_clip(first, ids), HERE / "networks_demo_text_encoder.safetensors")
    save_file(run_clip(second, padded), HERE / "networks_demo_text_encoder_2.safetensors")
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet", **load).eval()
    demo_unet = run_unet(unet, 20, 18, [601.0], [[256, 256, 0, 0, 256, 256], [128, 128, 0, 0, 160, 144]], 64)
    save_file(demo_unet, HERE / "networks_demo_unet.safetensors")
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", **load).eval()
    save_file(run_vae(vae, 40, 56), HERE / "networks_demo_vae.safetensors")

    (HERE / "networks.json").write_text(json.dumps(configs, indent=1, default=str) + "\n")
    for path in HERE.glob("networks*"):
        path.chmod(0o644)
    total = sum(path.stat().st_size for path in HERE.glob("networks*"))
    print(f"{total} bytes")


if __name__ == "__main__":
    main()
