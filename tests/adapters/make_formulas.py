#!/usr/bin/env python3
"""Makes formulas.safetensors: what adapter formats make of random layers, by their formulas in f64.

    pip install torch safetensors numpy lycoris-lora==4.1.3 peft==0.21.2
    make_formulas.py formulas.safetensors

Every formula is written out here in f64, and compared with what LyCORIS's and PEFT's own modules compute in f32, wherever
they have it; the differences are printed. Versions are in the file's metadata.

KIND/weight, KIND/bias                the layer: linear [16, 12], conv3 [16, 12, 3, 3], conv1 [16, 12, 1, 1], norm [16]
CASE/KIND/part/NAME                   what the adapter's file holds for it
CASE/KIND/weight/STRENGTH             the result; bias likewise
"""
import json, sys
import torch, lycoris, peft, importlib.metadata as md
from safetensors.torch import save_file
from torch import nn

O, I = 16, 12
STRENGTHS = [0.7, -0.5, 1.0]
torch.manual_seed(6)
torch.set_num_threads(1)
out, worst = {}, {}


def rand(*shape, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).float().double()


def layer(kind):
    if kind == "linear":
        return nn.Linear(I, O)
    if kind == "norm":
        return nn.GroupNorm(4, O)
    return nn.Conv2d(I, O, 3 if kind == "conv3" else 1)


LAYERS = {}
for kind in ["linear", "conv3", "conv1", "norm"]:
    module = layer(kind)
    with torch.no_grad():
        module.weight.copy_(rand(*module.weight.shape, scale=0.5))
        module.bias.copy_(rand(O, scale=0.5))
    LAYERS[kind] = module
    out[f"{kind}/weight"], out[f"{kind}/bias"] = module.weight.detach().clone(), module.bias.detach().clone()


def base(kind, tensor="weight"):
    return out[f"{kind}/{tensor}"].double()


def scale(p, rank):
    return (p["alpha"] / rank) if "alpha" in p else 1.0


def tucker(core, left, right):  # [M, N, k, k], [M, O], [N, I]
    return torch.einsum("mnhw,mo,ni->oihw", core, left, right)


# --- changes: the part of a weight that is added, before the strength -------------------------------------------------

def lora(p, w):
    up, down = p["lora_up.weight"].flatten(1), p["lora_down.weight"].flatten(1)
    change = tucker(p["lora_mid.weight"], up.T, down) if "lora_mid.weight" in p else up @ down
    return change.reshape(w.shape) * scale(p, down.shape[0])


def loha(p, w):
    def half(n):
        a, b = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
        return tucker(p[f"hada_t{n}"], a, b) if "hada_t1" in p else a @ b
    return (half(1) * half(2)).reshape(w.shape) * scale(p, p["hada_w1_b"].shape[0])


def lokr(p, w):
    rank = None
    if "lokr_w1" in p:
        w1 = p["lokr_w1"]
    else:
        w1, rank = p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w1_b"].shape[0]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2, rank = tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"]), p["lokr_w2_b"].shape[0]
    else:
        w2, rank = p["lokr_w2_a"] @ p["lokr_w2_b"].flatten(1), p["lokr_w2_b"].shape[0]
    for _ in range(w2.dim() - w1.dim()):
        w1 = w1.unsqueeze(-1)
    return torch.kron(w1, w2).reshape(w.shape) * (1.0 if rank is None else scale(p, rank))


def glora(p, w):
    flat = lambda n: p[n].flatten(1)
    turned = torch.einsum("oi...,ij,jk->ok...", w, flat("a1.weight"), flat("a2.weight"))
    return (turned + (flat("b1.weight") @ flat("b2.weight")).reshape(w.shape)) * scale(p, p["b2.weight"].shape[0])


# --- results ----------------------------------------------------------------------------------------------------------

def added(change):
    return lambda p, w, s: w + s * change(p, w)


def dora(change):
    """Equation 5 of the paper; between W and the result by the strength, as ComfyUI and A1111 have it."""
    def result(p, w, s):
        merged = w + change(p, w)
        m = p.get("dora_scale", p.get("lora_magnitude_vector"))
        of_outputs = "lora_magnitude_vector" in p or m.shape[0] == w.shape[0]
        axes = [a for a in range(w.dim()) if a != (0 if of_outputs else 1)]
        norm = merged.pow(2).sum(dim=axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
        m = m.reshape([-1 if a == (0 if of_outputs else 1) else 1 for a in range(w.dim())])
        return w + s * (m * merged / norm - w)
    return result


def cayley(blocks, p, outputs):
    q = blocks - blocks.transpose(-1, -2)
    longest = float(p.get("alpha", 0.0)) * outputs
    if longest > 0 and q.norm() > longest:
        q = q * longest / q.norm()
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q), eye


def oft(p, w, s):
    blocks = p["oft_blocks"]
    r, eye = cayley(blocks, p, w.shape[0])
    if blocks.dim() == 3:
        n, b, _ = blocks.shape
        x = torch.einsum("knm,kn...->km...", s * (r - eye) + eye, w.reshape(n, b, *w.shape[1:])).reshape(w.shape)
    else:
        x, b = w, blocks.shape[-1]
        for i, stage in enumerate(r):
            k = 2**i * b // 2
            x = x.reshape(-1, 2, k, *w.shape[1:]).transpose(1, 2).reshape(-1, b, *w.shape[1:])
            x = torch.einsum("nij,nj...->ni...", s * stage + (1 - s) * eye, x)
            x = x.reshape(-1, k, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
    return x * p["rescale"].reshape(-1, *[1] * (w.dim() - 1)) if "rescale" in p else x


def ia3(p, w, s):
    shape = [1] * w.dim()
    shape[1 if p["on_input"] else 0] = -1
    return w * (1 + s * p["weight"].reshape(shape))


# --- the references ---------------------------------------------------------------------------------------------------

def lycoris_layer(cls, kind, parts, s, **options):
    """The weight that LyCORIS's module works with: what its forward adds, read off its response to unit inputs."""
    module = cls("x", layer_copy(kind), s, **options)
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in parts.items():
        if name != "alpha":
            held[name].data.copy_(value.reshape(held[name].shape))
    module.eval()
    with torch.no_grad():
        if kind == "norm":
            w, b = module.get_merged_weight(s)
            return w, b
        size = 3 if kind == "conv3" else 1
        if kind == "linear":
            x, zero = torch.eye(I), torch.zeros(1, I)
        else:  # one image for each kernel position
            x, zero = torch.eye(I * size * size).reshape(-1, I, size, size), torch.zeros(1, I, size, size)
        w = (module(x) - module(zero)).reshape(x.shape[0], O).T
        return w.reshape(base(kind).shape), None


def layer_copy(kind):
    copy = layer(kind)
    copy.load_state_dict(LAYERS[kind].state_dict())
    return copy


def peft_layer(kind, parts, s, dora):
    from peft import LoraConfig, get_peft_model
    rank = parts["lora_down.weight"].shape[0]
    net = nn.Sequential(layer_copy(kind))
    alpha = float(parts.get("alpha", rank))
    net = get_peft_model(net, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_dora=dora, lora_bias="lora_up.bias" in parts))
    target = net.base_model.model[0]
    with torch.no_grad():
        target.lora_A["default"].weight.copy_(parts["lora_down.weight"])
        target.lora_B["default"].weight.copy_(parts["lora_up.weight"])
        if "lora_up.bias" in parts:
            target.lora_B["default"].bias.copy_(parts["lora_up.bias"])
        if dora:
            held = target.lora_magnitude_vector["default"].weight
            held.copy_(parts["lora_magnitude_vector"].reshape(held.shape))
        target.set_scale("default", s)
        target.merge()
    merged = target.get_base_layer()
    return merged.weight.detach(), merged.bias.detach()


def case(name, kind, parts, result, reference=None, strengths=STRENGTHS, bias=None):
    parts = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in parts.items()}
    for k, v in parts.items():
        out[f"{name}/{kind}/part/{k}"] = v.float().contiguous()
    for s in strengths:
        results = {}
        if result:
            results["weight"] = result(parts, base(kind), s)
        if bias:
            results["bias"] = bias(parts, base(kind, "bias"), s)
        for tensor, value in results.items():
            out[f"{name}/{kind}/{tensor}/{s}"] = value.float().contiguous()
        if reference and (theirs := reference(s)):
            for tensor, value in zip(["weight", "bias"], theirs):
                if value is not None and tensor in results:
                    want = results[tensor]
                    error = ((value.double() - want).abs().max() / want.abs().max()).item()
                    worst[name, kind, tensor] = max(worst.get((name, kind, tensor), 0.0), error)


R = 4
for kind in ["linear", "conv3", "conv1"]:
    k = [] if kind == "linear" else [3, 3] if kind == "conv3" else [1, 1]
    ones = [1] * len(k)
    area = 9 if kind == "conv3" else 1
    L, f32 = lycoris.modules, lambda p: {n: torch.as_tensor(v).float() for n, v in p.items()}

    p = {"lora_up.weight": rand(O, R, *ones, scale=0.4), "lora_down.weight": rand(R, I, *k, scale=0.4), "alpha": 3.0}
    case("lora", kind, p, added(lora), lambda s: lycoris_layer(L.LoConModule, kind, f32(p), s, lora_dim=R, alpha=3.0))
    q = {n: v for n, v in p.items() if n != "alpha"}
    case("lora without alpha", kind, q, added(lora), lambda s: peft_layer(kind, f32(q), s, False))
    b = p | {"lora_up.bias": rand(O, scale=0.4)}
    if kind == "linear":
        case("lora with bias", kind, b, added(lora), lambda s: peft_layer(kind, f32(b), s, False),
             bias=lambda p, w, s: w + s * scale(p, R) * p["lora_up.bias"])
    d = p | {"dora_scale": rand(O, 1, *ones).abs() + 0.5}
    case("dora of outputs", kind, d, dora(lora),
         lambda s: lycoris_layer(L.LoConModule, kind, f32(d), s, lora_dim=R, alpha=3.0, weight_decompose=True) if s == 1 else None)
    e = p | {"dora_scale": rand(1, I, *ones).abs() + 0.5}
    case("dora of inputs", kind, e, dora(lora),
         lambda s: lycoris_layer(L.LoConModule, kind, f32(e), s, lora_dim=R, alpha=3.0, weight_decompose=True, wd_on_out=False) if s == 1 else None)
    v = p | {"lora_magnitude_vector": (rand(O) if kind == "linear" else rand(1, O, 1, 1)).abs() + 0.5}
    case("dora of peft", kind, v, dora(lora), lambda s: peft_layer(kind, f32(v), s, True) if s == 1 else None)

    h = {f"hada_w{n}_a": rand(O, R, scale=0.5) for n in (1, 2)} | {f"hada_w{n}_b": rand(R, I * area, scale=0.5) for n in (1, 2)} | {"alpha": 2.0}
    case("loha", kind, h, added(loha), lambda s: lycoris_layer(L.LohaModule, kind, f32(h), s, lora_dim=R, alpha=2.0))
    hd = h | {"dora_scale": rand(O, 1, *ones).abs() + 0.5}
    case("dora of loha", kind, hd, dora(loha),
         lambda s: lycoris_layer(L.LohaModule, kind, f32(hd), s, lora_dim=R, alpha=2.0, weight_decompose=True) if s == 1 else None)

    whole = {"lokr_w1": rand(4, 3), "lokr_w2": rand(4, 4, *k, scale=0.3), "alpha": 2.0}
    case("lokr of whole factors", kind, whole, added(lokr),
         lambda s: lycoris_layer(L.LokrModule, kind, f32(whole), s, lora_dim=R, alpha=2.0, full_matrix=True, factor=4))
    # Rank 1 is below half of every factor's side, so LyCORIS factors both.
    both = {"lokr_w1_a": rand(4, 1), "lokr_w1_b": rand(1, 3), "lokr_w2_a": rand(4, 1), "lokr_w2_b": rand(1, 4 * area), "alpha": 0.5}
    case("lokr of both products", kind, both, added(lokr),
         lambda s: lycoris_layer(L.LokrModule, kind, f32(both), s, lora_dim=1, alpha=0.5, decompose_both=True, factor=4))
    kd = both | {"dora_scale": rand(O, 1, *ones).abs() + 0.5}
    case("dora of lokr", kind, kd, dora(lokr),
         lambda s: lycoris_layer(L.LokrModule, kind, f32(kd), s, lora_dim=1, alpha=0.5, decompose_both=True, factor=4, weight_decompose=True) if s == 1 else None)
    first = {"lokr_w1_a": rand(4, 2), "lokr_w1_b": rand(2, 3), "lokr_w2": rand(4, 4, *k, scale=0.3), "alpha": 0.5}
    case("lokr of a first product", kind, first, added(lokr))

    if kind == "conv3":
        t = {"lora_up.weight": rand(O, R, 1, 1, scale=0.5), "lora_mid.weight": rand(R, R, 3, 3, scale=0.5), "lora_down.weight": rand(R, I, 1, 1, scale=0.5), "alpha": 2.0}
        case("lora with a core", kind, t, added(lora), lambda s: lycoris_layer(L.LoConModule, kind, f32(t), s, lora_dim=R, alpha=2.0, use_tucker=True))
        u = {f"hada_w{n}_a": rand(R, O, scale=0.5) for n in (1, 2)} | {f"hada_w{n}_b": rand(R, I, scale=0.5) for n in (1, 2)} | {f"hada_t{n}": rand(R, R, 3, 3, scale=0.5) for n in (1, 2)} | {"alpha": 2.0}
        case("loha with cores", kind, u, added(loha), lambda s: lycoris_layer(L.LohaModule, kind, f32(u), s, lora_dim=R, alpha=2.0, use_tucker=True))
        x = {"lokr_w1": rand(4, 3), "lokr_w2_a": rand(1, 4), "lokr_w2_b": rand(1, 4), "lokr_t2": rand(1, 1, 3, 3), "alpha": 0.5}
        case("lokr with a core", kind, x, added(lokr), lambda s: lycoris_layer(L.LokrModule, kind, f32(x), s, lora_dim=1, alpha=0.5, use_tucker=True, factor=4))

    o = {"oft_blocks": rand(4, 4, 4, scale=0.5), "alpha": 0.0}
    case("oft", kind, o, oft, lambda s: lycoris_layer(L.DiagOFTModule, kind, f32(o), s, lora_dim=4))
    c = {"oft_blocks": rand(2, 8, 8, scale=0.5), "alpha": 0.05}
    case("oft of kohya", kind, c, oft)
    r = {"oft_blocks": rand(4, 4, 4, scale=0.5), "rescale": rand(O, 1, *ones).abs() + 0.5, "alpha": 0.05}
    case("oft with rescale", kind, r, oft, lambda s: lycoris_layer(L.DiagOFTModule, kind, f32(r), s, lora_dim=4, constraint=0.05, rescaled=True))
    m = {"oft_blocks": rand(3, 4, 4, 4, scale=0.5), "alpha": 0.0}
    case("boft", kind, m, oft, lambda s: lycoris_layer(L.ButterflyOFTModule, kind, f32(m), s, lora_dim=4))
    mr = m | {"rescale": rand(O, 1, *ones).abs() + 0.5, "alpha": 0.1}
    case("boft with rescale", kind, mr, oft, lambda s: lycoris_layer(L.ButterflyOFTModule, kind, f32(mr), s, lora_dim=4, constraint=0.1, rescaled=True))

    for on_input in (0, 1):
        side = I if on_input else O
        a = {"weight": rand(side, scale=0.5) if kind == "linear" else rand(1, side, 1, 1, scale=0.5), "on_input": float(on_input)}
        case("ia3 on inputs" if on_input else "ia3", kind, a, ia3,
             lambda s: lycoris_layer(L.IA3Module, kind, {n: w for n, w in f32(a).items() if n != "on_input"}, s, train_on_input=bool(on_input)))
    g = {"a1.weight": rand(I, R, *ones, scale=0.4), "a2.weight": rand(R, I, *ones, scale=0.4), "b1.weight": rand(O, R, *ones, scale=0.4), "b2.weight": rand(R, I, *k, scale=0.4), "alpha": 2.0}
    case("glora", kind, g, added(glora), lambda s: lycoris_layer(L.GLoRAModule, kind, f32(g), s, lora_dim=R, alpha=2.0))

    f = {"diff": rand(*base(kind).shape), "diff_b": rand(O)}
    case("full", kind, f, lambda p, w, s: w + s * p["diff"], bias=lambda p, w, s: w + s * p["diff_b"])

n = {"w_norm": rand(O), "b_norm": rand(O)}
case("norm", "norm", n, lambda p, w, s: w + s * p["w_norm"],
     lambda s: lycoris_layer(lycoris.modules.NormModule, "norm", {k: v.float() for k, v in n.items()}, s),
     bias=lambda p, w, s: w + s * p["b_norm"])

for (name, kind, tensor), error in worst.items():
    print(f"{name:24} {kind:8} {tensor:8} {error:.1e}{'   DIFFERS' if error > 1e-5 else ''}")
versions = {n: md.version(n) for n in ["torch", "lycoris-lora", "peft"]}
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[1], metadata={"versions": json.dumps(versions)})
