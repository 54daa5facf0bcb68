"""Hides a number in a long real text, asks the bundled model for it, and shows what its cache held.

    python examples/passkey.py                     # 16,384 tokens; text, number and place are drawn anew
    python examples/passkey.py --length 8192 --seed 3

The text is modules of the standard library that the model was not trained on, one after another, drawn as for the
figures of its card.
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import kvell
from kvell.bundled import bundled_model_path
from kvell.training.batches import drawn
from kvell.training.corpus import read_corpus
from kvell.training.settings import TrainingConfig
from kvell.training.tasks import Passkey
from kvell.training.tokens import read_tokenizer, tokenise

HERE = Path(__file__).parent
DIGITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Hide a number in a long text and ask for it.")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the prompt and its answer together")
    parser.add_argument("--seed", type=int, help="draws text, number and place; another every time without it")
    options = parser.parse_args()
    seed = random.randrange(1000) if options.seed is None else options.seed

    recipe = TrainingConfig.read(HERE / "mini.yaml")
    folder = bundled_model_path()
    tokenizer, model = kvell.Tokenizer.from_pretrained(folder), kvell.from_pretrained(folder, dtype=torch.float32)
    if options.length > model.config.max_positions:
        raise kvell.InputError(
            f"--length {options.length} is more than the model's {model.config.max_positions} positions"
        )
    held_out = read_corpus(recipe.data).held_out
    (eos,) = model.config.eos_token_ids
    documents = tokenise(read_tokenizer(str(folder)), held_out, model.config.vocab_size, eos)
    bos = int(documents[0].ids[0])
    case = drawn(
        Passkey(), options.length, documents, lambda piece: tokenizer.encode(piece)[1:], bos, random.Random(seed)
    )
    start, asked = case.scored[0], case.tokens[: case.scored[0]]
    found = start - case.distances[0]

    print(f"{start:,} tokens of the standard library, which the model has never seen (seed {seed})\n")
    print(f"  ...{tokenizer.decode(asked[found - 40 : found + 30])}...".replace("\n", "\n  "))
    print(f"\n  {case.distances[0]:,} tokens later:{tokenizer.decode(asked[-16:])}".replace("\n", "\n  "), end="")

    # As in the model's training: a case has a BOS of its own before that of the document that its text begins with.
    warnings.filterwarnings("ignore", message="the prompt begins with BOS")
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
