"""Published figures of real models, to the digits in which they were published.

    Ahead of AI         its article of 2026-05-16: a formula of its own, and the percentages of DeepSeek's report
    V4 report           DeepSeek V4, arXiv 2606.19348, and its released inference code (entry layout)
    V3.2 report         DeepSeek V3.2, arXiv 2512.02556, and its released inference code (656 + 132 bytes)
    an engine's log     a llama.cpp-family server running V4 Flash (github.com/nibor1896/Crow, issue 25)
    hyper-connections   arXiv 2409.19606, table of parameters and FLOPs

Other figures follow from the released configs by arithmetic that stands beside them. GB = 1e9 bytes, 128K = 131,072
tokens, 1M = 1,048,576, bf16, one sequence.
"""

import pytest

import kvell
from kvell import ModelConfig, Plan
from kvell.config import LayerConfig
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.planning.article import article_nbytes
from kvell.planning.engine import Engine, engine_nbytes
from kvell.planning.flops import decode_flops
from kvell.planning.formats import BFLOAT16
from kvell.planning.what_if import changed_config, what_if, without

K128, M1 = 131_072, 1 << 20
V32, PRO, FLASH = "deepseek-v3.2", "deepseek-v4-pro", "deepseek-v4-flash"


def config(name: str) -> ModelConfig:
    return ModelConfig.from_pretrained(name)


@pytest.mark.parametrize(
    ("model", "head_dim", "unshared", "shared", "saved"),
    [("gemma-4-e2b", 256, 4.698, 2.013, 2.684), ("gemma-4-e4b", 320, 14.09, 8.05, 6.04)],
)
def test_the_articles_formula(model: str, head_dim: int, unshared: float, shared: float, saved: float) -> None:
    """Ahead of AI: "2.7 GB" saved for E2B, "about 6 GB" for E4B, for which it takes heads of 2560 / 8 = 320."""
    digits = 3 if model.endswith("e2b") else 2
    with_sharing = article_nbytes(config(model), K128, head_dim=head_dim) / 1e9
    without_sharing = article_nbytes(config(model), K128, head_dim=head_dim, sharing=False) / 1e9
    assert round(without_sharing, digits) == unshared
    assert round(with_sharing, digits) == shared
    assert round(without_sharing - with_sharing, digits) == saved


@pytest.mark.parametrize(
    ("model", "unshared", "shared", "percent", "unshared_full", "shared_full"),
    [
        ("gemma-4-e2b", 1.894, 0.812, 57.1, 5.637, 2.416),
        ("gemma-4-e4b", 3.795, 2.168, 42.9, 13.153, 7.516),
    ],
)
def test_what_gemma_4_holds(
    model: str, unshared: float, shared: float, percent: float, unshared_full: float, shared_full: float
) -> None:
    """Released config: heads of 256 in windows of 512 and of 512 in full layers; E2B has 12 + 3 layers with keys of
    their own of 28 + 7, E4B 20 + 4 of 35 + 7."""
    plan = kvell.plan(model, K128)
    without_sharing = what_if(config(model), "no-sharing", K128, BFLOAT16).cache_bytes
    assert round(plan.cache_bytes / 1e9, 3) == shared
    assert round(without_sharing / 1e9, 3) == unshared
    assert round(100 * (1 - plan.cache_bytes / without_sharing), 1) == percent
    assert round(what_if(config(model), "plain", K128, BFLOAT16).cache_bytes / 1e9, 3) == unshared_full
    assert round(what_if(config(model), "no-windows", K128, BFLOAT16).cache_bytes / 1e9, 3) == shared_full


def test_laguna_gives_full_layers_6_query_heads_per_kv_head_and_sliding_ones_8() -> None:
    """Ahead of AI, and the released config."""
    groups = [group.attention for group in kvell.plan("laguna-xs.2", K128).layer_groups]
    assert groups == ["grouped-query 48/8 x 128", "grouped-query 64/8 x 128, window 512"]
    assert (48 // 8, 64 // 8) == (6, 8)


def test_what_laguna_holds_and_what_its_head_budget_saves() -> None:
    """Released config: 10 full layers of 48 heads, 30 with windows of 512 and 64 heads; 8 KV heads of 128.
    43.5 = (10 * 131072 + 30 * 512) * 64 * 128 * 4 / 1e9."""
    laguna = config("laguna-xs.2")
    plan = kvell.plan(laguna, K128)
    assert round(plan.cache_bytes / 1e9, 2) == 5.43
    assert round(what_if(laguna, "all-full", K128, BFLOAT16).cache_bytes / 1e9, 1) == 21.5
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"num_heads": 64})})
        for layer in laguna.layers
    )
    unbudgeted = kvell.plan(laguna.model_copy(update={"layers": layers}), K128)
    assert round(plan.decode_flops["attention"] / 1e9, 1) == 32.7
    assert round(unbudgeted.decode_flops["attention"] / 1e9, 1) == 43.5
    assert unbudgeted.cache_bytes == plan.cache_bytes


def test_what_zaya1_holds() -> None:
    """Released config: 40 layers, 2 KV heads of 128; beside them 2 rows of 1,280 channels and one of 128 a layer.
    Multi-head attention as wide as its residual has 16 heads (CCA, arXiv 2510.04476: 8 x less)."""
    zaya = config("zaya1-8b")
    plan = kvell.plan(zaya, K128)
    assert plan.bytes_per_token == 40_960
    assert plan.constant_bytes == 40 * 5376
    assert round(plan.bytes_per_token * K128 / 1e9, 2) == 5.37
    multi_head = what_if(zaya, "mha", K128, BFLOAT16).cache_bytes
    assert round(multi_head / 1e9, 2) == 42.95
    assert multi_head == 8 * plan.bytes_per_token * K128


def released(model: str, dtype: str = "released") -> Plan:
    return kvell.plan(model, M1, dtype=dtype)


def test_a_released_entry_is_584_bytes_and_an_indexers_68_or_132() -> None:
    """V4's released inference code: 448 FP8 + 64 bf16 + 8 of scales; 64 + 4 in MXFP4, 128 + 4 in FP8."""
    for dtype, index in (("released", 68), ("released-fp8-index", 132)):
        rows = {stream.name: stream.row_bytes for stream in released(FLASH, dtype).streams}
        assert (rows["window"], rows["entry"], rows["index"]) == (584, 584, index)


@pytest.mark.parametrize(
    ("model", "per_token", "gigabytes", "percent", "rounded"),
    [(V32, 48_068, 50.40, 100.0, 100), (PRO, 5031.4, 5.276, 10.47, 10), (FLASH, 3514.25, 3.685, 7.31, 7)],
)
def test_released_bytes_per_token(
    model: str, per_token: float, gigabytes: float, percent: float, rounded: int
) -> None:
    """V3.2: 61 * (656 + 132). V4: layers of CSA / 4 * (584 + 68) + layers of HCA / 128 * 584; V4 report and Ahead of
    AI: 10 % and 7 % of V3.2."""
    own, base = released(model).bytes_per_token, released(V32).bytes_per_token
    assert round(own, len(str(per_token).partition(".")[2]) if "." in str(per_token) else 0) == per_token
    assert round(own * M1 / 1e9, 2 if model == V32 else 3) == gigabytes
    assert round(100 * own / base, 2) == percent
    assert round(100 * own / base) == rounded


def test_v4_pro_in_16_bits() -> None:
    """Entries of 1024 and 256 bytes; V3.2 in bf16 holds 61 * (576 + 128) * 2 bytes a token."""
    own, base = (kvell.plan(model, M1).bytes_per_token for model in (PRO, V32))
    assert own == 9848
    assert round(own * M1 / 2**30, 2) == 9.62
    assert round(base * M1 / 2**30, 1) == 83.9
    assert round(100 * own / base, 1) == 11.5


@pytest.mark.parametrize("model", [PRO, FLASH])
def test_v4_beside_grouped_query_attention(model: str) -> None:
    """V4 report: about 2 % of 8 KV heads of 128 in bf16, 4,096 bytes a layer."""
    layers = config(model).num_layers
    grouped = kvell.plan(changed_config(config(model), "gqa"), M1).bytes_per_token
    assert grouped == 4096 * layers
    assert round(100 * released(model).bytes_per_token / grouped, 1) == 2.0


@pytest.mark.parametrize(("model", "windows", "state"), [(FLASH, 3.21, 12.2), (PRO, 4.56, 18.7)])
def test_what_does_not_grow_in_the_released_layout(model: str, windows: float, state: float) -> None:
    """V4's released inference code: 128 rows of 584 bytes a layer, and fp32 rows of 8 or 128 tokens that wait."""
    held: dict[str, int] = {}
    for stream in released(model).streams:
        if stream.past is not None:
            what = "windows" if stream.name == "window" else "state"
            held[what] = held.get(what, 0) + stream.nbytes
    assert round(held["windows"] / 1e6, 2) == windows
    assert round(held["state"] / 1e6, 1) == state


@pytest.mark.parametrize(
    ("model", "gigaflops", "percent", "rounded"),
    [(V32, 1194, 100.0, 100), (PRO, 319, 26.7, 27), (FLASH, 121, 10.1, 10)],
)
def test_equivalent_fp8_flops_of_a_token_at_a_million(
    model: str, gigaflops: int, percent: float, rounded: int
) -> None:
    """V4 report, figure 1, and Ahead of AI: 27 % and 10 % of V3.2."""
    own, base = (released(name).equivalent_fp8_flops_per_token for name in (model, V32))
    assert round(own / 1e9) == gigaflops
    assert round(100 * own / base, 1) == percent
    assert round(100 * own / base) == rounded


@pytest.mark.parametrize(("model", "percent"), [(PRO, 32), (FLASH, 14)])
def test_counting_the_fp4_indexer_whole_misses_the_report(model: str, percent: int) -> None:
    own, base = released(model), released(V32).equivalent_fp8_flops_per_token
    indexer = config(model).layers[-1 if model == PRO else 2].attention.indexer
    layers = sum(getattr(layer.attention, "indexer", None) is not None for layer in config(model).layers)
    assert indexer is not None
    products = layers * 2 * indexer.num_heads * indexer.head_dim * (M1 // 4)
    assert round(100 * (own.equivalent_fp8_flops_per_token + products / 2) / base) == percent


def test_an_engines_log_of_v4_flash() -> None:
    """At 65,536 tokens in 2-byte rows: CSA entries 336.00 MiB, HCA entries 10.00, the indexer's 84.00, windows
    32.25 MiB with 768 rows a layer; 127 past rows a layer are 5.33 MiB, 128 rows 5.375."""
    plan = kvell.plan(FLASH, 65_536)
    mebibytes = {(stream.name, stream.stride): stream.nbytes / 2**20 for stream in plan.streams}
    assert mebibytes["entry", 4] == 336.0
    assert mebibytes["entry", 128] == 10.0
    assert mebibytes["index", 4] == 84.0
    assert round(mebibytes["window", 1] * 128 / 127, 1) == 5.4
    engine = Engine(window_rows=768)
    reserved = engine_nbytes(config(FLASH), BFLOAT16, 65_536, engine) - plan.cache_bytes
    assert reserved / 2**20 + mebibytes["window", 1] == 32.25


def olmo(connection: HyperConnections | None) -> ModelConfig:
    """OLMo 7B: 32 layers of 32 heads of 128, feed-forwards of 11,008."""
    attention = GroupedQuery(
        num_heads=32, num_kv_heads=32, head_dim=128, rotary=None, query_norm=False, key_norm=False
    )
    layer = LayerConfig(attention=attention, feed_forward=GatedMLP(intermediate_size=11_008))
    residual = {} if connection is None else {"connection": connection}
    return ModelConfig(vocab_size=50_304, hidden_size=4096, max_positions=2048, layers=(layer,) * 32, **residual)


def test_hyper_connections_add_little() -> None:
    """Hyper-connections (arXiv 2409.19606): 13.36 to 13.38 GFLOP a token at 7 B with four streams, each of which
    makes N + 2 weights of its own; attention's products are left out on both sides. Kvell's variant makes all its
    weights of all streams together, as mHC does, and the sums over streams count as well: 13.43."""

    def of_weights(counted: ModelConfig) -> float:
        by_part = decode_flops(counted, 1).by_part
        return (sum(by_part.values()) - by_part["attention"]) / 1e9

    plain, hyper = (of_weights(olmo(connection)) for connection in (None, HyperConnections(constrained=False)))
    streams, hidden, blocks = 4, 4096, 64
    made_by_each_stream = 2 * blocks * streams * hidden * (streams + 2) / 1e9
    assert round(plain, 2) == 13.36
    assert round(plain + made_by_each_stream, 2) == 13.38
    assert round(hyper, 2) == 13.43


def test_without_takes_techniques_away_together() -> None:
    """E2B with nothing left: 35 layers of their own, 28 of 2 * 256 and 7 of 2 * 512 values a token."""
    plain = without(config("gemma-4-e2b"), ("sharing", "windows"))
    assert kvell.plan(plain, K128).cache_bytes == K128 * 2 * (28 * 512 + 7 * 1024)
