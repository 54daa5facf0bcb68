"""Model folders with something wrong in them, drawn by a seed: each loads and generates, or is refused in one line.

    python -m tests.mutations --count 1500 --seed 0

A case is a small folder of some family with one to three mutations: of a file's bytes, of the headers and numbers of
its tensors, of the index, of any value in any JSON file, of which files there are. It passes if the model loads,
computes logits, encodes a text and generates two tokens, or if a KvellError of one line comes out of any of these
steps. Any other exception, a message of several lines, and more than its share of time or memory are failures,
reported with their seed, by which `--seed N --count 1` runs the case again.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import kvell
from kvell.checkpoint.reading import INDEX, SINGLE
from kvell.families import parse_config
from kvell.generation import Tokenizer

CONFIG = "config.json"
SECONDS = 10
MEGABYTES = 300
LONGEST_MESSAGE = 4000
# The largest number that takes the place of another.
LARGEST_COUNT = 10**9

# The folders that are mutated: every family, small, in the spelling of released files.

VOCAB = 264
COMMON = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 128}
TOKENS = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4 = {
    "model_type": "gemma4_text",
    **COMMON,
    **TOKENS,
    "num_hidden_layers": 3,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCAB,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 1,
    "layer_types": [SLIDING, FULL, FULL],
    "sliding_window": 5,
    "final_logit_softcapping": 30.0,
}
LAGUNA = {
    "model_type": "laguna",
    **COMMON,
    **TOKENS,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_attention_heads_per_layer": [4, 2],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": [FULL, SLIDING],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 5,
    "gating": "per-head",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "rope_parameters": {
        FULL: {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
        },
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
}
ZAYA = {
    "model_type": "zaya",
    **COMMON,
    **TOKENS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 3,
    "moe_intermediate_size": 8,
    "router_hidden_size": 6,
    "tie_word_embeddings": True,
}
DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    **COMMON,
    **TOKENS,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 8,
    "o_groups": 2,
    "o_lora_rank": 4,
    "index_n_heads": 2,
    "index_head_dim": 4,
    "index_topk": 2,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "num_hash_layers": 1,
    "sliding_window": 4,
    "compress_ratios": [0, 4, 128, 0],
    "hc_mult": 2,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32},
}


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes, and four tokens with a meaning of their own."""
    specials = ["<pad>", "<bos>", "<eos>", "<end_of_turn>"]
    names = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [("a", "b")][:0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return backend


def with_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections in eight bits, with scales in fp32."""
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_a_proj.weight", "o_b_proj.weight")):
            quantised[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
            tensor = tensor.to(torch.float8_e4m3fn)
        quantised[name] = tensor
    return quantised


def multimodal(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    inner = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    return inner | {"model.vision_tower.norm.weight": torch.ones(3)}


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mlx's layout of experts."""
    single = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name and "bias" not in name}
    result = {f"language_model.{name}": tensor for name, tensor in tensors.items() if name not in single}
    for name in single:
        layer, _, rest = name.partition(".mlp.experts.")
        expert, _, leaf = rest.partition(".")
        if expert == "0":
            matrices = [single[f"{layer}.mlp.experts.{other}.{leaf}"] for other in range(4)]
            result[f"language_model.{layer}.mlp.switch_mlp.{leaf}"] = torch.stack(matrices)
    return result


def write_bases(root: Path) -> list[Path]:
    """Every family's folder, in one file and in shards."""
    known: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
        "gemma4": (GEMMA4, dict),
        "gemma4-multimodal": (GEMMA4, multimodal),
        "laguna": (LAGUNA, dict),
        "laguna-mlx": (LAGUNA, stacked),
        "zaya": (ZAYA, dict),
        "deepseek_v4": (DEEPSEEK_V4, dict),
        "deepseek_v4-fp8": (DEEPSEEK_V4, with_fp8),
        "kvell": (LAGUNA, dict),
    }
    for name, (released, change) in known.items():
        config = parse_config(released)
        if name == "kvell":
            config = kvell.ModelConfig.from_dict(config.model_dump() | {"family": None})
        torch.manual_seed(0)
        kvell.Decoder(config).save_pretrained(root / name)
        tensors = change(load_file(root / name / SINGLE))
        if name != "kvell":
            outer = {"model_type": "gemma4", "text_config": released, "vision_config": {}}
            (root / name / CONFIG).write_text(json.dumps(outer if name == "gemma4-multimodal" else released))
        for count in (1, 3):
            folder = root / f"{name}-{count}"
            folder.mkdir()
            shutil.copy(root / name / CONFIG, folder)
            weight_map = {}
            for shard in range(count):
                file = folder / (SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors")
                here = {one: tensors[one] for one in sorted(tensors)[shard::count]}
                save_file(here, file, {"format": "pt"})
                weight_map |= dict.fromkeys(here, file.name)
            if count > 1:
                (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
            tokenizer().save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<bos>"}))
            settings = {"eos_token_id": [2, 3], "suppress_tokens": [9], "temperature": 0.7, "top_k": 5, "top_p": 0.9}
            (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
        shutil.rmtree(root / name)
    return sorted(root.iterdir())


# Values that take the place of another in JSON. A Raw is written as it stands: what json.dumps would not write.


@dataclass(frozen=True)
class Raw:
    text: str


RAW = [
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e99999"),
    Raw("-0"),
    Raw("9" * 5000),
    Raw("[" * 300 + "]" * 300),
    Raw('{"a":' * 20_000 + "1" + "}" * 20_000),
    Raw("[" * 200_000),
    Raw('"\\ud800"'),
    Raw("{'a': 1}"),
]
PLAIN: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    LARGEST_COUNT,
    0.5,
    -0.5,
    1e-30,
    1e300,
    2.0,
    "",
    "1",
    "x",
]
PLAIN += [[], {}, [1], [None], ["x"], [[1]], {"a": 1}, "line\nline", "\x00", "a" * 10_000, "../x", "ü", [0] * 1000]


def any_value(draw: random.Random, old: Any) -> Any:
    """Something else, or something a little different."""
    try:
        near = little_different(old)
    except (OverflowError, ValueError):  # infinity as an integer, an integer of thousands of digits as text
        near = []
    return draw.choice(draw.choice([near or PLAIN, PLAIN, RAW]))


def little_different(old: Any) -> list[Any]:
    near: list[Any] = []
    if isinstance(old, bool):
        near = [not old, int(old), str(old)]
    elif isinstance(old, int):
        near = [old + 1, old - 1, -old, old * 2, float(old), str(old), [old], min(old * 100, LARGEST_COUNT)]
    elif isinstance(old, float):
        near = [-old, old * 2, old / 1e6, old * 1e6, int(old), str(old)]
    elif isinstance(old, str):
        near = [old.upper(), old + "x", old[:-1], old + "\n", [old], None, 1]
    elif isinstance(old, list):
        near = [old[:-1], old + old[:1], old[::-1], old * 2, old[:1], dict(enumerate(map(str, old)))]
    elif isinstance(old, dict):
        near = [list(old.items()), dict(list(old.items())[1:]), {**old, "new": 1}, {"inner": old}, list(old)]
    return near


def random_place(draw: random.Random, values: Any) -> tuple[Any, Any]:
    """A dict or list within a JSON value, and one of its keys."""
    while True:
        key = draw.choice(list(values)) if isinstance(values, dict) else draw.randrange(len(values))
        inner = values[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            return values, key
        values = inner


def dumps(values: Any) -> str:
    raws: list[str] = []

    def mark(one: Any) -> str:
        raws.append(one.text)
        return f"@raw{len(raws) - 1}@"

    text = json.dumps(values, default=mark)
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


def change_json(draw: random.Random, file: Path) -> str:
    """One value of a JSON file replaced, dropped, moved to another name, or stated twice."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict | list) or not values:  # as an earlier mutation may have left it
        return change_bytes(draw, file)
    where, key = random_place(draw, values)
    what = draw.choice(["replace", "replace", "replace", "replace", "drop", "rename", "add", "twice"])
    if what == "drop":
        del where[key]
    elif what == "rename" and isinstance(where, dict):
        where[draw.choice([key + "_", key.upper(), "", "tie_word_embeddings", "rope_theta"])] = where.pop(key)
    elif what == "add" and isinstance(where, dict):
        where[draw.choice(["quantization_config", "unknown", "head_dim", "truncation"])] = any_value(draw, 1)
    elif what == "twice" and isinstance(where, dict):
        text = dumps(values)
        file.write_text(text[:-1] + ", " + dumps({key: any_value(draw, where[key])})[1:] if text != "{}" else "{}")
        return f"{file.name}: {key} twice"
    else:
        where[key] = any_value(draw, where[key])
    try:
        file.write_text(dumps(values))
    except UnicodeEncodeError:
        file.write_bytes(b"\xff")
    now = str(where.get(key))[:60] if isinstance(where, dict) else "..."
    return f"{file.name}: {what} {str(key)[:40]!r}, now {now!r}"


def change_bytes(draw: random.Random, file: Path) -> str:
    """Bytes flipped, cut off, put in or put behind."""
    content = bytearray(file.read_bytes())
    what = draw.choice(["flip", "flip near the beginning", "cut", "cut", "add", "insert", "empty", "text", "zeros"])
    if what.startswith("flip") and content:
        reach = min(len(content), 300) if "beginning" in what else len(content)
        for _ in range(draw.choice([1, 1, 4, 50])):
            content[draw.randrange(reach)] = draw.randrange(256)
    elif what == "cut":
        del content[draw.randrange(len(content) + 1) :]
    elif what == "add":
        content += draw.randbytes(draw.choice([1, 8, 1000]))
    elif what == "insert":
        place = draw.randrange(len(content) + 1)
        content[place:place] = draw.randbytes(draw.choice([1, 3, 64]))
    elif what == "zeros":
        content[:] = bytes(len(content))
    elif what == "empty":
        content.clear()
    else:
        content[:] = draw.choice([b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"null", b"[]", b"{}", b"1", b'"x"'])
    replace_file(file, bytes(content))
    return f"{file.name}: {what}"


def replace_file(file: Path, content: bytes) -> None:
    """A new one, as the old one may be mapped into memory."""
    if file.is_file() or file.is_symlink():
        file.unlink()
    file.write_bytes(content)


# Safetensors: the length of the header (u64), the header, the numbers.

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3"]
DTYPES += ["F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "", "X"]


def change_header(draw: random.Random, file: Path) -> str:
    """The entry of a tensor, or the header's length, where the numbers stay."""
    try:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        name = draw.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        shape, offsets = list(entry["shape"]), list(entry["data_offsets"])
    except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError):
        return change_bytes(draw, file)
    what = draw.choice(["dtype", "shape", "shape", "offsets", "name", "drop", "metadata", "length", "twice", "value"])
    if what == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = draw.choice(
            [shape[::-1], [*shape, 1], shape[1:], [0], [], [-1], [2**62, 4], [2**31], [1.5], [shape], None]
        )
    elif what == "offsets":
        start, end = offsets
        entry["data_offsets"] = draw.choice(
            [
                [start + 1, end + 1],
                [start, end + 4],
                [0, end - start],
                [end, start],
                [start],
                [start, 2**63],
                [-4, end],
            ]
        )
    elif what == "name":
        new = draw.choice(["", "x\ny", "\x00", "module." + name, "_orig_mod." + name, name + ".default", "ü" * 300])
        header[new] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "metadata":
        header["__metadata__"] = draw.choice([{}, {"format": "mlx"}, {"format": 1}, None, [], "x", {"a": {"b": "c"}}])
    elif what == "value":
        header[name] = any_value(draw, entry)
    text = dumps(header).encode("utf-8", "surrogatepass")
    if what == "twice":
        text = text[:-1] + b"," + dumps({name: entry}).encode()[1:]
    size = draw.choice([0, 1, length - 1, 2**31, 2**63, 2**64 - 1]) if what == "length" else len(text)
    replace_file(file, size.to_bytes(8, "little") + text + content[8 + length :])
    return f"{file.name}: header, {what} of {name}"


def change_tensors(draw: random.Random, file: Path) -> str:
    """A tensor of a whole file: another name, shape, dtype or numbers, one more or one fewer."""
    try:
        tensors = load_file(file)
        name = draw.choice(list(tensors))
    except Exception:  # a file that is damaged already
        return change_bytes(draw, file)
    tensor = tensors[name]
    what = draw.choice(["rename", "prefix", "drop", "add", "cast", "shape", "numbers", "transpose", "repeat", "head"])
    if what == "rename":
        tensors[name.replace(".", "_", 1)] = tensors.pop(name)
    elif what == "prefix":
        prefix = draw.choice(["module.", "_orig_mod.", "base_model.model.", "model.", "language_model.", "x."])
        tensors = {prefix + one: value for one, value in tensors.items()}
    elif what == "drop":
        del tensors[name]
    elif what == "add":
        tensors[draw.choice([name + "_scale", name + "_scale_inv", "x", "mtp.0.x", "vision_tower.x"])] = torch.ones(2)
    elif what == "cast":
        kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint8]
        tensors[name] = tensor.to(draw.choice([*kinds, torch.float8_e4m3fn, torch.float8_e5m2]))
    elif what == "shape":
        tensors[name] = draw.choice([tensor.flatten(), tensor[None], tensor[:0], torch.ones(())])
    elif what == "numbers":
        tensors[name] = torch.full(tensor.shape, draw.choice([0.0, -1.0, 1e30, torch.nan, torch.inf])).to(
            tensor.dtype
        )
    elif what == "transpose":
        tensors[name] = tensor.transpose(0, -1) if tensor.dim() else tensor
    elif what == "repeat":
        tensors[name] = torch.cat([tensor, tensor]) if tensor.dim() else tensor
    else:
        tensors["lm_head.weight"] = draw.choice([torch.ones(VOCAB, 16), torch.ones(3), tensor])
    replace_file(file, b"")
    save_file({one: value.contiguous().clone() for one, value in tensors.items()}, file)
    return f"{file.name}: {what} of {name}"


def change_index(draw: random.Random, file: Path) -> str:
    """Where an index places a tensor."""
    try:
        values = json.loads(file.read_text("utf-8"))
        weight_map = values["weight_map"]
        name = draw.choice(list(weight_map))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return change_bytes(draw, file)
    places = ["../x.safetensors", "/etc/passwd", "", ".", "..", "x", "a/b", "\x00", "x" * 300, "config.json", "ü\n"]
    place = draw.choice([*places, *weight_map.values(), str(file.with_name("model-00001-of-00002.safetensors"))])
    for one in weight_map if draw.random() < 0.3 else [name]:
        weight_map[one] = place
    if draw.random() < 0.2:
        weight_map["one too many"] = weight_map.pop(name)
    file.write_text(json.dumps(values))
    return f"{file.name}: {name} in {place[:60]!r}"


# Which files there are.


def change_files(draw: random.Random, file: Path) -> str:
    """A file gone, doubled, or of another kind."""
    what = draw.choice(["remove", "folder", "swap", "copy", "single", "link", "dangling", "loop", "device", "pipe"])
    content = file.read_bytes()
    if what == "single":
        replace_file(file.parent / SINGLE, content)
    elif what == "copy":
        replace_file(
            file.parent / draw.choice(["model-00009-of-00009.safetensors", "x.json", "adapter.bin"]), content
        )
    elif what == "swap":
        replace_file(file, draw.choice(regular_files(file.parent)).read_bytes())
    else:
        file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "link":
        real = file.parent.parent / file.name
        real.write_bytes(content)
        file.symlink_to(draw.choice([real, Path("..") / real.name]))
    elif what == "dangling":
        file.symlink_to("nowhere")
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "device":
        file.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/etc/passwd", ".", "/"]))
    elif what == "pipe":
        os.mkfifo(file)
    return f"{file.name}: {what}"


def regular_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.is_symlink())


def mutate(draw: random.Random, folder: Path) -> str:
    """One mutation of a folder, in words."""
    files = regular_files(folder)
    weights = [file for file in files if file.suffix == ".safetensors"] or files
    settings = [file for file in files if file.suffix == ".json"] or files
    index, config = folder / INDEX, folder / CONFIG
    kind = draw.choices(["config", "json", "header", "tensors", "index", "bytes", "files"], [3, 4, 3, 3, 1, 2, 2])[0]
    if kind == "config" and config in files:
        return change_json(draw, config)
    if kind == "json":
        return change_json(draw, draw.choice(settings))
    if kind == "header":
        return change_header(draw, draw.choice(weights))
    if kind == "tensors":
        return change_tensors(draw, draw.choice(weights))
    if kind == "index" and index in files:
        return change_index(draw, index)
    if kind == "bytes":
        return change_bytes(draw, draw.choice(files))
    return change_files(draw, draw.choice(files))


# Running a case.


@dataclass(frozen=True)
class Outcome:
    """`result`: "loads", "refused" or "fails"; what was mutated, and the message or the traceback."""

    seed: int
    mutations: str
    result: str
    message: str = ""


class TooSlowError(Exception):
    pass


@contextmanager
def bounded(seconds: int, megabytes: int) -> Iterator[None]:
    """MemoryError or torch's own error for more memory than that, TooSlowError for more time."""

    def stop(signum: int, frame: Any) -> None:
        raise TooSlowError(f"more than {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def use(folder: Path) -> None:
    """All that reads a model's folder, and the model."""
    model = kvell.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 6]]) % model.config.vocab_size)
    encoder = Tokenizer.from_pretrained(folder)
    ids = encoder.encode("a prompt of ten words")
    list(kvell.generate(model, ids, max_new_tokens=2, tokenizer=encoder))


def run(seed: int, bases: list[Path], place: Path) -> Outcome:
    """One case, in a folder of its own at `place`, which is gone afterwards."""
    draw = random.Random(seed)
    base = draw.choice(bases)
    folder = place / f"case-{seed}" / base.name
    shutil.copytree(base, folder)
    done = [mutate(draw, folder) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    mutations = f"{base.name}: {'; '.join(done)}"
    try:
        with warnings.catch_warnings(), bounded(SECONDS, MEGABYTES):
            warnings.simplefilter("ignore")
            use(folder)
    except kvell.KvellError as error:
        message = str(error)
        fits = len(message.splitlines()) == 1 and len(message) <= LONGEST_MESSAGE
        return Outcome(seed, mutations, "refused" if fits else "fails", message[:LONGEST_MESSAGE])
    except KeyboardInterrupt:
        raise
    except BaseException:  # the tokenizer's library panics with what is no Exception
        return Outcome(seed, mutations, "fails", "".join(traceback.format_exc()))
    finally:
        shutil.rmtree(place / f"case-{seed}")
    return Outcome(seed, mutations, "loads")


def run_all(seeds: range) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as place:
        bases = write_bases(Path(place) / "bases")
        for base in bases:
            use(base)
        for seed in seeds:
            yield run(seed, bases, Path(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for outcome in run_all(range(options.seed, options.seed + options.count)):
        counts[outcome.result] += 1
        if options.verbose or outcome.result == "fails":
            print(f"{outcome.seed}: {outcome.result}: {outcome.mutations}\n    {outcome.message}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))
    raise SystemExit(1 if counts["fails"] else 0)


if __name__ == "__main__":
    main()
