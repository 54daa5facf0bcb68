"""Whether two checkouts compute the same numbers, to the bit: for a change of structure that may change none.

    python tests/compare_checkouts.py BEFORE AFTER [--quick]

Both run the probes of this file, each with its own package and its own test models: logits and gradients of every
model of pairwise.py and small_models.py, whole, in chunks, ragged, rewound, in fp32 and bf16, by references, fast and
compiled; kvell-mini on 16,384 tokens; the losses of 50 training steps by each optimizer; every byte that is saved;
every figure that is planned or inspected. What differs is printed, and the exit code is then 1.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

CONTEXTS = (1000, 131072)
FORMATS = ("float32", "bfloat16", "fp8", "released")
CHANGES = ("no-sharing", "no-windows", "no-compression", "mha", "gqa", "plain")
Found = Iterator[tuple[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true", help="only models, files and plans, without training")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(dict(probes(arguments.quick))))
        return 0
    if len(arguments.checkouts) != 2:
        parser.error("two checkouts are compared: BEFORE AFTER")
    before, after = (_probed(checkout.resolve(), arguments.quick) for checkout in arguments.checkouts)
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in differing:
        print(f"{name}: {before.get(name, 'absent')} before, {after.get(name, 'absent')} after")
    print(f"{len({**before, **after}) - len(differing)} figures are the same, {len(differing)} differ")
    return 1 if differing else 0


def _probed(checkout: Path, quick: bool) -> dict[str, str]:
    """What a checkout's own code answers."""
    paths = os.pathsep.join(str(checkout / folder) for folder in ("src", "tests", ""))
    command = [sys.executable, __file__, "--probe", *(["--quick"] if quick else [])]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    answered: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answered


def probes(quick: bool) -> Found:
    import torch

    torch.set_num_threads(1)
    yield from _models()
    yield from _plans()
    yield from _bundled(1024 if quick else 16384)
    if not quick:
        yield from _training()


def _models() -> Found:
    import pairwise
    import small_models
    import torch

    from kvell import Cache, Decoder, kernels

    kinds = ("deepseek_v4", "zaya", "gemma4")
    configs = pairwise.configs() | {kind: small_models.model_like(kind) for kind in kinds}
    configs["mixed"] = small_models.MIXED
    for number, (name, config) in enumerate(configs.items()):
        label = f"model {number} ({name})"
        tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(number))
        for dtype in (torch.float32, torch.bfloat16):
            model = _filled(Decoder(config)).to(dtype).eval()
            for version in ("fast", "reference"):
                with torch.no_grad(), kernels.use(version):
                    yield f"{label}: {dtype}, {version}", digest(model(tokens))
                    yield f"{label}: {dtype}, {version}, last", digest(model(tokens, last_only=True))
            cache = model.make_cache(2, max_rewind=4)
            parts = [model(tokens[:, start : start + 7], cache=cache) for start in range(0, 28, 7)]
            cache.rewind(3)
            parts += [model(tokens[:, at : at + 1], cache=cache) for at in range(25, 30)]
            yield f"{label}: {dtype}, chunks, rewound and decoded", digest(*parts)
            both = Cache.merge([cache, model.make_cache(1, max_rewind=4)])
            ragged = model(tokens[:1, :12], cache=both, counts=[3, 1, 8])
            yield f"{label}: {dtype}, ragged", digest(ragged)
            yield f"{label}: {dtype}, bytes held", f"{both.nbytes} of {both.allocated_nbytes}"
        model = _filled(Decoder(config)).train()
        model(tokens).logsumexp(-1).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        yield f"{label}: gradients", digest(*(gradients[name] for name in sorted(gradients)))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_bytes=20_000)
            yield from _files(f"{label}: saved", Path(folder))


def _plans() -> Found:
    import kvell
    from kvell.families import builtin_names
    from kvell.planning.references import REFERENCES

    for name in [*builtin_names(), *REFERENCES]:
        yield f"inspect {name}", _printed(["inspect", name, "--json"]) if name not in REFERENCES else ""
        for context in CONTEXTS:
            for form in FORMATS:
                for batch in (1, 7):
                    label = f"plan {name} of {batch} x {context} in {form}"
                    try:
                        yield label, digest_text(kvell.plan(name, context, batch, form).to_json())
                    except kvell.InputError as error:
                        yield label, str(error)
            if name not in REFERENCES:
                asked = [part for change in CHANGES for part in ("--what-if", change)]
                yield f"what if {name} at {context}", _printed(["plan", name, "--context", str(context), *asked])


def _bundled(length: int) -> Found:
    import torch

    import kvell
    from kvell.bundled import bundled_model_path

    folder = bundled_model_path()
    tokenizer = kvell.Tokenizer.from_pretrained(folder)
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text() for name in ("argparse", "ast", "typing", "inspect"))
    ids = torch.tensor([tokenizer.encode(text)[:length]])
    for dtype in (torch.float32, torch.bfloat16):
        model = kvell.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            logits = model(ids)
            cache = model.make_cache(max_length=length + 16)
            model(ids[:, :-1], cache=cache, last_only=True)
            decoded = model(ids[:, -1:], cache=cache)
        yield f"kvell-mini on {length} tokens in {dtype}", digest(logits, decoded)
    with tempfile.TemporaryDirectory() as out:
        kvell.from_pretrained(folder).save_pretrained(out)
        yield from _files("kvell-mini saved", Path(out))


def _training() -> Found:
    import test_training

    for kind in ("adamw", "muon"):
        with tempfile.TemporaryDirectory() as folder:
            texts = Path(folder) / "texts"
            texts.mkdir()
            library = Path(sysconfig.get_path("stdlib"))
            for name in ("bisect", "cmd", "colorsys", "copy", "fnmatch", "glob", "heapq", "hmac"):
                (texts / f"{name}.txt").write_bytes((library / f"{name}.py").read_bytes())
            stages = [{"steps": 50, "length": 128, "tokens": 512, "micro_batches": 2}]
            values = test_training.run_values(texts, Path(folder) / "run", stages=stages, optimizer={"kind": kind})
            file = test_training.config_file(Path(folder) / "config", values)
            _printed(["train", str(file)])
            yield f"50 training steps by {kind}", digest_text(json.dumps(test_training.losses(Path(folder) / "run")))
            yield f"the model trained by {kind}", digest_file(Path(folder) / "run" / "model.safetensors")


def _filled(model: Any) -> Any:
    """Weights that go by their names alone, so that the order in which modules are built changes nothing."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_tensors():
            if tensor.is_floating_point():
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                spread = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.15
                tensor.copy_(spread if tensor.dim() > 1 else 1 + spread)
    return model


def _printed(arguments: list[str]) -> str:
    """What a command prints, by its digest."""
    from kvell.cli import main as kvell_main

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        try:
            kvell_main(arguments)
        except SystemExit as ended:
            printed.write(f"exit {ended.code}")
    return digest_text(printed.getvalue())


def _files(label: str, folder: Path) -> Found:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            yield f"{label} {file.name}", digest_file(file)


def digest(*tensors: Any) -> str:
    """Of the values' bits, shapes and dtypes."""
    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
