"""DeepSeek V4 agrees with transformers: logits, gradients, generation and files; its draft block, which transformers
lacks, with one put together from transformers' modules."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    DEEPSEEK_V4,
    HEAVY,
    SLIDING,
    SPARSE,
    assert_gradients_agree,
    deepseek_v4,
    deepseek_v4_tensors,
    greedy,
    greedy_with_kvell,
    logits_without_cache,
    loss_of,
    official_layer,
    our_deepseek_v4_names,
    prompt,
    write,
)
from shape_checks import unchecked
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Indexer,
    DeepseekV4RMSNorm,
    DeepseekV4TopKRouter,
)

import kvell
from kvell.families import parse_config

HASH, LEARNED = "hash_moe", "moe"
# Around the windows of 4 and of 128 tokens: shorter, one less, exactly, one more, three more (vLLM issue 55927).
LENGTHS = [1, 3, 4, 5, 7, 127, 128, 129, 131, 515]


def by_name(types: list[str], sparse: int, heavy: int, hashed: list[str] | None = None) -> dict[str, Any]:
    """The layers as transformers spells them when it saves a config."""
    return {
        "compress_ratios": None,
        "num_hidden_layers": len(types),
        "layer_types": types,
        "compress_rates": {SPARSE: sparse, HEAVY: heavy},
        "mlp_layer_types": hashed or [HASH] + [LEARNED] * (len(types) - 1),
        "num_hash_layers": None,
    }


def nested(main: dict[str, Any], compress: dict[str, Any], fraction: float) -> dict[str, Any]:
    """Rotary settings as transformers saves them."""
    both = {"main": main, "compress": compress}
    return {
        "rope_theta": None,
        "compress_rope_theta": None,
        "rope_scaling": None,
        "qk_rope_head_dim": None,
        "partial_rotary_factor": fraction,
        "rope_parameters": {name: one | {"partial_rotary_factor": fraction} for name, one in both.items()},
    }


PLAIN = {"rope_type": "default", "rope_theta": 50.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 900.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 1.0,
}

CASES: dict[str, dict[str, Any]] = {
    "like Flash: two window layers, then ratios 4 and 128, three hash layers, released thetas": {
        "num_hidden_layers": 5,
        "compress_ratios": [0, 0, 4, 128, 4, 0],
        "num_hash_layers": 3,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "routed_scaling_factor": 1.5,
    },
    "like Pro: two heavily compressed layers first, four groups, more picks than entries": {
        "num_hidden_layers": 4,
        "compress_ratios": [128, 128, 4, 128, 0],
        "num_hash_layers": 3,
        "index_topk": 1024,
        "o_groups": 4,
        "routed_scaling_factor": 2.5,
        "swiglu_limit": 10.0,
    },
    "ratios 3 and 7, a window of 5, rotary settings by name": by_name([SLIDING, SPARSE, HEAVY, SPARSE], 3, 7)
    | nested(PLAIN, YARN, 0.5)
    | {"sliding_window": 5},
    "ratios 8 and 5, the larger one overlapping, two streams, three Sinkhorn iterations": by_name(
        [HEAVY, SPARSE, HEAVY], 8, 5
    )
    | {"hc_mult": 2, "hc_sinkhorn_iters": 3, "index_topk": 7},
    "ratios 2 and 16, one pick, five streams, one Sinkhorn iteration, large eps": by_name(
        [SPARSE, HEAVY, SPARSE], 2, 16, [LEARNED, HASH, LEARNED]
    )
    | {"index_topk": 1, "hc_mult": 5, "hc_sinkhorn_iters": 1, "hc_eps": 1e-2, "rms_norm_eps": 1e-2},
    "sigmoid scores, all experts chosen, all channels turned": {
        "scoring_func": "sigmoid",
        "num_experts_per_tok": 4,
        "qk_rope_head_dim": 16,
        "index_head_dim": 16,
    },
    "a tied head, one group, no YaRN": {
        "tie_word_embeddings": True,
        "o_groups": 1,
        "rope_scaling": None,
        "swiglu_limit": 0.2,
    },
    "window layers only, learned routing only, one stream": {
        "hc_mult": 1,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 0, 0, 0],
        "num_hash_layers": 0,
    },
    "sparse layers only, hash routing only, one expert a token, a window of 2": {
        "num_experts_per_tok": 1,
        "num_hidden_layers": 3,
        "compress_ratios": [4, 4, 4, 0],
        "num_hash_layers": 3,
        "sliding_window": 2,
        "index_topk": 3,
    },
    "heavily compressed layers only, ratio 6, three streams": by_name([HEAVY] * 3, 4, 6) | {"hc_mult": 3},
    "a window longer than everything, both kinds of layers with YaRN": by_name(
        [SPARSE, SLIDING, HEAVY, SLIDING], 5, 8, [HASH, LEARNED, HASH, LEARNED]
    )
    | nested(YARN | {"rope_theta": 200.0, "factor": 4.0}, YARN, 0.25)
    | {"sliding_window": 700, "index_topk": 20},
    "ratios 7 and 3, hash layers last, more experts, odd widths": by_name(
        [HEAVY, SLIDING, SPARSE], 7, 3, [LEARNED, LEARNED, HASH]
    )
    | {"n_routed_experts": 7, "num_experts_per_tok": 3, "num_attention_heads": 6, "o_groups": 3, "o_lora_rank": 5},
}
FLASH, PRO, THREE_SEVEN, EIGHT_FIVE, ONE_PICK, SIGMOID, TIED, _, SPARSE_ONLY = list(CASES)[:9]
each_case = pytest.mark.parametrize("case", CASES)
# Random weights for which transformers comes nowhere near a tie.
SEEDS = {SIGMOID: 1}


def released_config(case: str) -> dict[str, Any]:
    return {name: value for name, value in (DEEPSEEK_V4 | CASES[case]).items() if value is not None}


@cache
def reference(case: str) -> DeepseekV4ForCausalLM:
    return deepseek_v4(released_config(case), SEEDS.get(case, 0))


@cache
def generated(case: str, length: int) -> tuple[list[int], Tensor]:
    """What transformers says, with its cache."""
    return greedy(reference(case), prompt(length))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], kvell.Decoder]:
    @cache
    def load(case: str) -> kvell.Decoder:
        folder = write(
            tmp_path_factory.mktemp("released"), released_config(case), deepseek_v4_tensors(reference(case))
        )
        return kvell.from_pretrained(folder)

    return load


@contextmanager
def no_near_ties(model: DeepseekV4ForCausalLM) -> Iterator[None]:
    """AssertionError where a choice of entries or experts is so close that a rounding error could turn it: nothing
    could be compared there, all the less as transformers does not say which of equal scores it takes."""
    gaps: list[float] = []
    scores: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        scores.append(output)

    def entries(module: DeepseekV4Indexer, inputs: Any, output: Tensor) -> None:
        visible = (inputs[2] + 1) // module.compress_rate
        unseen = torch.arange(scores[-1].shape[-1]) >= visible[..., None]
        note(scores.pop().masked_fill(unseen, float("-inf")), module.index_topk)

    def experts(module: DeepseekV4TopKRouter, inputs: Any, output: tuple[Tensor, ...]) -> None:
        note(module.score_fn(output[0]) + module.e_score_correction_bias, module.top_k)

    def note(scores: Tensor, k: int) -> None:
        if k < scores.shape[-1]:
            best = scores.topk(k + 1, dim=-1).values
            gaps.append(float((best[..., k - 1] - best[..., k]).nan_to_num(torch.inf).min()))

    hooks = []
    for module in model.modules():
        if isinstance(module, DeepseekV4Indexer):
            hooks += [module.scorer.register_forward_hook(keep), module.register_forward_hook(entries)]
        elif isinstance(module, DeepseekV4TopKRouter):
            hooks.append(module.register_forward_hook(experts))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert min(gaps, default=torch.inf) > 2e-6, f"take another seed: scores {min(gaps):.0e} apart"


@torch.no_grad()
def assert_same_logits(model: kvell.Decoder, case: str, length: int) -> None:
    tokens = prompt(length)
    with no_near_ties(reference(case)):
        wanted = logits_without_cache(reference(case), tokens)
    assert 1 < wanted.abs().max() < 15
    with unchecked():
        logits = model(tokens)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
@each_case
def test_logits_equal_those_of_transformers(case: str, length: int, load) -> None:
    assert_same_logits(load(case), case, length)


def test_the_cases_have_layers_of_every_kind() -> None:
    """All three kinds, with hash and learned routing each, and picks that leave something out and that do not."""
    layers = [layer for case in CASES for layer in parse_config(released_config(case)).layers]
    kinds = {
        (layer.attention.compressor is not None, layer.attention.indexer is not None, layer.feed_forward.router.kind)
        for layer in layers
    }
    routers = ("hash", "sqrt_softplus")
    assert kinds >= {(*kind, r) for kind in ((False, False), (True, False), (True, True)) for r in routers}
    sparse = [layer.attention for layer in layers if layer.attention.indexer]
    assert {bool(one.indexer.top_k < 515 // one.compressor.ratio) for one in sparse} == {True, False}
    assert {layer.attention.compressor.ratio for layer in layers if layer.attention.compressor} >= {
        3,
        4,
        5,
        7,
        8,
        128,
    }


@pytest.mark.parametrize(("case", "length"), [(FLASH, 100), (THREE_SEVEN, 3), (ONE_PICK, 1)])
def test_64_greedy_tokens_equal_those_of_transformers(case: str, length: int, load) -> None:
    tokens, logits = generated(case, length)
    our_tokens, our_logits = greedy_with_kvell(load(case), prompt(length))
    assert our_tokens == tokens
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)


def test_generate_says_what_transformers_says(load) -> None:
    """A prompt that ends before its first window of 128 does, and a text that completes it."""
    tokens, _ = generated(FLASH, 100)
    assert 1 not in tokens, "the end token would cut the text short"
    with unchecked():
        assert list(kvell.generate(load(FLASH), prompt(100)[0], max_new_tokens=40)) == tokens[:40]


@pytest.mark.parametrize("sizes", [[1] * 10 + [118, 3, 1, 130], [127, 1, 1, 127, 6], [13] * 21, [200, 62]])
@pytest.mark.parametrize("case", [FLASH, THREE_SEVEN])
@torch.no_grad()
def test_a_prefill_may_come_in_chunks(case: str, sizes: list[int], load) -> None:
    model, tokens = load(case), prompt(sum(sizes))
    cache = model.make_cache()
    with unchecked():
        logits = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
    with no_near_ties(reference(case)):
        wanted = logits_without_cache(reference(case), tokens)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


@each_case
@torch.no_grad()
def test_what_kvell_saves_transformers_loads(case: str, load, tmp_path: Path) -> None:
    load(case).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "deepseek_v4", "saved in Kvell's own format"
    again, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    wanted = logits_without_cache(reference(case), prompt(150))
    torch.testing.assert_close(logits_without_cache(again.eval(), prompt(150)), wanted, rtol=0, atol=1e-5)


@each_case
def test_what_transformers_saves_kvell_loads(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Its config still announces a draft block, whose tensors it has not: nobody misses anything."""
    reference(case).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    model = kvell.from_pretrained(tmp_path)
    assert model.config.draft is None
    assert [str(one.message) for one in recwarn if "left out" in str(one.message)] == []
    assert_same_logits(model, case, 131)


@each_case
def test_both_spellings_of_a_config_are_the_same_model(case: str) -> None:
    """As released, and as transformers saves it: what differs is the draft block, which transformers has none of."""
    released = parse_config(released_config(case))
    saved = parse_config(json.loads(reference(case).config.to_json_string(use_diff=False)))
    assert saved.model_copy(update={"draft": None}) == released.model_copy(update={"draft": None})


def test_fields_of_the_other_spelling_may_be_null() -> None:
    newer = ["layer_types", "compress_rates", "mlp_layer_types", "rope_parameters", "partial_rotary_factor"]
    older = ["compress_ratios", "num_hash_layers", "rope_scaling", "compress_rope_theta", "qk_rope_head_dim"]
    for case, absent in ((FLASH, newer), (THREE_SEVEN, older)):
        config = released_config(case)
        assert parse_config(config | dict.fromkeys(absent)) == parse_config(config)


@pytest.mark.parametrize("case", [FLASH, PRO, THREE_SEVEN, ONE_PICK, SIGMOID, TIED])
def test_gradients_equal_those_of_transformers(case: str, load) -> None:
    model, theirs, tokens = load(case), reference(case), prompt(131)
    theirs.zero_grad()
    model.zero_grad()
    loss_of(logits_without_cache(theirs, tokens), tokens).backward()
    loss_of(model(tokens), tokens).backward()
    parameters = dict(theirs.named_parameters())
    names = {ours: name for ours, name in our_deepseek_v4_names(theirs).items() if name in parameters}
    assert len(names) == len(parameters)
    # The choice of entries has no gradient.
    indexers = {ours for ours, name in names.items() if ".indexer." in name}
    assert all(parameters[names[ours]].grad is None for ours in indexers)
    assert all(model.get_parameter(ours).grad is None for ours in indexers)
    shared = {ours: name for ours, name in names.items() if ours not in indexers}
    for part in ("compressor.position_bias", "compressor.gate_proj.weight", "sink", "connection.base", "ends.scale"):
        assert any(ours.endswith(part) for ours in shared)
    assert_gradients_agree(model, theirs, shared)


class ReferenceDraft(nn.Module):
    """Multi-token prediction of transformers' modules: a model of one window layer lends its layer, its collapse and
    its last norm."""

    def __init__(self, model: DeepseekV4ForCausalLM, config: dict[str, Any]) -> None:
        super().__init__()
        one_layer = {"num_hidden_layers": 1, "layer_types": [SLIDING], "mlp_layer_types": [LEARNED]}
        dropped = {"compress_ratios", "num_hash_layers"}
        lender = deepseek_v4(
            {name: value for name, value in config.items() if name not in dropped} | one_layer, seed=9
        )
        hidden, eps = lender.config.hidden_size, lender.config.rms_norm_eps
        self.model = model
        self.layer, self.hc_head, self.norm = lender.model.layers[0], lender.model.hc_head, lender.model.norm
        self.rotary, self.window = lender.model.rotary_emb, lender.config.sliding_window
        self.enorm, self.hnorm = DeepseekV4RMSNorm(hidden, eps), DeepseekV4RMSNorm(hidden, eps)
        self.e_proj, self.h_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        generator = torch.Generator().manual_seed(10)
        with torch.no_grad():
            for norm in (self.enorm, self.hnorm):
                norm.weight.copy_(0.6 + 0.8 * torch.rand(hidden, generator=generator))
            for projection in (self.e_proj, self.h_proj):
                projection.weight.copy_(torch.randn(hidden, hidden, generator=generator) * hidden**-0.5)

    def forward(self, streams: Tensor, next_tokens: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        embedded = self.e_proj(self.enorm(self.model.model.embed_tokens(next_tokens)))
        h = embedded[:, :, None] + self.h_proj(self.hnorm(streams))
        positions = torch.arange(start, start + h.shape[1])[None]
        distance = positions[0, :, None] - positions[0]
        mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= self.window), float("-inf"))
        h = self.layer(
            h,
            position_embeddings={"main": self.rotary(h, position_ids=positions, layer_type="main")},
            position_ids=positions,
            attention_mask=mask[None, None],
            past_key_values=None,
        )
        return self.model.lm_head(self.norm(self.hc_head(h))), h

    def tensors(self) -> dict[str, Tensor]:
        """Under the released names."""
        own = {
            f"mtp.0.{name}.weight": getattr(self, name).weight
            for name in ("enorm", "hnorm", "e_proj", "h_proj", "norm")
        }
        ends = {f"mtp.0.hc_head_{part}": getattr(self.hc_head, f"hc_{part}") for part in ("fn", "base", "scale")}
        return official_layer(self.layer, "mtp.0.") | own | ends


def streams_of(model: DeepseekV4ForCausalLM, tokens: Tensor) -> Tensor:
    """(1, T, N, C): the residual before the last collapse."""
    seen: list[Tensor] = []
    hook = model.model.hc_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits_without_cache(model, tokens)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def load_with_draft(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[kvell.Decoder, ReferenceDraft]]:
    @cache
    def load(case: str) -> tuple[kvell.Decoder, ReferenceDraft]:
        draft = ReferenceDraft(reference(case), released_config(case))
        tensors = deepseek_v4_tensors(reference(case)) | draft.tensors()
        return kvell.from_pretrained(write(tmp_path_factory.mktemp("d"), released_config(case), tensors)), draft

    return load


DRAFTING = [FLASH, PRO, EIGHT_FIVE, SIGMOID, TIED, SPARSE_ONLY]


@pytest.mark.parametrize("length", [1, 2, 17, 129])
@pytest.mark.parametrize("case", DRAFTING)
@torch.no_grad()
def test_drafts_equal_those_put_together_from_transformers_modules(case: str, length: int, load_with_draft) -> None:
    (model, draft), tokens = load_with_draft(case), prompt(length + 1)
    theirs = streams_of(reference(case), tokens[:, :-1])
    wanted, wanted_streams = draft(theirs, tokens[:, 1:])
    _, streams = model(tokens[:, :-1], return_streams=True)
    torch.testing.assert_close(streams, theirs, rtol=0, atol=1e-4)
    logits, after = model.draft(streams, tokens[:, 1:])
    assert 1 < wanted.abs().max() < 15
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, wanted_streams, rtol=0, atol=1e-4)
    # Where the first row stands does not matter: the block only knows distances.
    torch.testing.assert_close(draft(theirs, tokens[:, 1:], start=1)[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1] * 40, [3, 13, 1, 16, 7], [39, 1]])
@pytest.mark.parametrize("case", [FLASH, EIGHT_FIVE])
@torch.no_grad()
def test_drafts_may_come_in_chunks(case: str, sizes: list[int], load_with_draft) -> None:
    (model, draft), tokens = load_with_draft(case), prompt(41)
    wanted, _ = draft(streams_of(reference(case), tokens[:, :-1]), tokens[:, 1:])
    cache, draft_cache, logits, at = model.make_cache(), model.make_draft_cache(), [], 0
    with unchecked():
        for size in sizes:
            _, streams = model(tokens[:, at : at + size], cache=cache, return_streams=True)
            logits.append(model.draft(streams, tokens[:, at + 1 : at + size + 1], cache=draft_cache)[0])
            at += size
    assert draft_cache.lengths == [40]
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [FLASH, EIGHT_FIVE])
@torch.no_grad()
def test_a_draft_goes_on_from_its_own_streams(case: str, load_with_draft) -> None:
    """One token more: the block's own streams stand in for the model's, which have not seen the token."""
    (model, draft), tokens = load_with_draft(case), prompt(31)
    theirs = streams_of(reference(case), tokens[:, :-2])
    _, after = draft(theirs, tokens[:, 1:-1])
    wanted, _ = draft(torch.cat([theirs, after[:, -1:]], dim=1), tokens[:, 1:])
    cache = model.make_draft_cache(max_rewind=1)
    _, streams = model(tokens[:, :-2], return_streams=True)
    _, after = model.draft(streams, tokens[:, 1:-1], cache=cache)
    for _ in range(2):  # and once more, after it was taken back
        logits, _ = model.draft(after[:, -1:], tokens[:, -1:], cache=cache)
        torch.testing.assert_close(logits, wanted[:, -1:], rtol=0, atol=1e-4)
        cache.rewind(1)


@torch.no_grad()
def test_a_draft_block_is_saved_with_its_model(load_with_draft, tmp_path: Path) -> None:
    (model, _), tokens = load_with_draft(FLASH), prompt(20)
    model.save_pretrained(tmp_path)
    again = kvell.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, tensor), (_, other) in zip(again.named_tensors(), model.named_tensors(), strict=True):
        assert torch.equal(tensor, other), name
    theirs, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(
        logits_without_cache(theirs.eval(), tokens), logits_without_cache(reference(FLASH), tokens), rtol=0, atol=1e-5
    )
