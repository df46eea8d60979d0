#!/usr/bin/env python3
"""Makes schedules.json and schedules.safetensors: sigmas, timesteps and whole trajectories of diffusers' schedulers.

Made with torch 2.15.0, diffusers 0.42.1, numpy 2.4.6, scipy 1.17.1, k-diffusion 0.1.1.post1 (only for
dpmpp_2s_ancestral; installed with `pip install --no-deps -t FOLDER k-diffusion torchsde torchdiffeq trampoline`).

    K_DIFFUSION=FOLDER python make_schedules.py            # writes beside itself

The network is an elementwise function, the same as in tests/it/scheduler.rs:
    out(x, t) = 0.8 tanh(0.9 x + 0.3 sin(t / 150)) + 0.1 x        with x scaled to unit variance
read as noise, as v, or as the image. Shapes are [2, 4, 3, 3]; image i has the seed SEED + i.
"""
import inspect, json, math, os, pathlib, sys, types, warnings
import diffusers, numpy as np, torch
from diffusers.schedulers import AysSchedules
from safetensors.torch import save_file

diffusers.utils.logging.set_verbosity_error(); warnings.filterwarnings("ignore")
HERE, SEED, SHAPE = pathlib.Path(__file__).parent, 4242, (4, 3, 3)
CLASSES = {
    "ddim": ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False)),
    "ddpm": ("DDPMScheduler", dict(clip_sample=False)),
    "euler": ("EulerDiscreteScheduler", {}), "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}), "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_order=2)),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "unipc": ("UniPCMultistepScheduler", {}), "deis": ("DEISMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=False)),
    "kdpm2": ("KDPM2DiscreteScheduler", {}), "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}), "tcd": ("TCDScheduler", {}),
}
SPACINGS = {
    "leading": dict(timestep_spacing="leading", steps_offset=1), "trailing": dict(timestep_spacing="trailing"),
    "linspace": dict(timestep_spacing="linspace"),
    "karras": dict(use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1),
    "exponential": dict(use_exponential_sigmas=True, timestep_spacing="leading", steps_offset=1),
    "beta": dict(use_beta_sigmas=True, timestep_spacing="leading", steps_offset=1),
}
TWO = {"heun", "kdpm2", "kdpm2_ancestral"}


def make(sampler, spacing, prediction="epsilon", zero=False, **more):
    """The scheduler, or None where diffusers has no such combination."""
    name, options = CLASSES[sampler]
    wanted = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  prediction_type=prediction, **options, **SPACINGS[spacing], **more)
    if zero: wanted["rescale_betas_zero_snr"] = True
    cls = getattr(diffusers, name); taken = inspect.signature(cls.__init__).parameters
    dropped = {k for k in wanted if k not in taken} - {"steps_offset"}
    if sampler == "dpmpp_2s" and (spacing in ("karras", "exponential", "beta") or spacing == "linspace"): dropped -= {"timestep_spacing"}
    return None if dropped else cls(**{k: v for k, v in wanted.items() if k in taken})


def network(x, t):
    return 0.8 * torch.tanh(0.9 * x + 0.3 * math.sin(float(t) / 150.0)) + 0.1 * x


def generators(): return [torch.Generator("cpu").manual_seed(SEED + i) for i in range(2)]
def draw(gens): return torch.cat([torch.randn((1, *SHAPE), generator=g) for g in gens])


def steps_of(sampler, s):
    """One timestep and sigma for each step, as the worker counts them."""
    t = s.timesteps.double().tolist()
    sigmas = s.sigmas.double().tolist() if hasattr(s, "sigmas") else None
    if sampler == "pndm": t = t[:1] + t[2:]
    if sampler in TWO: t = t[::2]
    if sampler == "heun": sigmas = sigmas[:-1][::2] + sigmas[-1:]
    if sampler in ("kdpm2", "kdpm2_ancestral"): sigmas = sigmas[:-2][::2] + sigmas[-1:]
    return sigmas, t


def run(sampler, s, eta=None, begin=0, jitter=0.0):
    gens = generators(); x = draw(gens); x = x * (1 + jitter * torch.sign(torch.sin(1e3 * x))); order = 2 if sampler in TWO else 1
    timesteps = s.timesteps[begin * order:]
    if begin:
        if hasattr(s, "set_begin_index"): s.set_begin_index(begin * order)
        x = s.add_noise(0.5 * torch.sin(x), draw(gens), timesteps[:1].repeat(2))
    else:
        x = x * s.init_noise_sigma
    taken = inspect.signature(s.step).parameters; kwargs = {}
    if "generator" in taken: kwargs["generator"] = gens
    if eta is not None: kwargs["eta"] = eta
    for t in timesteps:
        x = s.step(network(s.scale_model_input(x, t), t), t, x, **kwargs).prev_sample
    return x, len(timesteps)


def k_diffusion_2s_ancestral(s, eta):
    where = os.environ["K_DIFFUSION"]; sys.path.insert(0, where)
    for name in ("clip", "clean_fid", "cleanfid", "wandb", "accelerate", "skimage", "jsonmerge", "kornia", "dctorch", "torchvision", "einops"):
        sys.modules.setdefault(name, types.ModuleType(name))
    package = types.ModuleType("k_diffusion"); package.__path__ = [where + "/k_diffusion"]; sys.modules["k_diffusion"] = package
    utils = types.ModuleType("k_diffusion.utils"); sys.modules["k_diffusion.utils"] = utils; package.utils = utils
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    from k_diffusion.sampling import sample_dpmpp_2s_ancestral
    gens = generators(); x = draw(gens) * s.init_noise_sigma; calls = 0
    table = ((1 - s.alphas_cumprod) / s.alphas_cumprod) ** 0.5
    def model(x, sigma):
        nonlocal calls; calls += 1
        sigma = sigma[0]
        t = np.interp(sigma.log().double().numpy(), table.log().double().numpy(), np.arange(1000))
        return x - sigma * network(x / (sigma ** 2 + 1) ** 0.5, t)
    out = sample_dpmpp_2s_ancestral(model, x, s.sigmas.clone(), eta=eta, disable=True, noise_sampler=lambda *_: draw(gens))
    return out, calls


tables, runs, tensors = [], [], {}
for sampler in CLASSES:
    for spacing in SPACINGS:
        for n in (1, 2, 3, 10, 25, 50, 200):
            s = make(sampler, spacing)
            if s is None or (n > 50 and sampler in ("lcm", "tcd")): continue
            s.set_timesteps(n)
            if len(s.timesteps) < n or (len(s.timesteps) > n and sampler not in TWO and sampler != "pndm"): print("odd length", sampler, spacing, n); continue
            sigmas, t = steps_of(sampler, s)
            tables.append(dict(sampler=sampler, schedule=spacing, steps=n, sigmas=sigmas, timesteps=t,
                               init_scale=float(s.init_noise_sigma)))

base = make("euler", "leading"); log_sigmas = (((1 - base.alphas_cumprod) / base.alphas_cumprod) ** 0.5).log().double().numpy()
for n in (1, 2, 3, 10, 25, 50, 200):
    # sgm_uniform: generative-models' and ComfyUI's formula; simple: ComfyUI's. Both over k-diffusion's table.
    t = np.linspace(999, 0, n + 1)[:-1]
    tables.append(dict(sampler="euler", schedule="sgm_uniform", steps=n, timesteps=t.tolist(),
                       sigmas=[*np.exp(np.interp(t, np.arange(1000), log_sigmas)), 0.0], init_scale=None))
    t = [999 - int(i * (1000 / n)) for i in range(n)]
    tables.append(dict(sampler="euler", schedule="simple", steps=n, timesteps=t, sigmas=[*np.exp(log_sigmas[t]), 0.0], init_scale=None))
base.set_timesteps(timesteps=AysSchedules["StableDiffusionXLTimesteps"]); ten = base.sigmas.double().numpy()[:-1]
for n in (5, 10, 25):
    sigmas = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 10), np.log(ten)))
    tables.append(dict(sampler="euler", schedule="align_your_steps", steps=n, sigmas=[*sigmas, 0.0], init_scale=None,
                       timesteps=np.interp(np.log(sigmas), log_sigmas, np.arange(1000)).tolist()))


def add(name, sampler, x, calls, **wish):
    tensors[name] = x.float().contiguous(); runs.append(dict(name=name, sampler=sampler, evaluations=calls, **wish))


def try_run(name, sampler, s, n, **how):
    wish = dict(how.pop("wish", {})); s.set_timesteps(n)
    try: x, calls = run(sampler, s, **how)
    except IndexError as e: print("diffusers fails:", name, e); return
    if not torch.isfinite(x).all(): print("diffusers not finite:", name); return
    s.set_timesteps(n); moved, _ = run(sampler, s, **how, jitter=1.2e-7)  # how far one unit in the last place carries
    wish["own"] = float((moved - x).abs().max() / x.std(correction=0))
    add(name, sampler, x, calls, steps=n, **{k: v for k, v in how.items() if v is not None}, **wish)


for sampler in CLASSES:
    for spacing in SPACINGS:
        for n in (1, 2, 3, 10, 25):
            s = make(sampler, spacing)
            if s is not None: try_run(f"{sampler}-{spacing}-{n}", sampler, s, n, wish=dict(schedule=spacing))
    for spacing in ("leading", "linspace", "trailing"):
        s = make(sampler, spacing, "v_prediction")
        if s is not None: try_run(f"{sampler}-{spacing}-v", sampler, s, 12, wish=dict(schedule=spacing, prediction="v_prediction"))
        s = make(sampler, spacing, "v_prediction", zero=True)
        if s is not None: try_run(f"{sampler}-{spacing}-zero", sampler, s, 12, wish=dict(schedule=spacing, prediction="v_prediction", zero=True))
    for spacing in ("leading", "karras"):
        if sampler in ("ddpm", "lcm", "tcd", "pndm", "dpmpp_2s"): continue
        s = make(sampler, spacing)
        if s is not None: try_run(f"{sampler}-{spacing}-late", sampler, s, 11, begin=4, wish=dict(schedule=spacing))
for eta in (0.4, 0.8, 1.0): try_run(f"ddim-eta-{eta}", "ddim", make("ddim", "leading"), 10, eta=eta, wish=dict(schedule="leading"))
for eta in (0.0, 0.7, 1.0): try_run(f"tcd-eta-{eta}", "tcd", make("tcd", "leading"), 4, eta=eta, wish=dict(schedule="leading"))
for spacing in ("leading", "karras", "trailing"):
    for n, eta in ((1, 1.0), (2, 1.0), (3, 1.0), (10, 1.0), (25, 1.0), (10, 0.5)):
        s = make("euler", spacing); s.set_timesteps(n); x, calls = k_diffusion_2s_ancestral(s, eta)
        add(f"dpmpp_2s_ancestral-{spacing}-{n}-{eta}", "dpmpp_2s_ancestral", x, calls, steps=n, schedule=spacing, eta=eta)
for sampler in ("euler", "dpmpp_2m", "heun", "ddpm"):
    s = make(sampler, "leading"); t = AysSchedules["StableDiffusionXLTimesteps"]; s.set_timesteps(timesteps=t)
    x, calls = run(sampler, s); add(f"{sampler}-timesteps", sampler, x, calls, timesteps=t)
s = make("euler", "leading"); sig = AysSchedules["StableDiffusionXLSigmas"]; s.set_timesteps(sigmas=sig)
x, calls = run("euler", s); add("euler-sigmas", "euler", x, calls, sigmas=sig)

for name, options in {"sdxl": {}, "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
                      "cosine": dict(beta_schedule="squaredcos_cap_v2"), "zero": dict(rescale_betas_zero_snr=True)}.items():
    args = {**dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), **options}
    tensors[f"alphas_cumprod.{name}"] = diffusers.DDIMScheduler(**args).alphas_cumprod.clone()


def short(v):
    if isinstance(v, float): return float(f"{v:.9g}")
    return [short(i) for i in v] if isinstance(v, list) else {k: short(i) for k, i in v.items()} if isinstance(v, dict) else float(v) if isinstance(v, np.floating) else v


json.dump(short(dict(seed=SEED, tables=tables, runs=runs)), open(HERE / "schedules.json", "w"), separators=(",", ":"))
save_file(tensors, HERE / "schedules.safetensors")
print(len(tables), "tables", len(runs), "runs")
