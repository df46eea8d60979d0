#!/usr/bin/env python3
"""Makes the goldens of prompt syntax: `prompts.json` and `prompts.safetensors`, and the textual inversion that they use.

    make_prompts.py ../shared/demo-model/model

The fragments of every prompt are written out by hand beside it, step by step, so that reading a prompt is checked too.
Their tokens become chunks and their weights act by the formulas of AUTOMATIC1111's web UI (modules/sd_hijack_clip.py,
modules/sd_emphasis.py, modules/sd_samplers_cfg_denoiser.py), ComfyUI (comfy/sd1_clip.py) and compel
(embeddings_provider.py), on the states of transformers' text encoders; diffusers' UNet and schedulers draw with them.
f32 on the CPU.
"""
import importlib.util, json, math, pathlib, sys
import diffusers, torch, transformers
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("make_cases", HERE.parent / "parity/make_cases.py")
make_cases = importlib.util.module_from_spec(spec); spec.loader.exec_module(make_cases)

BREAK = object()
SAMPLERS = ["ddim", "euler", "dpmpp_2m", "euler_ancestral"]
SENTENCE = "a lighthouse on a cliff above the stormy sea, "
STYLE = "steer-style"


class Encoders:
    def __init__(self, pipe, style):
        self.pair = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
        for (_, encoder), vectors in zip(self.pair, style):
            table = encoder.get_input_embeddings().weight
            self.first, self.vectors = table.shape[0], vectors.shape[0]
            encoder.resize_token_embeddings(self.first + self.vectors, mean_resizing=False)
            with torch.no_grad():
                encoder.get_input_embeddings().weight[self.first:] = vectors

    def tokens(self, tokenizer, text):
        ids = []
        for i, piece in enumerate(text.split(STYLE)):
            if i:
                ids.append([self.first + n for n in range(self.vectors)])
            ids += [[id] for id in tokenizer(piece, add_special_tokens=False, truncation=False)["input_ids"]]
        return ids

    def chunks(self, tokenizer, fragments, backtrack):
        """Lists of (id, weight, fragment), at most 75 each."""
        comma = tokenizer(",", add_special_tokens=False)["input_ids"][0]
        done, chunk, last = [], [], -1

        def close():
            nonlocal chunk, last
            done.append(chunk)
            chunk, last = [], -1
        for number, fragment in enumerate(fragments):
            if fragment is BREAK:
                close()
                continue
            text, weight = fragment
            for ids in self.tokens(tokenizer, text):
                if len(ids) > 1:
                    if len(chunk) + len(ids) > 75: close()
                    chunk += [(id, weight, number) for id in ids]
                    continue
                if ids[0] == comma:
                    last = len(chunk)
                elif backtrack and len(chunk) == 75 and last != -1 and len(chunk) - last <= backtrack:
                    kept, moved = chunk[:last + 1], chunk[last + 1:]
                    chunk = kept
                    close()
                    chunk = moved
                if len(chunk) == 75: close()
                chunk.append((ids[0], weight, number))
        if chunk or not done: close()
        return done

    def states(self, which, rows, skip, mask=None):
        _, encoder = self.pair[which]
        ids = torch.tensor(rows)
        mask = None if mask is None else torch.tensor(mask)
        with torch.no_grad():
            out = encoder(ids, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-(2 + skip)], (out.text_embeds if which else None)

    def side(self, which, fragments, count, weighting, skip, backtrack):
        tokenizer, _ = self.pair[which]
        pad = tokenizer.pad_token_id
        row = lambda chunk: ([tokenizer.bos_token_id] + [id for id, _, _ in chunk] + [tokenizer.eos_token_id] + [pad] * 75)[:77]
        chunks = self.chunks(tokenizer, fragments, backtrack)
        chunks += [[]] * (count - len(chunks))
        rows = [row(chunk) for chunk in chunks]
        weights = torch.ones(len(chunks), 77)
        owner = [[None] * 77 for _ in chunks]
        for n, chunk in enumerate(chunks):
            for i, (_, weight, number) in enumerate(chunk):
                weights[n, 1 + i] = weight
                owner[n][1 + i] = number
        z, pooled = self.states(which, rows, skip)
        w = weights[..., None]
        if weighting == "a1111":
            out = []
            for n in range(len(chunks)):
                weighted = z[n] * w[n]
                out.append(weighted * (z[n].mean() / weighted.mean()))
            z = torch.stack(out)
        elif weighting in ("comfy", "compel"):
            empty, _ = self.states(which, [row([])], skip)
            from_empty = lambda z: empty + (z - empty) * w
            base = z
            z = from_empty(z)
            if weighting == "compel":
                total, lerped = 1.0, z
                for number, fragment in enumerate(fragments):
                    if fragment is BREAK or fragment[1] >= 1 or not any(number in row for row in owner): continue
                    mask = [[int(o != number) for o in line] for line in owner]
                    without = from_empty(self.states(which, rows, skip, mask)[0])
                    share = math.tan((1 - max(1e-5, fragment[1])) * math.pi / 2)
                    lerped, total = lerped + without * share, total + share
                z = lerped / total
        return z.reshape(-1, z.shape[-1]), (None if pooled is None else pooled[:1])

    def text(self, text, count, weighting, skip, backtrack):
        first, second = text
        a, _ = self.side(0, first, count, weighting, skip, backtrack)
        b, pooled = self.side(1, second, count, weighting, skip, backtrack)
        return torch.cat([a, b], -1)[None], pooled

    def count(self, text, backtrack):
        return max(len(self.chunks(self.pair[i][0], fragments, backtrack)) for i, fragments in enumerate(text))


def both(fragments):
    return fragments if isinstance(fragments, tuple) else (fragments, fragments)


def draw(pipe, encoders, data, told):
    """`told(step)`, step from 1: ([(weight, fragments)], negative fragments or None). AUTOMATIC1111 compares evaluations,
    counted from 0, with the step that each text ends at (`reconstruct_cond_batch`), so the first is told once more."""
    weighting, backtrack = data.get("prompt_weighting", "a1111"), data.get("comma_padding_backtrack", 0)
    steps, scale, skip = data["steps"], data["cfg_scale"], data.get("clip_skip", 0)
    script = [told(max(step, 1)) for step in range(steps)]
    texts = [both(f) for parts, negative in script for f in [f for _, f in parts] + ([negative] if negative is not None else [])]
    count = max(encoders.count(text, backtrack) for text in texts)
    scheduler = make_cases.scheduler(data["sampler_name"], data["scheduler"])
    scheduler.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(data["seed"])
    x = torch.randn((1, 4, data["height"] // 8, data["width"] // 8), generator=generator) * scheduler.init_noise_sigma
    ids = torch.tensor([[data["height"], data["width"], 0, 0, data["height"], data["width"]]], dtype=torch.float32)
    import inspect
    extra = {k: v for k, v in dict(generator=generator, eta=0.0).items() if k in inspect.signature(scheduler.step).parameters}
    for t, (parts, negative) in zip(scheduler.timesteps, script):
        conds = [encoders.text(both(f), count, weighting, skip, backtrack) for _, f in parts]
        if negative is None:
            uncond = tuple(torch.zeros_like(tensor) for tensor in conds[0])
        else:
            uncond = encoders.text(both(negative), count, weighting, 0, backtrack)
        batch = [uncond] + conds
        scaled = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            predicted = pipe.unet(torch.cat([scaled] * len(batch)), t, encoder_hidden_states=torch.cat([c for c, _ in batch]),
                                  added_cond_kwargs=dict(text_embeds=torch.cat([p for _, p in batch]), time_ids=ids.repeat(len(batch), 1))).sample
        out = predicted[:1].clone()
        for (weight, _), part in zip(parts, predicted[1:]):
            out += (part[None] - predicted[:1]) * (weight * max(scale, 1.0))
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


def cases():
    made = {}

    def case(name, told, samplers=("euler",), **fields):
        for sampler in samplers:
            data = dict(prompt=None, sampler_name=sampler, scheduler="leading", steps=7, cfg_scale=5.0, seed=11, width=128, height=128)
            data.update(fields)
            full = name if len(samplers) == 1 else f"{name}-{sampler}"
            made[full] = (data, told)
    still = lambda parts, negative=None: lambda step: (parts, negative)
    one = lambda fragments, negative=None: still([(1.0, fragments)], negative)

    weighted = [("a ", 1.0), ("red", 1.4), (" circle on a ", 1.0), ("blue", 1 / 1.1), (" square, ", 1.0), ("sharp", 1.1 * 1.1)]
    blurry = [("blurry", 1.3), (", dull", 1.0)]
    text = dict(prompt="a (red:1.4) circle on a [blue] square, ((sharp))", negative_prompt="(blurry:1.3), dull")
    case("weights", one(weighted, blurry), SAMPLERS, **text)
    case("weights-zero-negative", one([("a ", 1.0), ("green", 0.5), (" hill", 1.0)]), prompt="a (green:.5) hill")
    case("escapes", one([("a (red) [circle] \\ ", 1.0), ("x", 1.1)]), prompt=r"a \(red\) \[circle\] \\ (x")
    case("weights-clip-skip", one(weighted, blurry), clip_skip=1, **text)
    case("weights-by-encoder", one(([("a ", 1.0), ("lake", 1.5)], [("night", 0.7), (" sky", 1.0)]), ([("people", 1.0)], [("day", 1.2)])),
         prompt="a (lake:1.5)", prompt_2="(night:0.7) sky", negative_prompt="people", negative_prompt_2="(day:1.2)")
    case("break", one([("a red circle", 1.0), BREAK, ("a ", 1.0), ("blue", 1.3), (" square", 1.0)], [("blurry", 1.0)]),
         prompt="a red circle BREAK a (blue:1.3) square", negative_prompt="blurry")
    case("break-in-brackets", one([("sun", 1.2), BREAK, ("moon", 1.2)]), prompt="(sun BREAK moon:1.2)")
    long = [(SENTENCE * 8, 1.0), ("a boat", 1.4), (", " + SENTENCE * 3, 1.0)]
    written = SENTENCE * 8 + "(a boat:1.4), " + SENTENCE * 3
    case("long", one(long, [("blurry", 1.0)]), prompt=written, negative_prompt="blurry")
    case("long-backtrack", one(long, [("blurry", 1.0)]), prompt=written, negative_prompt="blurry", comma_padding_backtrack=20)
    case("long-plain", one([(SENTENCE * 12, 1.0)], [(SENTENCE * 9, 1.0)]), prompt=SENTENCE * 12, negative_prompt=SENTENCE * 9)
    case("none", one([("a (red:1.4) [circle] AND BREAK", 1.0)]), prompt="a (red:1.4) [circle] AND BREAK", prompt_weighting="none")
    for weighting in ("comfy", "compel"):
        case(f"weights-{weighting}", one(weighted, blurry), SAMPLERS, prompt_weighting=weighting, **text)
        case(f"down-{weighting}", one([("a ", 1.0), ("small", 0.3), (" boat at ", 1.0), ("night", 0.6), (", calm", 1.0)]),
             prompt="a (small:0.3) boat at (night:0.6), calm", prompt_weighting=weighting)
        downed = [(SENTENCE * 7, 1.0), ("a boat on a lake in the fog at night", 0.5), (", calm", 1.2)]
        case(f"long-{weighting}", one(downed), prompt=SENTENCE * 7 + "(a boat on a lake in the fog at night:0.5)(, calm:1.2)", prompt_weighting=weighting)

    def scheduled(step):
        colour = "red" if step <= 3 else "green"
        return [(1.0, [(f"a {colour} circle{' on grass' if step <= 2 else ''}{' in fog' if step > 4 else ''}", 1.0)])], [("blurry", 1.0)]
    case("schedule", scheduled, SAMPLERS, prompt="a [red:green:0.5] circle[ on grass::2][ in fog:4]", negative_prompt="blurry")
    case("schedule-nested", lambda step: ([(1.0, [("a ", 1.0), ("cat" if step <= 2 else "dog" if step <= 5 else "fox", 1.3)])], None),
         prompt="a [(cat:1.3):[(dog:1.3):(fox:1.3):5]:2]")
    case("schedule-negative", lambda step: ([(1.0, [("a hill", 1.0)])], [("blue" if step <= 4 else "grey", 1.0)]),
         prompt="a hill", negative_prompt="[blue:grey:4]")
    case("alternate", lambda step: ([(1.0, [(f"a {['cat', 'dog', 'fox'][(step - 1) % 3]} on grass", 1.0)])], [("blurry", 1.0)]), SAMPLERS,
         prompt="a [cat|dog|fox] on grass", negative_prompt="blurry", seed=12)
    case("alternate-five", lambda step: ([(1.0, [(["a", "b", "c", "d", "e"][(step - 1) % 5], 1.0)])], None), prompt="[a|b|c|d|e]")
    parts = [(1.0, [("a red circle ", 1.0)]), (0.6, [(" a ", 1.0), ("blue", 1.2), (" square", 1.0)]), (-0.2, [(" fog", 1.0)])]
    case("and", still(parts, [("blurry", 1.0)]), SAMPLERS, prompt="a red circle AND a (blue:1.2) square :0.6 AND fog:-0.2", negative_prompt="blurry")
    case("and-unguided", still([(0.7, [("a cat", 1.0)]), (0.5, [(" a dog", 1.0)])]), prompt="a cat :0.7 AND a dog :0.5", cfg_scale=1.0)
    case("and-schedule", lambda step: ([(1.0, [("a cat " if step <= 3 else "a fox ", 1.0)]), (1.0, [(" a lake" if step % 2 else " a hill", 1.0)])], None),
         prompt="a [cat:fox:3] AND a [lake|hill]")
    case("and-long", still([(1.0, [(SENTENCE * 9, 1.0)]), (1.0, [(" fog", 1.0)])]), prompt=SENTENCE * 9 + "AND fog")

    style = [dict(name=f"embeddings/{STYLE}.safetensors")]
    case("embedding", one([(f"a hill, {STYLE}, at night", 1.0)], [("blurry", 1.0)]), SAMPLERS,
         prompt=f"a hill, {STYLE.upper()}, at night", negative_prompt="blurry", embeddings=style)
    case("embedding-weighted", one([("a hill ", 1.0), (f"in {STYLE}", 1.4)], [(STYLE, 1.0)]),
         prompt="a hill (in <s>:1.4)", negative_prompt="<s>", embeddings=[dict(name=STYLE, token="<s>")])
    case("embedding-at-the-edge", one([("a " * 73 + f"{STYLE} b", 1.0)]), prompt="a " * 73 + f"{STYLE} b", embeddings=style)
    return made


def main(model):
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    file = HERE / "models/embeddings" / f"{STYLE}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(5)
    vectors = lambda encoder: torch.randn((3, encoder.config.hidden_size), generator=random) * encoder.get_input_embeddings().weight.std()
    save_file(dict(clip_l=vectors(pipe.text_encoder), clip_g=vectors(pipe.text_encoder_2)), file)
    stored = load_file(file)
    encoders = Encoders(pipe, [stored["clip_l"], stored["clip_g"]])
    requests, latents = {}, {}
    for name, (data, told) in cases().items():
        requests[name] = data
        latents[name] = draw(pipe, encoders, data, told).contiguous()
        print(name, "latents std %.3f" % latents[name].std().item(), flush=True)
    versions = f"tests/steer/make_prompts.py: torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    (HERE / "prompts.json").write_text(json.dumps(dict(mode="prompts", made_by=versions, cases=requests), indent=1) + "\n")
    save_file(latents, HERE / "prompts.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
