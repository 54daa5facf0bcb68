"""Hides a number in a long real text, asks the bundled model for it, and shows what its cache held.

    python examples/passkey.py                     # 16,384 tokens, a number and a place drawn anew
    python examples/passkey.py --length 8192 --seed 3

The text is a module of the standard library that the model was not trained on.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import kvell
from kvell.bundled import bundled_model_path
from kvell.training.corpus import read_corpus
from kvell.training.settings import TrainingConfig
from kvell.training.tasks import Passkey

HERE = Path(__file__).parent
DIGITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Hide a number in a long text and ask for it.")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the prompt and its answer together")
    parser.add_argument("--seed", type=int, help="draws the number and its place; another every time without it")
    options = parser.parse_args()
    seed = random.randrange(1000) if options.seed is None else options.seed

    recipe = TrainingConfig.read(HERE / "mini.yaml")
    longest = sorted(read_corpus(recipe.data).held_out, key=lambda document: -len(document.text))
    tokenizer = kvell.Tokenizer.from_pretrained(bundled_model_path())
    model = kvell.from_pretrained(bundled_model_path(), dtype=torch.float32)
    if options.length > model.config.max_positions:
        raise kvell.InputError(
            f"--length {options.length} is more than the model's {model.config.max_positions} positions"
        )
    bos, *text = [token for document in longest for token in tokenizer.encode(document.text)[: options.length]]
    text = [token for token in text if token != bos]
    case = Passkey(length=options.length).draw(
        random.Random(seed), text, lambda piece: tokenizer.encode(piece)[1:], bos
    )
    start, asked = case.scored[0], case.tokens[: case.scored[0]]
    found = start - case.distances[0]

    print(f"{start:,} tokens, from {longest[0].name} on, which the model has never seen (seed {seed})\n")
    print(f"  ...{tokenizer.decode(asked[found - 40 : found + 30])}...".replace("\n", "\n  "))
    print(f"\n  {case.distances[0]:,} tokens later:{tokenizer.decode(asked[-16:])}".replace("\n", "\n  "), end="")

    cache = model.make_cache(max_length=options.length)
    started = time.perf_counter()
    answer = ""
    for piece in kvell.generate(model, asked, max_new_tokens=DIGITS + 1, tokenizer=tokenizer, cache=cache):
        if not answer:
            waited = time.perf_counter() - started
        print(piece.text, end="", flush=True)
        answer += piece.text
    hidden = tokenizer.decode(case.tokens[start:]).strip()
    right = answer.strip().startswith(hidden)

    plain = TrainingConfig.read(HERE / "mini-gqa.yaml").model
    held, baseline = (kvell.plan(config, cache.lengths[0]).cache_bytes for config in (model.config, plain))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("hidden", hidden)
    table.add_row("answered", f"{answer.strip()[: len(hidden)]}  ({'right' if right else 'WRONG'})")
    table.add_row("time to the first digit", f"{waited:.1f} s")
    table.add_row("cache in bf16", decimal(held))
    table.add_row("a plain model's", f"{decimal(baseline)}  ({baseline / held:.1f} x)")
    print("\n")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    try:
        main()
    except kvell.KvellError as error:
        sys.exit(f"error: {error}")
