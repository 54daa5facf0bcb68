"""Triton's kernels against their references, on outputs and gradients, and whole models that run on them.

Where there is no GPU they run in Triton's interpreter, which shows that the arithmetic is right, and are compiled for
one, which shows that a compiler takes them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import model_like
from strategies import VOCAB, random_model
from torch import Tensor

from kvell import Cache, Decoder, kernels
from kvell.errors import InputError
from kvell.kernels import choice, table
from kvell.kernels.attention import attention
from kvell.kernels.compressed import compressed_attention, pick
from kvell.kernels.compressor import pooled_entries
from kvell.kernels.convolution import convolved_heads
from kvell.kernels.hyper_connections import hyper_read, hyper_write
from kvell.kernels.rotation import rotate, rotate_last

needs_triton = pytest.mark.skipif(not choice.triton_installed(), reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT, BFLOAT = torch.float32, torch.bfloat16
# The released H100 and H200 give a block of threads 227 KiB.
SHARED_MEMORY = 227 * 1024


def randn(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def in_both(run: Callable[..., Any], *arguments: Any, **settings: Any) -> list[list[Tensor]]:
    """Triton's and the reference's outputs, and the gradients of all floating-point arguments that have one."""
    found = []
    for version in ("triton", "reference"):
        inputs = [
            argument.clone().requires_grad_()
            if isinstance(argument, Tensor) and argument.is_floating_point()
            else argument
            for argument in arguments
        ]
        with kernels.use(version):  # type: ignore[arg-type]
            outputs = run(*inputs, **settings)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(1)
        flows = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        wanted = [argument for argument in inputs if isinstance(argument, Tensor) and argument.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, flows, allow_unused=True)
        found.append([x.detach() for x in (*outputs, *gradients) if x is not None])
    return found


def assert_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Within the tolerance of the largest number of each tensor."""
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        size = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            mine, other, atol=tolerance * max(size, 1.0), rtol=0, msg=lambda m, n=number: f"tensor {n}: {m}"
        )


def tolerance_of(dtype: torch.dtype) -> float:
    return 2e-2 if dtype == BFLOAT else 1e-5


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "streams", "channels", "iterations", "dtype"),
    [
        (5, 4, 24, 20, FLOAT),
        (18, 3, 200, 3, FLOAT),
        (2, 1, 7, 1, FLOAT),
        (3, 2, 130, None, FLOAT),
        (2, 4, 1100, 2, BFLOAT),
        (0, 2, 8, 2, FLOAT),
    ],
)
def test_hyper_connections(
    tokens: int, streams: int, channels: int, iterations: int | None, dtype: torch.dtype
) -> None:
    numbers = streams * (2 + streams)
    h, weight = randn(tokens, streams, channels, dtype=dtype), randn(numbers, streams * channels)
    weight *= (streams * channels) ** -0.5
    base, scale = randn(numbers), randn(3)
    assert_alike(
        *in_both(hyper_read, h, weight, base, scale, iterations=iterations, eps=1e-6, norm_eps=1e-6),
        tolerance_of(dtype),
    )
    y, post, mix = randn(tokens, channels, dtype=dtype), randn(tokens, streams), randn(tokens, streams, streams)
    assert_alike(*in_both(hyper_write, h, y, post, mix), tolerance_of(dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("tokens", "channels"), [(70, 300), (128, 64)])
def test_hyper_connections_read_many_tokens_in_larger_blocks(
    tokens: int, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvell.kernels.triton import hyper_connections as in_triton

    monkeypatch.setattr(in_triton, "MANY", 60)
    h, weight = randn(tokens, 2, channels, dtype=dtype), randn(8, 2 * channels) * (2 * channels) ** -0.5
    base, scale = randn(8), randn(3)
    ours, theirs = in_both(hyper_read, h, weight, base, scale, iterations=1, eps=1e-6, norm_eps=1e-6)
    assert_alike(ours, theirs, tolerance_of(dtype))
    assert_alike(ours[1:3], theirs[1:3], 1e-4)  # post and mix are fp32, whatever the streams are


@pytest.mark.skipif(DEVICE == "cpu", reason="it is about what runs side by side, at full size")
def test_hyper_connections_of_a_full_size_batch() -> None:
    h, weight = randn(4096, 4, 4096, dtype=BFLOAT), randn(24, 16384) * 16384**-0.5
    arguments = h, weight, randn(24), randn(3)
    settings: dict[str, Any] = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
    with torch.no_grad(), kernels.use("reference"):
        expected = hyper_read(*arguments, **settings)
    for _ in range(5):
        with torch.no_grad(), kernels.use("triton"):
            found = hyper_read(*arguments, **settings)
        assert_alike(list(found[1:]), list(expected[1:]), 1e-4)


@needs_triton
@pytest.mark.parametrize("many", [20, 60])
def test_streams_in_bf16_meet_every_bit_of_the_weights(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of streams that are zero but for one channel, the numbers are that channel's weights, times a root."""
    from kvell.kernels.triton import hyper_connections as in_triton

    monkeypatch.setattr(in_triton, "MANY", many)
    streams, channels = 2, 20
    h = torch.zeros(40, streams * channels, dtype=BFLOAT, device=DEVICE)
    h[torch.arange(40), torch.arange(40)] = 1.0
    weight, base, scale = randn(8, 40), torch.zeros(8, device=DEVICE), torch.ones(3, device=DEVICE)
    with kernels.use("triton"):
        _, _, mix = hyper_read(
            h.view(40, streams, channels), weight, base, scale, iterations=None, eps=1e-6, norm_eps=0.0
        )
    torch.testing.assert_close(mix.flatten(1), weight[4:].T * 40**0.5, atol=0, rtol=5e-7)


def drawn_picks(visible: Tensor, count: int) -> Tensor:
    """Some of every query's visible entries, ascending, then -1."""
    picks = torch.full((len(visible), count), -1)
    for row, seen in zip(picks, visible.tolist(), strict=True):
        chosen = torch.randperm(seen)[:count].sort().values
        row[: len(chosen)] = chosen
    return picks.to(visible.device)


@needs_triton
@pytest.mark.parametrize(
    ("queries", "rows", "entries", "heads", "width", "picked", "window", "dtype"),
    [
        (5, 9, 7, 2, 8, None, 4, FLOAT),
        (40, 51, 33, 3, 24, None, 12, FLOAT),
        (7, 20, 30, 4, 16, 5, 6, FLOAT),
        (1, 8, 100, 4, 16, None, 8, FLOAT),
        (1, 8, 100, 20, 16, 70, 8, FLOAT),
        (3, 3, 0, 4, 16, None, 2, FLOAT),
        (6, 9, 40, 20, 144, 17, 12, BFLOAT),
        (9, 30, 20, 3, 40, None, 7, BFLOAT),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_window_and_compressed_attention(
    queries: int,
    rows: int,
    entries: int,
    heads: int,
    width: int,
    picked: int | None,
    window: int,
    dtype: torch.dtype,
    deterministic: bool,
) -> None:
    """The first query sees nearly nothing, the last one everything."""
    visible = (torch.linspace(0, entries, queries).long() if queries > 1 else torch.tensor([entries])).to(DEVICE)
    picks = None if picked is None else drawn_picks(visible, picked)
    held = torch.randn(rows + 2, width + 3).to(DEVICE, dtype)[2:, :width]  # rows lie in a larger buffer
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours, theirs = in_both(
            compressed_attention,
            *(randn(queries, heads, width, dtype=dtype), held, randn(entries, width, dtype=dtype)),
            *(visible, picks, randn(heads)),
            scale=width**-0.5,
            window=window,
        )
    finally:
        torch.use_deterministic_algorithms(False)
    if entries == 0:  # the reference says that nothing flows to no entries, or that there is nothing to say
        ours, theirs = ([tensor for tensor in found if tensor.numel()] for found in (ours, theirs))
    assert_alike(ours, theirs, tolerance_of(dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(
    ("queries", "heads", "width", "entries", "top_k"),
    [(7, 3, 8, 100, 5), (3, 1, 4, 9, 20), (40, 5, 20, 600, 33), (1, 2, 40, 70, 1)],
)
@pytest.mark.parametrize(("least", "most"), [(-1, 2), (-3, -1)])
def test_picks_are_the_very_same_with_many_equal_scores(
    queries: int, heads: int, width: int, entries: int, top_k: int, dtype: torch.dtype, least: int, most: int
) -> None:
    """Small whole numbers, whose products are exact: most scores have equals, many are zero, or none is above."""
    query = torch.randint(-2, 3, (queries, heads, width)).to(DEVICE, dtype)
    weights = torch.randint(least, most + 1, (queries, heads)).to(DEVICE, dtype)
    keys = torch.randint(-1, 2, (entries, width)).to(DEVICE, dtype)
    visible = torch.randint(0, entries + 1, (queries,)).to(DEVICE)
    found = []
    for version in ("triton", "reference"):
        with kernels.use(version):  # type: ignore[arg-type]
            found.append(pick(query, weights, keys, visible, top_k))
    assert torch.equal(*found)
    assert found[0].shape == (queries, min(top_k, entries))


@needs_triton
@pytest.mark.parametrize(
    ("windows", "ratio", "overlap", "behind", "width", "pairs", "dtype"),
    [
        (3, 4, True, 0, 8, 2, FLOAT),
        (2, 4, True, 1, 9, 3, FLOAT),
        (2, 128, False, 0, 24, 12, FLOAT),
        (1, 5, True, 0, 130, 4, BFLOAT),
        (0, 4, False, 0, 8, 2, FLOAT),
    ],
)
def test_entries_of_windows(
    windows: int, ratio: int, overlap: bool, behind: int, width: int, pairs: int, dtype: torch.dtype
) -> None:
    channels = width * (2 if overlap else 1)
    raw = randn((windows + behind) * ratio, 2 * channels, dtype=dtype)
    others = randn(ratio, channels), randn(width, dtype=dtype), randn(windows, pairs), randn(windows, pairs)
    assert_alike(*in_both(pooled_entries, raw, *others, behind=behind, eps=1e-6), tolerance_of(dtype))


@needs_triton
@pytest.mark.parametrize(
    ("counts", "heads", "kv_heads", "width", "kernel_sizes", "pairs", "dtype"),
    [
        ([3, 1, 20], 4, 2, 8, (2, 2), 4, FLOAT),
        ([5], 3, 1, 12, (3, 2), 2, FLOAT),
        ([1, 1], 4, 0, 40, (1, 3), None, FLOAT),
        ([40], 6, 3, 24, (2, 2), 6, FLOAT),
        ([7, 2], 4, 2, 16, (2, 2), 8, BFLOAT),
        ([2], 2, 2, 8, (1, 1), None, FLOAT),
    ],
)
def test_convolved_heads(
    counts: list[int],
    heads: int,
    kv_heads: int,
    width: int,
    kernel_sizes: tuple[int, int],
    pairs: int | None,
    dtype: torch.dtype,
) -> None:
    channels, tokens, (first, second) = (heads + kv_heads) * width, sum(counts), kernel_sizes
    laid = randn(tokens + len(counts) * (first + second - 2), channels, dtype=dtype)
    depthwise, grouped = randn(channels, 1, first, dtype=dtype), randn(channels, width, second, dtype=dtype)
    biases = randn(channels, dtype=dtype), randn(channels, dtype=dtype)
    temperature = randn(kv_heads, dtype=dtype) if kv_heads else None
    turns = [None, None] if pairs is None else [randn(tokens, pairs, dtype=dtype) for _ in range(2)]
    ours, theirs = in_both(
        convolved_heads, laid, depthwise, biases[0], grouped * width**-0.5, biases[1], temperature, *turns, counts
    )
    assert_alike(ours, theirs, tolerance_of(dtype))


@needs_triton
def test_no_convolution_runs_for_the_gradients_of_convolved_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's convolutions round fp32 to tf32."""
    monkeypatch.setattr(torch.nn.functional, "conv1d", None)
    laid = randn(7, 16).requires_grad_()
    weights = randn(16, 1, 2), randn(16), randn(16, 8, 2), randn(16)
    with kernels.use("triton"):
        query, _ = convolved_heads(laid, *weights, None, None, None, [5])
    query.sum().backward()
    assert laid.grad is not None


@needs_triton
@pytest.mark.parametrize(
    ("turn", "dtype", "of_angles"),
    [
        (rotate, FLOAT, FLOAT),
        (rotate, BFLOAT, BFLOAT),
        (rotate, BFLOAT, FLOAT),
        (rotate_last, FLOAT, FLOAT),
        (rotate_last, BFLOAT, FLOAT),  # torch has no complex numbers of bf16
    ],
)
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "pairs"),
    [(5, 3, 8, 4), (300, 1, 13, 3), (1, 70, 40, 17), (4, 2, 5, 1), (0, 2, 8, 2)],
)
def test_turned_heads(
    turn: Callable[..., Tensor],
    dtype: torch.dtype,
    of_angles: torch.dtype,
    tokens: int,
    heads: int,
    width: int,
    pairs: int,
) -> None:
    cos, sin = randn(tokens, pairs, dtype=of_angles), randn(tokens, pairs, dtype=of_angles)
    heads_of = randn(heads, tokens, width, dtype=dtype).transpose(0, 1)
    assert_alike(*in_both(lambda x: turn(x, cos, sin), heads_of), tolerance_of(dtype))


@needs_triton
@pytest.mark.parametrize("turn", [rotate, rotate_last])
def test_angles_that_are_learned_have_their_gradients(turn: Callable[..., Tensor]) -> None:
    """Nothing in the library learns them; torch turns then."""
    assert_alike(*in_both(turn, randn(3, 2, 8), randn(3, 3), randn(3, 3)), 1e-5)


@needs_triton
@pytest.mark.parametrize("turn", [rotate, rotate_last])
def test_a_turn_has_gradients_of_gradients(turn: Callable[..., Tensor]) -> None:
    cos, sin, x = randn(3, 3), randn(3, 3), randn(3, 2, 8).requires_grad_()
    with kernels.use("triton"):
        (once,) = torch.autograd.grad(turn(x, cos, sin).pow(3).sum(), x, create_graph=True)
        (ours,) = torch.autograd.grad(once.sum(), x)
    with kernels.use("reference"):
        (once,) = torch.autograd.grad(turn(x, cos, sin).pow(3).sum(), x, create_graph=True)
        (theirs,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


RAGGED = [
    ([1, 70, 300, 129], 4, 2, 24, None, FLOAT),
    ([5, 200], 3, 1, 8, 7, FLOAT),
    ([400, 2], 32, 2, 16, None, BFLOAT),
    ([1], 2, 2, 130, None, BFLOAT),
    ([3000, 1], 2, 1, 16, None, FLOAT),
]


@needs_triton
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "width", "window", "dtype"), RAGGED)
def test_one_query_for_each_of_many_lengths(
    lengths: list[int], heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    query = randn(len(lengths), heads, width, dtype=dtype)
    # Views of streams' buffers, before and behind which lies something else.
    keys, values = (
        [randn(n + 3, kv_heads * width, dtype=dtype)[2:-1].unflatten(1, (kv_heads, width)) for n in lengths]
        for _ in range(2)
    )
    settings: dict[str, Any] = {"scale": width**-0.5, "window": window}
    with kernels.use("triton"):
        together = attention(query, keys, values, [1] * len(lengths), **settings)
        alone = [
            attention(query[i : i + 1], keys[i : i + 1], values[i : i + 1], [1], **settings)
            for i in range(len(lengths))
        ]
    with kernels.use("reference"):
        expected = attention(query, keys, values, [1] * len(lengths), **settings)
    assert_alike([together], [expected], tolerance_of(dtype))
    assert_alike([together], [torch.cat(alone)], tolerance_of(dtype))


LAUNCHED = {
    "deepseek_v4": {"_read", "_write", "_attend", "_scores", "_pool", "_turn"},
    "zaya": {"_convolve", "_decode"},
    "gemma4": {"_decode", "_turn"},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that have run."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    names: set[str] = set()
    run, interpret = JITFunction.run, GridExecutor.__call__

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.add(self.fn.__name__)
        return (interpret if isinstance(self, GridExecutor) else run)(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", noted)
    monkeypatch.setattr(GridExecutor, "__call__", noted)
    return names


def fed(model: Decoder, tokens: Tensor, sizes: Sequence[int], detour: bool) -> Tensor:
    """In pieces of these sizes; with a detour other tokens are seen and taken back before each."""
    cache = model.make_cache(max_rewind=2)
    logits = []
    for piece in tokens.split(list(sizes), dim=1):
        if detour:
            model(tokens[:, :2], cache=cache)
            cache.rewind(2)
        logits.append(model(piece, cache=cache))
    return torch.cat(logits, dim=1)


@needs_triton
@pytest.mark.parametrize("kind", sorted(LAUNCHED))
def test_the_house_rule_holds_on_these_kernels(kind: str, launched: set[str]) -> None:
    """Whole = chunks, after rewinding = token by token = in a ragged batch = the references."""
    model = random_model(model_like(kind)).to(DEVICE)
    tokens = torch.randint(0, VOCAB, (1, 14), device=DEVICE)
    with torch.no_grad():
        with kernels.use("reference"):
            expected = model(tokens)
        with kernels.use("triton"):
            ways = [
                model(tokens),
                fed(model, tokens, [7, 1, 6], detour=True),
                fed(model, tokens, [9, 1, 1, 1, 1, 1], detour=False),
            ]
            caches = [model.make_cache(), model.make_cache()]
            model(tokens[:, 3:4], cache=caches[0])
            model(tokens[:, :12], cache=caches[1])
            batch = Cache.merge(caches)
            ragged = [model(tokens[:, at : at + 1].expand(2, 1), cache=batch)[1:] for at in (12, 13)]
    for logits in ways:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(ragged, dim=1), expected[:, 12:], atol=1e-4, rtol=1e-4)
    assert launched >= LAUNCHED[kind]


@needs_triton
@pytest.mark.parametrize("kind", ["deepseek_v4", "zaya"])
def test_training_on_these_kernels_has_the_references_gradients(kind: str) -> None:
    tokens = torch.randint(0, VOCAB, (2, 9), device=DEVICE)
    gradients = []
    for version in ("triton", "reference"):
        model = random_model(model_like(kind)).to(DEVICE).train()
        with kernels.use(version):  # type: ignore[arg-type]
            logits = model(tokens)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_alike(*gradients, 1e-5)


@needs_triton
def test_every_kernel_compiles_for_a_gpu_and_fits_into_its_memory() -> None:
    """At the released models' sizes in bf16: the interpreter takes more than the compiler does."""
    script = Path(__file__).parent / "triton_compilation.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(script), "bfloat16"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}
    folder = Path(kernels.__file__).parent / "triton"
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    started = set(re.findall(r"^ +(_\w+)\[", source, re.MULTILINE))
    assert {name.split(" ")[0] for name in shared} == started


def test_a_version_that_cannot_run_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 1, 4)

    def run(x: Tensor) -> Tensor:
        return attention(x, [x], [x], [1], scale=1.0)

    with pytest.raises(ValueError, match='not "fast", "reference", "triton" or "cpp"'), kernels.use("quick"):  # type: ignore[arg-type]
        pass
    monkeypatch.setattr(choice, "triton_installed", lambda: False)
    with pytest.raises(InputError, match="triton, which is not installed"), kernels.use("triton"):
        pass
    monkeypatch.setattr(choice, "triton_installed", lambda: True)
    monkeypatch.setattr(table, "interpreted", lambda: False)
    with kernels.use("triton"):
        with pytest.raises(InputError, match=r'needs a CUDA device, not "cpu".*TRITON_INTERPRET=1'):
            run(query)
        with pytest.raises(InputError, match="does not take float64"):
            run(query.double())


@needs_triton
def test_the_fast_version_on_the_cpu_is_not_triton(launched: set[str]) -> None:
    model = random_model(model_like("deepseek_v4"))
    with torch.no_grad():
        model(torch.randint(0, VOCAB, (1, 9)))
    assert launched == set()
