r"""Which fine-tuning fits: the peak memory of a step of Llama models, as a table.

    python examples/estimate.py
    python examples/estimate.py --models Llama-3.1-8B --tunings lora,qlora --tokens 8k,128k
    python examples/estimate.py --models Llama-3.2-3B --tunings qlora --tokens 4k --batch 2 \
        --recompute block --prefill-chunk 2048 --device cuda

Figures are GiB; each column is its own maximum, the last but two the peak of ordinary training.
Nothing is downloaded and no GPU is needed; a row takes some ten to thirty seconds.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import transformers
from transformers import LlamaConfig

import fxseek

# width, feed-forward width, layers, heads, head width, whether the head is the embedding
LLAMA_3 = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 64, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 128, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 128, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 128, False),
}


def llama_3(name: str) -> LlamaConfig:
    """The configuration of a published model, written out: no access to a hub is needed."""
    width, ffn, layers, heads, head_dim, tied = LLAMA_3[name]
    return LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=head_dim,
        tie_word_embeddings=tied, max_position_embeddings=131072,
    )  # fmt: skip


def tokens_of(text: str) -> int:
    """``"32k"`` is 32768, ``"1M"`` is 1048576."""
    scale = {"k": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    return int(text[:-1] if scale > 1 else text) * scale


def row(name: str, tuning: str, tokens: str, arguments: argparse.Namespace) -> str:
    start = time.perf_counter()
    given = {"tuning": tuning, "device": arguments.device}
    config, count, batch = llama_3(name), tokens_of(tokens), arguments.batch
    found = fxseek.estimate(
        config, count, batch, arguments.ratio, **given, recompute=arguments.recompute,
        prefill_chunk=arguments.prefill_chunk, kv=arguments.kv,
        chunk_bytes=arguments.chunk_bytes,
    )  # fmt: skip
    everything = fxseek.estimate(config, count, batch, ordinary=True, **given)
    columns = ("parameters", "K/V", "activations", "transients")
    cells = [found.largest[column] for column in columns]
    cells += [found.peak_bytes, everything.peak_bytes]
    figures = " | ".join(f"{cell / 2**30:.1f}" for cell in cells)
    seconds = time.perf_counter() - start
    size = f"{batch} × {tokens}"
    return f"| {name} | {tuning} | {size} | {figures} | {found.peak_stage} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default="Llama-3.2-1B,Llama-3.1-8B")
    parser.add_argument("--tunings", default="full,lora,qlora")
    parser.add_argument("--tokens", default="8k,32k", help="of a row (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--device", default="hopper", help="cuda, hopper or cpu (%(default)s)")
    parser.add_argument("--recompute", default="selective", help="or none, block (%(default)s)")
    parser.add_argument("--prefill-chunk", type=int, help="tokens (default: all)")
    parser.add_argument("--chunk-bytes", type=int, help="of logits (default: by the device)")
    parser.add_argument("--kv", default="device", help="or offload (%(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    print("| model | tuning | tokens | parameters | K/V | activations | transients | peak "
          "| without fxseek | peak in | seconds |")  # fmt: skip
    print("|---" * 11 + "|")
    for name in arguments.models.split(","):
        for tuning in arguments.tunings.split(","):
            for tokens in arguments.tokens.split(","):
                print(row(name, tuning, tokens, arguments), flush=True)


if __name__ == "__main__":
    main()
