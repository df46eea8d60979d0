#!/usr/bin/env python3
"""Token ids of transformers' CLIPTokenizer for texts that are hard on a tokenizer. Writes tokens.json beside itself.

    make_tokens.py MODEL        MODEL: a folder in the diffusers layout with tokenizer/ and tokenizer_2/

Made with transformers 5.23. The third set of ids is of a tokenizer_config.json as SDXL base 1.0 has it, whose special
tokens are objects with `normalized` true.
"""
import json, pathlib, shutil, sys, tempfile
from transformers import CLIPTokenizer

TEXTS = [
    "", " ", "a", "A sunset over mountains", "a photo of a cat, highly detailed, 8k", "UPPER lower MiXeD",
    "  leading and trailing  ", "tabs\tand\nnew\r\nlines\u00a0nbsp\u3000ideographic", "double  spaces   everywhere",
    "hello!", "hello !", "!!!", "a!b!c", "wow!!! really?!", "(parentheses:1.2) [brackets] {braces}", "don't can't won't I'm you're we've they'll he'd",
    "DON'T CAN'T I'M", "it''s", "'s", "'S 'T 'RE", "rock'n'roll", "123456", "1 2 3", "3.14159", "10,000 €", "$100 50% off", "a1b2c3", "½ ² Ⅷ ٣ 七",
    "café", "cafe\u0301", "naïve Ångström ﬁ ligature", "İstanbul ı ß ẞ", "ÀÉÎÕÜ", "ǅ ǆ Ǆ", "Привет мир", "Γειά σου ΣΑΣ", "שלום עולם", "مرحبا بالعالم", "हिन्दी पाठ", "ไทย",
    "日本語のテキスト", "中文字符測試", "한국어 문장", "漢字kanji混ざり", "😀", "👨‍👩‍👧‍👦 family", "🏳️‍🌈 flag", "❤️🔥", "emoji😀inside", "e\u0301\u0302\u0303", "zero\u200bwidth\u200d\ufeffbom",
    "control\x01\x02\x7f chars", "null\x00byte", "\u2028line\u2029sep", "<|endoftext|>", "before <|endoftext|> after", "<|startoftext|>start", "<|ENDOFTEXT|>", "x<|endoftext|>y<|startoftext|>z",
    "< |endoftext| >", "https://example.com/a?b=c&d=e#f", "user@example.com", "C:\\path\\to\\file", "--flag=value --x", "a_b_c snake_case", "kebab-case-word", "…ellipsis — dash – en",
    "“quotes” ‘single’ «guillemets»", "masterpiece, best quality, 1girl, solo, (long hair:1.3)", "supercalifragilisticexpialidocious", "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "\U0001d518\U0001d52b\U0001d526 math", "ﷺ", "\ue000private", "\U0010ffff", "Ω ohm \u2126", "K kelvin \u212a", "ſ long s", "a" * 300, "word " * 120, "🐱" * 90, "!" * 80,
]


def ids(folder, text):
    return CLIPTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids


def main():
    model = pathlib.Path(sys.argv[1])
    special = lambda text: {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    base = dict(add_prefix_space=False, bos_token=special("<|startoftext|>"), do_lower_case=True, eos_token=special("<|endoftext|>"), errors="replace",
                model_max_length=77, pad_token="!", tokenizer_class="CLIPTokenizer", unk_token=special("<|endoftext|>"))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(model / "tokenizer" / name, folder)
        (pathlib.Path(folder) / "tokenizer_config.json").write_text(json.dumps(base))
        kinds = {"tokenizer": model / "tokenizer", "tokenizer_2": model / "tokenizer_2", "base_2": folder}
        made = {kind: CLIPTokenizer.from_pretrained(path) for kind, path in kinds.items()}
        out = {"base_2_config": base, "texts": []}
        for text in TEXTS:
            out["texts"].append({"text": text} | {kind: t(text, add_special_tokens=False).input_ids for kind, t in made.items()})
        out["special"] = {kind: [t.bos_token_id, t.eos_token_id, t.pad_token_id] for kind, t in made.items()}
    path = pathlib.Path(__file__).with_name("tokens.json")
    path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print(len(TEXTS), "texts,", path.stat().st_size, "bytes", out["special"])


main()
