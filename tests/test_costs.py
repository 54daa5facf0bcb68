"""What techniques state of their costs is what a model built of them has and computes."""

from collections.abc import Callable

import pairwise
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from oracle import DEEPSEEK_V4, GEMMA4, LAGUNA, ZAYA
from strategies import configs, random_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kvell import ModelConfig, kernels
from kvell.checkpoint import build_empty
from kvell.families import builtin_names, parse_config
from kvell.layers.convolutional import Convolutional
from kvell.layers.cost import Work
from kvell.layers.grouped_query import GroupedQuery
from kvell.planning.flops import decode_flops, prefill_flops
from kvell.planning.model_cost import last_writer, weights

DRAWN = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
FAMILIES = {"gemma4": GEMMA4, "laguna": LAGUNA, "zaya": ZAYA, "deepseek_v4": DEEPSEEK_V4}
TOKENS = 11


def check_weights(config: ModelConfig) -> None:
    """Name by name: the shape, whether it stays fp32, and whether it is learnt."""
    model = build_empty(config, torch.bfloat16)
    learnt = dict(model.named_parameters())
    real = {name: (tuple(tensor.shape), tensor.dtype, name in learnt) for name, tensor in model.named_tensors()}
    kept = {"fp32": torch.float32, "int64": torch.int64}
    stated = {one.name: (one.shape, kept.get(one.form, torch.bfloat16), one.learnt) for one in weights(config)}
    assert stated == real
    assert sum(one.numel for one in weights(config) if one.learnt) == model.num_parameters()


@pytest.mark.parametrize("name", builtin_names())
def test_the_weights_stated_are_those_of_a_released_model(name: str) -> None:
    check_weights(ModelConfig.from_pretrained(name))


@pytest.mark.parametrize("config", pairwise.configs().values(), ids=range(len(pairwise.configs())))
def test_the_weights_stated_are_those_of_a_mixed_model(config: ModelConfig) -> None:
    check_weights(config)


@DRAWN
@given(config=configs())
def test_the_weights_stated_are_those_of_a_drawn_model(config: ModelConfig) -> None:
    check_weights(config)


@pytest.mark.parametrize("most", [None, 1, 3, 100])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17, 64])
def test_the_rows_that_all_tokens_see_are_the_sum_of_what_each_sees(
    tokens: int, stride: int, most: int | None
) -> None:
    work = Work("attention", 1, stride=stride, most=most)
    assert work.rows_of_all(tokens) == sum(work.rows(count) for count in range(1, tokens + 1))


def scaled_dot_product_flops(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    """Of torch's attention on the CPU, which its counter does not know: every query with every key and value."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def added_products_flops(to: list[int], left: list[int], right: list[int], *_: object, **__: object) -> int:
    """Of products added up in place: torch's counter knows them out of place alone."""
    return 2 * left[0] * left[1] * left[2] * right[2]


def one_row_flops(matrix: list[int], row: list[int], *_: object, **__: object) -> int:
    """Of a matrix with a vector."""
    return 2 * matrix[0] * matrix[1]


def one_row_added_flops(to: list[int], matrix: list[int], row: list[int], *_: object, **__: object) -> int:
    """The same, added to something."""
    return 2 * matrix[0] * matrix[1]


UNKNOWN_TO_TORCH = {
    torch.ops.aten.mv: one_row_flops,
    torch.ops.aten.addmv: one_row_added_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: scaled_dot_product_flops,
    torch.ops.aten.baddbmm_: added_products_flops,
}


class OwnExperts:
    """Each token's chosen experts and nothing else. The kernels' reference runs every expert on every token, which
    is no count of what a mixture needs. `skipped` counts choices of none, which a plan counts as an expert."""

    def __init__(self) -> None:
        self.skipped = 0

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        gate_up: Tensor,
        down: Tensor,
        unit: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        outputs = []
        for token, own, experts in zip(x, weights, chosen, strict=True):
            y = torch.zeros_like(token)
            for weight, expert in zip(own, experts.tolist(), strict=True):
                if expert == len(gate_up):
                    self.skipped += 3 * 2 * down[0].numel()
                    continue
                gate, up = F.linear(token[None], gate_up[expert]).chunk(2, dim=-1)
                y = y + weight * F.linear(unit(gate, up), down[expert])[0]
            outputs.append(y)
        return torch.stack(outputs)


def depthwise_extra(config: ModelConfig) -> int:
    """FLOPs of a sequence that a depthwise convolution makes for rows before its first: its outputs that the second
    convolution looks back on are made again in every step, and a plan leaves them out."""
    attentions = [layer.attention for layer in config.layers]
    return sum(
        2 * one.channels * one.depthwise_kernel * (one.grouped_kernel - 1)
        for one in attentions
        if isinstance(one, Convolutional)
    )


def lone_products(config: ModelConfig, queries: range, last_only: bool) -> int:
    """FLOPs of queries, named by how many tokens are there with them, that see a single row: einsum makes the product
    with its value an elementwise one, which torch does not count."""
    uncounted = 0
    for index, layer in enumerate(config.layers):
        attention = layer.attention
        if isinstance(attention, GroupedQuery | Convolutional):
            own = queries if not last_only or index < last_writer(config) else queries[-1:]
            alone = sum(min(tokens, attention.sliding_window or tokens) == 1 for tokens in own)
            uncounted += 2 * attention.num_heads * attention.head_dim * alone
    return uncounted


def check_flops(config: ModelConfig, patch: pytest.MonkeyPatch) -> None:
    """A prefill with all logits and with the last ones, and a decoded token behind it, as torch counts them."""
    own = OwnExperts()
    patch.setattr("kvell.layers.experts.experts", own)
    model = random_model(config)
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
    extra = depthwise_extra(config)

    def counted(run: Callable[[], object], queries: range, last_only: bool = False) -> int:
        own.skipped = 0
        with (
            torch.no_grad(),
            kernels.use("reference"),
            FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter,
        ):
            run()
        uncounted = lone_products(config, queries, last_only)
        return counter.get_total_flops() + own.skipped + uncounted - extra

    cache, prompt, next_one = model.make_cache(), range(1, TOKENS + 1), range(TOKENS + 1, TOKENS + 2)
    planned = prefill_flops(config, TOKENS, last_only=False).total
    assert counted(lambda: model(tokens), prompt) == planned
    planned = prefill_flops(config, TOKENS).total
    assert counted(lambda: model(tokens, cache=cache, last_only=True), prompt, last_only=True) == planned
    planned = decode_flops(config, TOKENS + 1).total
    assert counted(lambda: model(tokens[:, :1], cache=cache), next_one) == planned


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_as_torch_counts_them_in_a_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_flops(parse_config(FAMILIES[family]), monkeypatch)


@pytest.mark.parametrize("config", pairwise.configs().values(), ids=range(len(pairwise.configs())))
def test_flops_are_as_torch_counts_them_in_a_mixed_model(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_flops(config, monkeypatch)


@DRAWN
@given(config=configs())
def test_flops_are_as_torch_counts_them_in_a_drawn_model(config: ModelConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check_flops(config, patch)


def depthwise_of_a_token(config: ModelConfig) -> int:
    """FLOPs of a token's depthwise convolutions: multiply-adds on the CPU, which torch does not count."""
    attentions = [layer.attention for layer in config.layers]
    return sum(2 * one.channels * one.depthwise_kernel for one in attentions if isinstance(one, Convolutional))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_token_of_the_fast_kernels_takes_the_flops_planned(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnExperts()
    monkeypatch.setattr("kvell.layers.experts.experts", own)
    config = parse_config(FAMILIES[family])
    model, tokens = random_model(config), torch.randint(0, config.vocab_size, (1, TOKENS))
    cache = model.make_cache()
    with torch.no_grad():
        model(tokens, cache=cache)
        own.skipped = 0
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
            model(tokens[:, :1], cache=cache)
    counted = counter.get_total_flops() + own.skipped + depthwise_of_a_token(config)
    assert counted == decode_flops(config, TOKENS + 1).total


def test_more_entries_than_are_picked_are_scored_and_fewer_are_not() -> None:
    config = parse_config({**DEEPSEEK_V4, "compress_ratios": [4, 4, 4, 4, 0], "index_topk": 2})
    assert "indexer" in decode_flops(config, 12).by_part
    at_two_entries = decode_flops(config, 11).by_part["indexer"]
    at_three = decode_flops(config, 12).by_part["indexer"]
    heads, width = 16, 8
    assert at_three - at_two_entries == 2 * 4 * 3 * heads * (width + 1)
