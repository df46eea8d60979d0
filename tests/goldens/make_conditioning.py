#!/usr/bin/env python3
"""Embeddings of diffusers' StableDiffusionXLPipeline.encode_prompt, in f32. Writes conditioning.safetensors beside itself.

    make_conditioning.py MODEL  MODEL: the demonstration model in the diffusers layout

Made with torch 2.15, diffusers 0.42.1, transformers 5.23. `<case>.context` is [1, 77, 96], `<case>.pooled` [1, 64],
with `negative.` before them for the negative prompt. The case `chunks` is not the pipeline's: 75 tokens at a time are
encoded by the same encoders, and their states joined.
"""
import pathlib, sys
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

CASES = {
    "plain": dict(prompt="A sunset over mountains"),
    "both": dict(prompt="a red circle", prompt_2="a blue square, sharp!", negative_prompt="blurry", negative_prompt_2="low quality!"),
    "empty_negative": dict(prompt="café 😀 123", negative_prompt=""),
    "skip": dict(prompt="a lake at night", negative_prompt="people", clip_skip=1),
}
LONG = "a lighthouse on a cliff above the stormy sea, " * 12


def rows(tokenizer, text, count):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [ids[i:i + 75] for i in range(0, len(ids), 75)] + [[]] * count
    row = lambda p: ([tokenizer.bos_token_id] + p + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 75)[:77]
    return torch.tensor([row(p) for p in pieces[:count]])


def main():
    torch.set_grad_enabled(False)
    pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
    out = {}
    for name, case in CASES.items():
        made = pipe.encode_prompt(do_classifier_free_guidance=True, device="cpu", num_images_per_prompt=1, **case)
        for key, tensor in zip(("context", "negative.context", "pooled", "negative.pooled"), made):
            if tensor.abs().max() > 0:
                out[f"{name}.{key}"] = tensor.contiguous()
    count = -(-len(pipe.tokenizer(LONG, add_special_tokens=False).input_ids) // 75)
    one = pipe.text_encoder(rows(pipe.tokenizer, LONG, count), output_hidden_states=True).hidden_states[-2]
    two = pipe.text_encoder_2(rows(pipe.tokenizer_2, LONG, count), output_hidden_states=True)
    hidden = torch.cat([one, two.hidden_states[-2]], -1)
    out["chunks.context"] = hidden.reshape(1, -1, hidden.shape[-1]).contiguous()
    out["chunks.pooled"] = two[0][:1].contiguous()
    path = pathlib.Path(__file__).with_name("conditioning.safetensors")
    save_file(out, path)
    print(count, "chunks,", path.stat().st_size, "bytes", {k: tuple(v.shape) for k, v in out.items()})


main()
