"""Trains the bundled model on the Python standard library's own sources, on a CPU, in under half an hour.

    python examples/train_bundled.py --minutes 25 --out runs/bundled
    python examples/train_bundled.py --steps 1000 --out runs/bundled

The model uses together what Kvell is about: fewer query heads in full than in sliding layers, sliding windows, later
layers that read earlier layers' keys and values, and per-layer embeddings. With --steps the result follows from the
options, the threads and the machine's arithmetic alone; with --minutes the clock decides how many steps there are.
"""

import argparse
import hashlib
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

import kvell
import kvell.checkpoint  # now, not after half an hour: what is missing must show at the start

VOCABULARY = 2048
BOS, EOS = "<|bos|>", "<|eos|>"
# Short pieces first, where a token costs least; then long ones, so that far positions have been seen.
SHORT, LONG, LONG_SHARE = 512, 4096, 0.18
TOKENS_PER_STEP = {SHORT: 2048, LONG: 4096}
# Tests are not the code one wants continued; the rest are generated tables, and the build's own settings.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
ALWAYS_HELD_OUT = {"argparse.py"}
POSITIONS = [0, 256, 1024, 4096, 8192, 16384, 32768]

SLIDING_ROTARY = {"kind": "default", "theta": 10_000.0}
# Only pairs that turn at least once in some 600 tokens: training has seen all of their angles, at any distance.
FULL_ROTARY = {"kind": "proportional", "theta": 10_000.0, "fraction": 0.5}


def layer(num_heads: int, window: int | None, kv_source: int | None = None) -> dict[str, object]:
    attention = {
        "num_heads": num_heads,
        "num_kv_heads": 2,
        "head_dim": 32,
        "sliding_window": window,
        "rotary": FULL_ROTARY if window is None else SLIDING_ROTARY,
        "kv_source": kv_source,
    }
    return {"attention": attention, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 384}}


def make_config(bos: int, eos: int) -> kvell.ModelConfig:
    return kvell.ModelConfig.from_dict(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "max_positions": 32768,
            "layers": [
                layer(6, window=128),
                layer(6, window=128),
                layer(4, window=None),
                layer(6, window=128, kv_source=1),
                layer(6, window=128, kv_source=1),
                layer(4, window=None, kv_source=2),
            ],
            "per_layer_embedding": {"width": 32},
            "embedding_scale": 128**0.5,
            "initializer_range": 0.05,
            "tied_head": True,
            "bos_token_id": bos,
            "eos_token_ids": [eos],
        }
    )


def read_sources() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library's files by relative path: those to train on, and those held out."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, undecodable = {}, {}, []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if LEFT_OUT & set(path.parts) or path.name.startswith("_sysconfigdata"):
            continue
        name = path.as_posix()
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable.append(name)
            continue
        hashed = hashlib.sha256(name.encode()).digest()[0]
        if name in ALWAYS_HELD_OUT or hashed < 13:  # about one file in twenty
            held_out[name] = text
        elif text:
            train[name] = text
    print(f"left out as not UTF-8: {len(undecodable)} {undecodable}")
    for label, texts in (("training", train), ("held-out", held_out)):
        print(f"{label}: {len(texts)} files, {sum(len(t.encode()) for t in texts.values())} bytes")
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def packed_batches(documents: list[list[int]], length: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Endless steps of pieces that make TOKENS_PER_STEP[length] inputs together.

    A piece is at most `length` tokens of one document, and the model sees no other piece beside it: nothing leaks
    between documents, nothing is padded, and short files and the ends of long ones are used as they are. Documents
    are cut at other places in every epoch. A piece holds one token more than its inputs, the last one's target.
    """
    pieces: list[list[int]] = []
    while True:
        step: list[list[int]] = []
        room = TOKENS_PER_STEP[length]
        while room:
            if not pieces:
                for document in documents:
                    cuts = range(rng.randrange(length) + 1 - length, len(document) - 1, length)
                    pieces += [document[max(cut, 0) : cut + length + 1] for cut in cuts]
                rng.shuffle(pieces)
            piece = pieces.pop()
            if len(piece) - 1 > room:
                pieces.append(piece[room:])
            step.append(piece[: room + 1])
            room -= len(step[-1]) - 1
        yield step


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon works in bfloat16, which a CPU without such instructions emulates; this one works in fp32, on all
    matrices of one shape at once.
    """

    def __init__(self, matrices: list[Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        self.stacks = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(stack), *stack[0].shape) for stack in self.stacks]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        lr: float = self.param_groups[0]["lr"]
        for stack, momentum in zip(self.stacks, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in stack if matrix.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95))
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, change in zip(stack, update, strict=True):
                matrix.mul_(1 - 0.1 * lr).add_(change, alpha=-lr * scale)


def orthogonal(x: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices."""
    wide: Tensor = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


@torch.no_grad()
def fresh_model(config: kvell.ModelConfig) -> kvell.Decoder:
    """A model whose blocks add nothing, or little, to the residual at first."""
    model = kvell.Decoder(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif name.endswith("per_layer_embedding.norm.weight"):
            parameter.fill_(0.1)
    return model


def train(
    model: kvell.Decoder, documents: list[list[int]], steps: int | None, minutes: float, seed: int
) -> dict[str, float]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.startswith(("embedding", "per_layer_inputs.table"))
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [(Muon(matrices, lr=0.02), 0.02), (adam, 0.005)]
    batches = {n: packed_batches(documents, n, random.Random(f"{seed} {n}")) for n in (SHORT, LONG)}
    started = shown = time.perf_counter()
    step, seen, recent, progress = 0, 0, math.log(VOCABULARY), 0.0
    while progress < 1:
        rate = min(1.0, (step + 1) / 40, 0.02 + 1.6 * (1 - progress))
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * rate
        pieces = next(batches[SHORT if progress < 1 - LONG_SHARE else LONG])
        inputs = torch.tensor([token for piece in pieces for token in piece[:-1]])
        targets = torch.tensor([token for piece in pieces for token in piece[1:]])
        logits = model(inputs[None], counts=[len(piece) - 1 for piece in pieces])[0]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seen += len(inputs)
        recent += (loss.item() - recent) * max(0.02, 1 / step)
        now = time.perf_counter()
        progress = step / steps if steps else (now - started) / (60 * minutes)
        if now - shown > 20 or progress >= 1:
            shown, spent = now, now - started
            left = spent * (1 / progress - 1) / 60
            print(f"step {step}  loss {recent:.3f}  {seen / spent:.0f} tokens/s  {left:.1f} min left", flush=True)
    return {"steps": step, "tokens": seen, "minutes": (time.perf_counter() - started) / 60}


@torch.no_grad()
def nats_of(model: kvell.Decoder, ids: list[int]) -> Tensor:
    """What every token but the first costs, given all before it."""
    tokens = torch.tensor(ids)
    cache = model.make_cache()
    chunks = []
    for inputs, targets in zip(tokens[:-1].split(2048), tokens[1:].split(2048), strict=True):
        logits = model(inputs[None], cache=cache)[0].float()
        chunks.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(chunks).double()


def bits_per_byte(model: kvell.Decoder, tokenizer: Tokenizer, texts: dict[str, str]) -> float:
    """Over whole files; also prints the loss by position."""
    nats = {name: nats_of(model, tokenizer.encode(text).ids) for name, text in texts.items() if text}
    for low, high in pairwise(POSITIONS):
        span = torch.cat([costs[low:high] for costs in nats.values()])
        print(f"positions {low} to {high}: {span.mean():.3f} nats per token ({len(span)} tokens)")
    for name in ALWAYS_HELD_OUT:
        show_file(model, tokenizer, name, texts[name], nats[name])
    total = sum(costs.sum().item() for costs in nats.values())
    return total / math.log(2) / sum(len(text.encode()) for text in texts.values())


def show_file(model: kvell.Decoder, tokenizer: Tokenizer, name: str, text: str, nats: Tensor) -> None:
    """One file's bits per byte, and whether a token far from its start costs more for all that stands before it."""
    ids = tokenizer.encode(text).ids
    for count in (4000, len(ids)):
        bits = nats[: count - 1].sum().item() / math.log(2) / len(tokenizer.decode(ids[:count]).encode())
        print(f"{name}, first {count} tokens: {bits:.3f} bits per byte")
    for first in range(1024, len(ids) - 1024, 4096):
        whole = nats[first : first + 1024].mean()
        near = nats_of(model, ids[first - 1024 : first + 1025])[1024:].mean()
        print(f"{name}, tokens {first} to {first + 1024}: {whole:.3f} nats, {near:.3f} seeing only 1024 to 2048")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="wall time of the training itself")
    parser.add_argument("--steps", type=int, help="train for so many steps, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"), help="the model's directory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, held_out = read_sources()
    tokenizer = train_tokenizer(list(training.values()))
    bos, eos = (tokenizer.get_vocab()[token] for token in (BOS, EOS))
    documents = [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(list(training.values()))]
    model = fresh_model(make_config(bos, eos))
    count = sum(len(document) for document in documents)
    print(f"{model.num_parameters()} parameters, {len(documents)} documents of {count} tokens", flush=True)

    figures = train(model, documents, options.steps, options.minutes, options.seed)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save(str(options.out / ".tokenizer.json"))
    os.replace(options.out / ".tokenizer.json", options.out / "tokenizer.json")

    print(f"saved to {options.out}; what its bfloat16 weights give, in fp32 arithmetic:", flush=True)
    figures["held-out bits per byte"] = bits_per_byte(model.float(), tokenizer, held_out)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4g}" if isinstance(figure, float) else f"{name}: {figure}")


if __name__ == "__main__":
    main()
