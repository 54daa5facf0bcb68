"""llama.cpp beside Kvell, through llama-cpp-python, where that is installed: a llama of as many bytes of weights.

llama.cpp has no file of random weights of Gemma 4's shape, so a plain llama of the same width and as many bytes is
written (GGUF, bf16). What a token costs there is reading the weights, as here.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.memory import peak_resident_bytes
from benchmarks.processes import WorkerError, workers

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 1536, 6144, 8, 2, 32000
HEAD_WIDTH = WIDTH // HEADS


def why_not() -> str:
    """Why llama.cpp cannot be measured; empty where it can."""
    missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    return f"{' and '.join(missing)} cannot be imported" if missing else ""


def measure(weight_bytes: int, prompts: Sequence[int], decoded: int, folder: Path, threads: int) -> dict[str, Any]:
    """Medians of prefill by prompt and of a decoded token, in a process of its own."""
    with workers([("llama.cpp", "default")], threads) as sides:
        worker = sides["llama.cpp", "default"]
        path = folder / "llama.gguf"
        worker.call("write", path=str(path), weight_bytes=weight_bytes)
        found = worker.call("measure", path=str(path), prompts=list(prompts), decoded=decoded, threads=threads)
        if not isinstance(found, dict):
            raise WorkerError("llama.cpp gave no figures")
        return found


class LlamaCppSide:
    """Answers for llama.cpp; its calls are not those of the other sides."""

    def write(self, path: str, weight_bytes: int) -> None:
        import gguf
        import numpy as np

        matrices = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * HEAD_WIDTH, WIDTH),
            "attn_v": (KV_HEADS * HEAD_WIDTH, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }
        layer_bytes = 2 * sum(rows * columns for rows, columns in matrices.values())
        layers = max(1, round((weight_bytes - 2 * VOCABULARY * WIDTH) / layer_bytes))
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(4096)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(HEAD_WIDTH)
        writer.add_vocab_size(VOCABULARY)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        writer.add_tokenizer_model("no_vocab")
        generator = np.random.default_rng(0)

        def add(name: str, shape: tuple[int, int]) -> None:
            values = (generator.standard_normal(shape, dtype=np.float32) * 0.02).view(np.uint32) >> 16
            writer.add_tensor(name, values.astype(np.uint16).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

        ones = np.ones(WIDTH, dtype=np.float32)
        add("token_embd.weight", (VOCABULARY, WIDTH))
        writer.add_tensor("output_norm.weight", ones)
        for layer in range(layers):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
            writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
            for name, shape in matrices.items():
                add(f"blk.{layer}.{name}.weight", shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def measure(self, path: str, prompts: list[int], decoded: int, threads: int) -> dict[str, Any]:
        from statistics import median

        import llama_cpp
        import numpy as np

        start = perf_counter()
        model = llama_cpp.Llama(
            path,
            n_ctx=max(prompts) + decoded + 8,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        loaded = perf_counter() - start
        ids = np.random.default_rng(0).integers(1, VOCABULARY, max(prompts)).tolist()
        model.eval(ids[:32])
        found: dict[str, Any] = {"load": loaded, "prefill": {}}
        for tokens in prompts:
            taken = []
            for _ in range(3):
                model.reset()
                start = perf_counter()
                model.eval(ids[:tokens])
                taken.append(perf_counter() - start)
            found["prefill"][str(tokens)] = median(taken)
        taken = []
        for token in ids[: decoded + 2]:
            start = perf_counter()
            model.eval([token])
            taken.append(perf_counter() - start)
        return found | {"decode": median(taken[2:]), "peak_bytes": peak_resident_bytes()}
