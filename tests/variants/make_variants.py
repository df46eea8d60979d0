#!/usr/bin/env python3
"""Makes goldens of EDM models and of instruct-pix2pix with diffusers.

    make_variants.py MODEL          MODEL is the demonstration model's folder; writes beside this script

The demonstration model serves as each of them: with another scheduler, or with a UNet that takes four more channels, whose
weights torch's generator draws. Final latents, in f32 on the CPU, one generator a request. Each JSON file names the versions.
"""
import json, pathlib, sys
import diffusers, torch, transformers
from diffusers import (EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler,
                       StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
MADE_BY = (f"tests/variants/make_variants.py, diffusers {diffusers.__version__}, torch {torch.__version__}, "
           f"transformers {transformers.__version__}")
BASE = {"prompt": "a lake under a night sky with stars", "negative_prompt": "fog", "width": 128, "height": 128, "seed": 7}
SCHEDULERS = {
    "edm_epsilon": dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon"),
    "edm_v": dict(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"),
}
SAMPLERS = {"euler": (EDMEulerScheduler, {}), "dpmpp_2m": (EDMDPMSolverMultistepScheduler, {}),
            "dpmpp_2m_sde": (EDMDPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++"))}
DISCRETE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                timestep_spacing="leading", steps_offset=1)


def save(name, cases, latents, more=None):
    body = {"made_by": MADE_BY, "cases": cases, **(more or {})}
    (HERE / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in latents.items()}, HERE / f"{name}.safetensors")


def generator(data):
    return torch.Generator("cpu").manual_seed(data["seed"])


def edm(pipe):
    cases, latents = {}, {}
    for model, options in SCHEDULERS.items():
        for sampler, (cls, more) in SAMPLERS.items():
            for steps, scale in ((6, 4.0), (20, 1.0)):
                data = {**BASE, "model": model, "sampler_name": sampler, "steps": steps, "cfg_scale": scale}
                pipe.scheduler = cls(**options, **more)
                drawn = pipe(data["prompt"], negative_prompt=data["negative_prompt"], width=128, height=128,
                             num_inference_steps=steps, guidance_scale=scale, generator=generator(data),
                             output_type="latent").images
                name = f"{model} {sampler} {steps} steps"
                cases[name], latents[name] = data, drawn
                print(f"{name:<40} {drawn.std():.4f}")
    save("edm", cases, latents, {"schedulers": SCHEDULERS})


def wide(unet):
    """The same UNet with four more input channels, of weights 0.05 times torch's noise of seed 8."""
    config = {**unet.config, "in_channels": 8}
    made = UNet2DConditionModel.from_config(config)
    state = unet.state_dict()
    first = state["conv_in.weight"]
    more = torch.randn(1, 4, first.shape[0], 9, generator=torch.Generator("cpu").manual_seed(8))
    more = more[0].permute(1, 0, 2).reshape(first.shape[0], 4, 3, 3) * 0.05
    state["conv_in.weight"] = torch.cat([first, more], 1)
    made.load_state_dict(state)
    return made.eval()


def edits(pipe):
    parts = {k: getattr(pipe, k) for k in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")}
    scene = Image.open(HERE.parent / "steer/files/scene.png").convert("RGB")
    cases, latents = {}, {}
    pipes = {"edit": False, "edit_scaled": True}
    for model, scaled in pipes.items():
        editor = StableDiffusionXLInstructPix2PixPipeline(**parts, unet=wide(pipe.unet), add_watermarker=False,
                                                          is_cosxl_edit=scaled)
        editor.set_progress_bar_config(disable=True)
        for sampler, cls in (("euler", EulerDiscreteScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler)):
            for scale, image_scale in ((4.0, 1.5), (4.0, 1.0), (1.0, 1.5)):
                if scaled and (image_scale == 1.0 or sampler != "euler"):
                    continue
                data = {**BASE, "model": model, "sampler_name": sampler, "scheduler": "leading", "steps": 6, "cfg_scale": scale,
                        "image_guidance_scale": image_scale, "init_image": "tests/steer/files/scene.png"}
                editor.scheduler = cls(**DISCRETE)
                drawn = editor(data["prompt"], image=scene, negative_prompt=data["negative_prompt"], width=128, height=128,
                               num_inference_steps=6, guidance_scale=scale, image_guidance_scale=image_scale,
                               generator=generator(data), output_type="latent").images
                name = f"{model} {sampler} {scale} {image_scale}"
                cases[name], latents[name] = data, drawn
                print(f"{name:<40} {drawn.std():.4f}")
    save("edits", cases, latents)


@torch.no_grad()
def main(model):
    torch.set_num_threads(1)
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    edm(pipe)
    edits(pipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
