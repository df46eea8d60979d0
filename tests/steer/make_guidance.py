#!/usr/bin/env python3
"""Makes the goldens of guidance: what diffusers draws from the demonstration model with each guidance mode.

    pip install torch diffusers transformers accelerate safetensors scipy
    make_guidance.py ../shared/demo-model/model [MODE...]

Writes MODE.json and MODE.safetensors beside itself, f32 on the CPU, a torch CPU generator for each image.

- subseed: AUTOMATIC1111's rule for variations (modules/rng.py and modules/processing.py at 0d5dc9a) written anew below; the
  noise is handed to diffusers' pipeline, with the generator that goes on after it.
- cfg_interval, skip_layer: a loop around diffusers' guiders; skip_layer puts diffusers' own layer skip hook on the UNet.
- dynamic_thresholding: a loop around the formulas of sd-dynamic-thresholding (dynthres_core.py at 1fd915a), which work on
  the denoised latents.
- pag: StableDiffusionXLPAGPipeline. freeu: `enable_freeu`. guidance: several of them in one loop.
"""
import json, math, pathlib, sys
import diffusers, torch, transformers
from diffusers import StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))
from make_cases import scheduler

torch.set_num_threads(1)
SAMPLERS = ["ddim", "euler", "dpmpp_2m", "euler_ancestral"]
BASE = dict(prompt="A sunset over mountains", negative_prompt="snow", steps=8, cfg_scale=5.0, seed=7, width=128, height=128,
            sampler_name="ddim", scheduler="leading")


def cases_of(mode):
    def each(name="", samplers=SAMPLERS, **fields):
        return {s + name: {**BASE, "sampler_name": s, **fields} for s in samplers}
    layer = "mid_block.attentions.0.transformer_blocks."
    thresholds = dict(mimic_scale=4.0, threshold_percentile=0.95)
    two = ["euler"]
    return {
        "subseed": {**each(subseed=1000, subseed_strength=0.3, batch_size=2),
                    **each("-alone", two, subseed=1000, subseed_strength=1.0),
                    **each("-same", two, subseed=7, subseed_strength=0.4),
                    **each("-batches", two, n_iter=2, batch_size=2)},
        "cfg_interval": {**each(cfg_interval=[0.2, 0.8]), **each("-rescaled", two, cfg_interval=[0.0, 0.6], guidance_rescale=0.7)},
        "dynamic_thresholding": {
            **each(cfg_scale=12.0, dynamic_thresholding=thresholds),
            **each("-together", two, cfg_scale=12.0, dynamic_thresholding={**thresholds, "separate_feature_channels": False}),
            **each("-zero", two, cfg_scale=12.0, dynamic_thresholding={**thresholds, "scaling_startpoint": "zero", "interpolate_phi": 0.6}),
            **each("-std", two, cfg_scale=12.0, dynamic_thresholding={**thresholds, "variability_measure": "std"}),
            **each("-std-zero-together", two, cfg_scale=12.0, dynamic_thresholding={
                **thresholds, "variability_measure": "std", "scaling_startpoint": "zero", "separate_feature_channels": False}),
            **{f"euler-{mode}": {**BASE, "sampler_name": "euler", "steps": 6, "cfg_scale": 12.0, "dynamic_thresholding": {
                **thresholds, "mimic_mode": mode, "mimic_scale_min": 1.5, "cfg_mode": mode, "cfg_scale_min": 3.0, "sched_val": 2.0}}
               for mode in list(SCALES)[1:]}},
        "pag": {**each(pag_scale=3.0), **each("-adaptive", two, pag_scale=3.0, pag_adaptive_scale=0.004),
                **each("-no-guidance", two, pag_scale=3.0, cfg_scale=1.0),
                **each("-layers", two, pag_scale=2.0, guidance_rescale=0.5, pag_applied_layers=["down_blocks.1", "up_blocks.0.attentions.1"])},
        "skip_layer": {**each(skip_layer=dict(layers=[layer + "0"], scale=2.8, start=0.0, stop=0.8)),
                       **each("-attention", two, skip_layer=dict(layers=[layer], scale=2.0, start=0.1, stop=1.0, skip_ff=False)),
                       **each("-ff", two, skip_layer=dict(layers=[layer + "1"], scale=2.0, start=0.0, stop=1.0, skip_attention=False)),
                       **each("-scores", two, skip_layer=dict(layers=[layer + "0"], scale=2.0, start=0.0, stop=1.0,
                                                              skip_attention=False, skip_attention_scores=True, skip_ff=False)),
                       **each("-scores-ff", two, skip_layer=dict(layers=[layer + "0"], scale=2.0, start=0.0, stop=1.0,
                                                                 skip_attention=False, skip_attention_scores=True)),
                       **each("-no-guidance", two, cfg_scale=1.0, skip_layer=dict(layers=[layer], scale=2.0, start=0.0, stop=0.7))},
        "guidance": {
            **each("-skip-freeu-interval", guidance_rescale=0.4, cfg_interval=[0.2, 0.9], freeu=dict(s1=0.9, s2=0.2, b1=1.1, b2=1.2),
                   skip_layer=dict(layers=[layer + "1"], scale=1.5, start=0.0, stop=0.7)),
            **each("-thresholds-interval", cfg_scale=9.0, cfg_interval=[0.0, 0.7], dynamic_thresholding=dict(mimic_scale=4.0),
                   freeu=dict(s1=0.9, s2=0.2, b1=1.1, b2=1.2)),
            **each("-thresholds-velocity", ["ddim"], cfg_scale=9.0, prediction_type="v_prediction", dynamic_thresholding=dict(mimic_scale=4.0))},
        "freeu": {**each(freeu=dict(s1=0.9, s2=0.2, b1=1.3, b2=1.4)),
                  **each("-odd-size", two, freeu=dict(s1=0.5, s2=1.6, b1=0.8, b2=1.2), width=120, height=136)},
    }[mode]


# Factors of a scale, by the share of completed steps (t) and the curve's parameter (v).
SCALES = {
    "constant": lambda t, v: 1.0,
    "linear_down": lambda t, v: 1.0 - t,
    "half_cosine_down": lambda t, v: math.cos(t),
    "cosine_down": lambda t, v: math.cos(t * 1.5707),
    "linear_up": lambda t, v: t,
    "half_cosine_up": lambda t, v: 1.0 - math.cos(t),
    "cosine_up": lambda t, v: 1.0 - math.cos(t * 1.5707),
    "power_up": lambda t, v: t**v,
    "power_down": lambda t, v: 1.0 - t**v,
    "linear_repeating": lambda t, v: abs(0.5 - (t * v) % 1.0) * 2,
    "cosine_repeating": lambda t, v: math.cos(t * 6.28318 * v) * 0.5 + 0.5,
    "sawtooth": lambda t, v: (t * v) % 1.0,
}


def thresholded(cond, uncond, cfg, done, mimic_scale, threshold_percentile=1.0, mimic_mode="constant", mimic_scale_min=0.0, cfg_mode="constant",
                cfg_scale_min=0.0, sched_val=1.0, separate_feature_channels=True, scaling_startpoint="mean", variability_measure="ad",
                interpolate_phi=1.0):
    """`cond` and `uncond` are denoised latents [1, C, H, W]."""
    mimic = (mimic_scale - mimic_scale_min) * SCALES[mimic_mode](done, sched_val) + mimic_scale_min
    cfg = (cfg - cfg_scale_min) * SCALES[cfg_mode](done, sched_val) + cfg_scale_min
    wanted, guided = (uncond + scale * (cond - uncond) for scale in (mimic, cfg))
    mean = guided.mean(dim=(2, 3), keepdim=True)
    around, model = guided - mean, wanted - wanted.mean(dim=(2, 3), keepdim=True)
    rows = (lambda x: x.flatten(2)) if separate_feature_channels else (lambda x: x.reshape(1, 1, -1))
    if variability_measure == "std":
        low, high = (rows(x).std(dim=2)[..., None, None] for x in (model, around))
    else:
        low = rows(model).abs().amax(dim=2)[..., None, None]
        high = rows(around).abs().quantile(threshold_percentile, dim=2)[..., None, None]
    if scaling_startpoint == "zero":
        result = guided * (low / high)
    elif variability_measure == "std":
        result = around / high * low + mean
    else:
        top = torch.maximum(low, high)
        result = torch.clamp(around, -top, top) / top * low + mean
    return result * interpolate_phi + guided * (1.0 - interpolate_phi)


def slerp(share, a, b):
    """Along the rows of every channel and column. [C, H, W]"""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=0.0)[:, None]
    if cosine.mean() > 0.9995:
        return a * share + b * (1 - share)
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def noises(case):
    """Initial noise and the generator that goes on, for each image."""
    count, strength = case.get("batch_size", 1) * case.get("n_iter", 1), case.get("subseed_strength", 0.0)
    shape = (4, case["height"] // 8, case["width"] // 8)
    for i in range(count):
        generator = torch.Generator("cpu").manual_seed(case["seed"] + (0 if strength else i))
        noise = torch.randn(shape, generator=generator)
        if strength:
            noise = slerp(strength, noise, torch.randn(shape, generator=torch.Generator("cpu").manual_seed(case["subseed"] + i)))
        yield noise[None], generator


def levels(s, i, t):
    """α and σ of x = α·x₀ + σ·ε."""
    if not hasattr(s, "sigmas") or type(s).__name__ == "DDIMScheduler":
        return s.alphas_cumprod[t].sqrt(), (1 - s.alphas_cumprod[t]).sqrt()
    sigma = s.sigmas[i]
    if type(s).__name__.startswith("DPM"):
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    return torch.tensor(1.0), sigma


def skipping(unet, skip, call):
    """`call` while diffusers' hook skips the named blocks."""
    stack, index = skip["layers"][0].rsplit(".", 1)
    indices = [int(index)] if index else list(range(len(unet.get_submodule(stack))))
    options = {k: skip[k] for k in ("skip_attention", "skip_attention_scores", "skip_ff") if k in skip}
    apply_layer_skip(unet, LayerSkipConfig(indices=indices, fqn=stack, **options))
    result = call()
    HookRegistry.check_if_exists_or_initialize(unet).remove_hook("layer_skip_hook", recurse=True)
    return result


@torch.no_grad()
def loop(pipe, case, noise, generator):
    """The pipeline's loop, with guidance done by a guider or by `thresholded`."""
    guided, n = case["cfg_scale"] > 1.0, case["steps"]
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(case["prompt"], negative_prompt=case["negative_prompt"])
    ids = torch.tensor([[case["height"], case["width"], 0, 0, case["height"], case["width"]]], dtype=torch.float32)
    s = pipe.scheduler
    velocity = case.get("prediction_type") == "v_prediction"
    if velocity:
        s.register_to_config(prediction_type="v_prediction")
    if "freeu" in case:
        pipe.enable_freeu(**case["freeu"])
    s.set_timesteps(n)
    x = noise * s.init_noise_sigma
    start, stop = case.get("cfg_interval", [0.0, 1.0])
    scale = dict(guidance_scale=case["cfg_scale"] if guided else 1.0, guidance_rescale=case.get("guidance_rescale", 0.0), start=start, stop=stop)
    skip = case.get("skip_layer")
    guider = ClassifierFreeGuidance(**scale) if not skip else SkipLayerGuidance(
        skip_layer_guidance_scale=skip["scale"], skip_layer_guidance_start=skip["start"], skip_layer_guidance_stop=skip["stop"],
        skip_layer_guidance_layers=[0], **scale)
    for i, t in enumerate(s.timesteps):
        guider.set_state(step=i, num_inference_steps=n, timestep=t)
        scaled = s.scale_model_input(x, t)
        call = lambda e, p: pipe.unet(scaled, t, encoder_hidden_states=e, added_cond_kwargs={"text_embeds": p, "time_ids": ids}).sample
        parts = dict(pred_cond=call(embeds, pooled))
        if guider._is_cfg_enabled():
            parts["pred_uncond"] = call(negative, negative_pooled)
        if skip and guider._is_slg_enabled():
            parts["pred_cond_skip"] = skipping(pipe.unet, skip, lambda: call(embeds, pooled))
        if "dynamic_thresholding" in case and "pred_uncond" in parts:
            alpha, sigma = levels(s, i, t)
            # With v = α·ε − σ·x₀ and α² + σ² = 1.
            denoised = lambda p: alpha * x - sigma * p if velocity else (x - sigma * p) / alpha
            x0 = thresholded(denoised(parts["pred_cond"]), denoised(parts["pred_uncond"]), case["cfg_scale"], i / (n - 1),
                             **case["dynamic_thresholding"])
            predicted = (alpha * x - x0) / sigma if velocity else (x - alpha * x0) / sigma
        else:
            predicted = guider.forward(**parts).pred
        more = {"generator": generator} if "ancestral" in case["sampler_name"] else {}
        x = s.step(predicted, t, x, **more).prev_sample
    pipe.disable_freeu()
    return x


def draw(pipe, mode, case, noise, generator):
    if mode in ("cfg_interval", "dynamic_thresholding", "skip_layer", "guidance"):
        return loop(pipe, case, noise, generator)
    more = {}
    if mode == "pag":
        pipe = StableDiffusionXLPAGPipeline(**pipe.components, pag_applied_layers=case.get("pag_applied_layers", ["mid"]), add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        more = dict(pag_scale=case["pag_scale"], pag_adaptive_scale=case.get("pag_adaptive_scale", 0.0))
    if mode == "freeu":
        pipe.enable_freeu(**case["freeu"])
    latents = pipe(prompt=case["prompt"], negative_prompt=case["negative_prompt"], num_inference_steps=case["steps"],
                   guidance_scale=case["cfg_scale"], guidance_rescale=case.get("guidance_rescale", 0.0), width=case["width"],
                   height=case["height"], latents=noise, generator=generator, output_type="latent", **more).images
    if mode == "freeu":
        pipe.disable_freeu()
    return latents


def main(model, *modes):
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    for mode in modes or ["subseed", "cfg_interval", "dynamic_thresholding", "pag", "skip_layer", "freeu", "guidance"]:
        cases, goldens = cases_of(mode), {}
        for name, case in cases.items():
            images = []
            for noise, generator in noises(case):
                pipe.scheduler = scheduler(case["sampler_name"], case["scheduler"])
                processors = pipe.unet.attn_processors
                images.append(draw(pipe, mode, case, noise, generator))
                pipe.unet.set_attn_processor(processors)
            goldens[name] = torch.cat(images).contiguous()
            print(mode, name, "std %.3f" % goldens[name].std().item(), flush=True)
        save_file(goldens, HERE / f"{mode}.safetensors")
        by = f"tests/steer/make_guidance.py, {versions}"
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
        (HERE / f"{mode}.json").write_text(f'{{\n  "mode": "{mode}",\n  "made_by": "{by}",\n  "cases": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
