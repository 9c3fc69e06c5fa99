"""Sample the bundled calibration text from the demo model.

Every document starts after the model's beginning-of-text token and is drawn at temperature 1 from the whole
vocabulary, with a fixed seed, until encoding its text again gives at least 512 tokens. The end-of-text token
is masked out, so that no document ends early and none holds a special token.

    python calib_data/make_calibration_text.py

It writes ``calib_data/calibration.jsonl``, one ``{"text": …}`` a line, UTF-8, LF. The output is a function of
the model, the seed and the torch build: sums are ordered differently by other processors, and one different
draw changes the rest of a document.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import MambaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "src/qmamba_cli/demo/mamba-5m"
OUT = ROOT / "calib_data/calibration.jsonl"
SEED = 20240229
DOCUMENTS = 640
BATCH = 160
# Text encoded again may give fewer tokens than were sampled, as sampling can spell a word in rare pieces.
SAMPLED_TOKENS = 560
LEAST_TOKENS = 512


def sample(model: MambaForCausalLM, documents: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw token sequences at temperature 1.

    Args:
        model: the float model.
        documents: sequences to draw at the same time.
        length: tokens a sequence; the start token is not one of them.
        generator: the source of chance.

    Returns:
        (documents, length) int64.
    """
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    token = torch.full((documents, 1), bos)
    cache = None
    drawn = []
    for _ in range(length):
        # transformers' Mamba takes the second and later calls as steps of one token where a cache is given.
        output = model(token, cache_params=cache, use_cache=True)
        cache = output.cache_params
        logits = output.logits[:, -1].float()
        logits[:, eos] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        drawn.append(token)
    return torch.cat(drawn, dim=1)


def cut_clean(text: str) -> str:
    """Drop an incomplete last character, and the incomplete last word with it."""
    return text.rstrip("\ufffd").rpartition(" ")[0]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = MambaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    texts: list[str] = []
    began = time.perf_counter()
    while len(texts) < arguments.documents:
        with torch.inference_mode():
            drawn = sample(model, BATCH, SAMPLED_TOKENS, generator)
        candidates = [cut_clean(text) for text in tokenizer.decode_batch(drawn.tolist())]
        texts += [
            text
            for text in candidates
            if "\ufffd" not in text
            and len(tokenizer.encode(text, add_special_tokens=False).ids) >= LEAST_TOKENS
        ]
        print(f"{len(texts)} documents, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[: arguments.documents])
    content = "".join(lines).encode()
    arguments.out.write_bytes(content)
    print(f"{arguments.out.name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
