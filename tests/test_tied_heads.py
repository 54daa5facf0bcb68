"""A head that the config ties to the embedding: what a file holds of the two decides, as transformers has it."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from number_formats import E4M3_VALUES
from oracle import (
    DEEPSEEK_V4,
    GEMMA4,
    LAGUNA,
    ZAYA,
    deepseek_v4,
    deepseek_v4_tensors,
    gemma4,
    gemma4_tensors,
    laguna,
    laguna_tensors,
    logits_without_cache,
    prompt,
    write,
    yarn,
    zaya,
    zaya_tensors,
)
from safetensors.torch import load_file, save_file
from test_quantised import fp8, from_definition, scales_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvell

TIED = {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "gemma4": (GEMMA4 | TIED, gemma4, gemma4_tensors),
    "laguna": (LAGUNA | TIED | {"rope_parameters": yarn(attention_factor=1.0)}, laguna, laguna_tensors),
    "zaya": (ZAYA | TIED, zaya, zaya_tensors),
    "deepseek_v4": (DEEPSEEK_V4 | TIED, deepseek_v4, deepseek_v4_tensors),
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WARNING = "keeps the file's head, and is not tied"

each_family = pytest.mark.parametrize("family", FAMILIES)


def tied_files(family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a model whose head is its embedding."""
    config, build, tensors = FAMILIES[family]
    return config, tensors(build(config))


def loaded(folder: Path, **arguments: Any) -> tuple[kvell.Decoder, list[str]]:
    """A model, and the warnings of loading it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kvell.from_pretrained(folder, **arguments)
    return model, [str(one.message) for one in caught]


@torch.no_grad()
def assert_like_transformers(model: kvell.Decoder, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert model.config.tied_head == tied
    torch.testing.assert_close(model(prompt()), logits_without_cache(theirs, prompt()), rtol=0, atol=1e-4)


def assert_survives_saving(model: kvell.Decoder, folder: Path) -> None:
    model.save_pretrained(folder)
    again, told = loaded(folder)
    assert told == []
    assert again.config == model.config
    before, after = dict(model.named_tensors()), dict(again.named_tensors())
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@each_family
def test_another_head_in_the_file_is_the_models_and_a_warning_says_so(family: str, tmp_path: Path) -> None:
    config, tensors = tied_files(family)
    head = torch.randn_like(tensors[EMBEDDING]) / 8
    folder = write(tmp_path / "released", config, tensors | {HEAD: head})
    model, (told,) = loaded(folder)
    for word in (str(folder), HEAD, EMBEDDING, WARNING):
        assert word in told
    assert torch.equal(model.head.weight, head)
    assert_like_transformers(model, folder)
    assert_survives_saving(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"].startswith(family)


@each_family
def test_a_head_that_differs_in_one_bit_is_another(family: str, tmp_path: Path) -> None:
    config, tensors = tied_files(family)
    head = tensors[EMBEDDING].clone()
    head[-1, -1] = head[-1, -1].nextafter(torch.tensor(9.0))
    model, (told,) = loaded(write(tmp_path, config, tensors | {HEAD: head}))
    assert WARNING in told
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.embedding.weight, tensors[EMBEDDING])


@each_family
def test_a_head_that_repeats_the_embedding_is_tied_to_it(family: str, tmp_path: Path) -> None:
    config, tensors = tied_files(family)
    folder = write(tmp_path / "released", config, tensors | {HEAD: tensors[EMBEDDING].clone()})
    model, told = loaded(folder)
    assert told == []
    assert_like_transformers(model, folder)
    assert_survives_saving(model, tmp_path / "saved")
    assert HEAD not in load_file(tmp_path / "saved" / "model.safetensors")


@each_family
def test_a_head_stored_without_its_embedding_is_both(family: str, tmp_path: Path) -> None:
    """What stores shared memory once keeps one of its names, and not always the embedding's."""
    config, tensors = tied_files(family)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    folder = write(tmp_path / "released", config, tensors)
    model, told = loaded(folder)
    assert told == []
    assert torch.equal(model.embedding.weight, tensors[HEAD])
    assert_like_transformers(model, folder)
    assert_survives_saving(model, tmp_path / "saved")
    assert model.dtype == torch.float32
    assert kvell.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16


@each_family
def test_neither_head_nor_embedding_is_a_missing_embedding(family: str, tmp_path: Path) -> None:
    config, tensors = tied_files(family)
    del tensors[EMBEDDING]
    with pytest.raises(kvell.CheckpointError, match=f"missing tensor {EMBEDDING}"):
        kvell.from_pretrained(write(tmp_path, config, tensors))


@each_family
def test_a_config_that_does_not_tie_wants_both(family: str, tmp_path: Path) -> None:
    config, tensors = tied_files(family)
    for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        only = {key: tensor for key, tensor in tensors.items() if key != EMBEDDING} | {name: tensors[EMBEDDING]}
        with pytest.raises(kvell.CheckpointError, match=f"missing tensor {other}"):
            kvell.from_pretrained(write(tmp_path / name, config | {"tie_word_embeddings": False}, only))


@each_family
def test_a_head_of_another_shape_is_refused(family: str, tmp_path: Path) -> None:
    """So it is by transformers."""
    config, tensors = tied_files(family)
    folder = write(tmp_path, config, tensors | {HEAD: tensors[EMBEDDING][:-1]})
    with pytest.raises(kvell.CheckpointError, match=f"{HEAD} has the shape"):
        loaded(folder)


def test_the_same_head_in_another_dtype_is_kept_beside_the_embedding(tmp_path: Path) -> None:
    """Its values may be finer than the embedding's."""
    config, tensors = tied_files("laguna")
    rounded = {name: tensor if "bias" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    model, (told,) = loaded(write(tmp_path, config, rounded | {HEAD: tensors[EMBEDDING]}), dtype="float32")
    assert WARNING in told
    assert torch.equal(model.head.weight, tensors[EMBEDDING])
    assert torch.equal(model.embedding.weight, tensors[EMBEDDING].bfloat16().float())


def test_a_quantised_head_is_compared_with_its_scales(tmp_path: Path) -> None:
    config, tensors = tied_files("deepseek_v4")
    codes = torch.randint(0, 0x7F, (97, 32))
    embedding = {EMBEDDING: fp8(codes), "model.embed_tokens.scale": scales_of(torch.tensor([[120]]))}
    for exponent in (120, 121):
        head = {HEAD: fp8(codes), "lm_head.scale": scales_of(torch.tensor([[exponent]]))}
        folder = write(tmp_path / str(exponent), config, tensors | embedding | head)
        model, told = loaded(folder, dtype="float32")
        assert model.config.tied_head == (exponent == 120)
        assert len(told) == (exponent != 120)
        if not model.config.tied_head:
            wanted = from_definition(E4M3_VALUES, codes, torch.tensor([[exponent]]), (128, 128))
            assert torch.equal(model.head.weight, wanted.float())


def test_a_head_of_kvells_own_format_is_compared_too(tmp_path: Path) -> None:
    config = kvell.ModelConfig.from_pretrained(write_config(tmp_path / "config"))
    own = kvell.ModelConfig.from_dict(config.model_dump() | {"family": None})
    model = kvell.Decoder(own)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    assert "head.weight" not in tensors
    embedding = tensors["embedding.weight"]
    save_file(tensors | {"head.weight": embedding.clone()}, file)
    assert loaded(tmp_path / "saved")[1] == []
    save_file(tensors | {"head.weight": embedding * 2}, file)
    other, (told,) = loaded(tmp_path / "saved")
    assert WARNING in told
    assert torch.equal(other.head.weight, embedding * 2)
    del tensors["embedding.weight"]
    save_file(tensors | {"head.weight": embedding}, file)
    again, told_of_it = loaded(tmp_path / "saved")
    assert told_of_it == []
    assert torch.equal(again.embedding.weight, embedding)


def write_config(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["laguna"][0]))
    return folder


VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("inner", [None, True, False])
@pytest.mark.parametrize("outer", [None, True, False])
@torch.no_grad()
def test_of_a_multimodal_file_the_outer_flag_counts(outer: bool | None, inner: bool | None, tmp_path: Path) -> None:
    """With another head in the file, and, where that is tied, without one."""
    text = {name: value for name, value in GEMMA4.items() if name != "tie_word_embeddings"}
    config: dict[str, Any] = {
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": VISION,
        "audio_config": None,
    }
    if outer is not None:
        config["tie_word_embeddings"] = outer
    if inner is not None:
        text["tie_word_embeddings"] = inner
    tensors = gemma4_tensors(gemma4(GEMMA4), "model.language_model.")
    folder = write(tmp_path / "head", config, tensors | {HEAD: torch.randn(97, 32) / 8})
    model, told = loaded(folder)
    assert bool(told) == (outer is not False)
    assert_like_transformers(model, folder)
    folder = write(tmp_path / "none", config, tensors)
    if outer is False:
        with pytest.raises(kvell.CheckpointError, match=f"missing tensor {HEAD}"):
            kvell.from_pretrained(folder)
    else:
        assert_like_transformers(loaded(folder)[0], folder)


def test_a_head_in_another_shard_is_compared_with_the_embedding(tmp_path: Path) -> None:
    config, tensors = tied_files("gemma4")
    untied = config | {"tie_word_embeddings": False}
    model = kvell.from_pretrained(write(tmp_path / "released", untied, tensors | {HEAD: tensors[EMBEDDING].clone()}))
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=9000)
    weight_map = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map[HEAD] != weight_map[EMBEDDING]
    shutil.copytree(tmp_path / "saved", tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    again, told = loaded(tmp_path / "tied")
    assert told == []
    assert again.config.tied_head
