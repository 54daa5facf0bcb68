"""generation_config.json: tokens that are never said, where a text ends, and how its makers sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_mocks import MockConfig, MockDraftingModel, MockModel, byte_level_backend
from oracle import GEMMA4, LAGUNA, gemma4, gemma4_tensors, laguna, laguna_tensors, prompt, write
from shape_checks import unchecked
from transformers import GenerationConfig

import kvell
from kvell.cli import main
from kvell.config import DraftConfig
from kvell.errors import CheckpointError, InputError
from kvell.generation import Sampler, SamplingSettings, generate

NEW_TOKENS = 24
FILE = "generation_config.json"


def said_by_transformers(model: Any, tokens: torch.Tensor, suppress: list[int]) -> list[int]:
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=suppress, pad_token_id=0, eos_token_id=None
    )
    with unchecked():
        made = model.generate(tokens, generation_config=config, attention_mask=torch.ones_like(tokens))
    return made[0, tokens.shape[1] :].tolist()


def released(family: str, folder: Path, generation: object) -> tuple[Any, Path]:
    """A family's model as transformers has it, and its folder with that generation_config.json."""
    fields = (GEMMA4 if family == "gemma4" else LAGUNA) | {"eos_token_id": None, "bos_token_id": None}
    theirs = gemma4(fields) if family == "gemma4" else laguna(fields)
    write(folder, fields, gemma4_tensors(theirs) if family == "gemma4" else laguna_tensors(theirs))
    (folder / FILE).write_text(json.dumps(generation))
    return theirs, folder


@pytest.mark.parametrize("family", ["gemma4", "laguna"])
def test_greedy_text_with_suppressed_tokens_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    theirs, _ = released(family, tmp_path / "free", {})
    tokens = prompt()
    free = said_by_transformers(theirs, tokens, [])
    suppress = [*sorted(set(free[:3])), 10**6]
    _, folder = released(family, tmp_path / "released", {"suppress_tokens": suppress})
    wanted = said_by_transformers(theirs, tokens, suppress)
    assert not set(suppress) & set(wanted)
    model = kvell.from_pretrained(folder)
    assert model.config.suppress_tokens == tuple(suppress)
    for speculate in ("off", "lookup"):
        assert list(generate(model, tokens[0], NEW_TOKENS, speculate=speculate)) == wanted
    assert list(generate(model, tokens[0], NEW_TOKENS, suppress_tokens=())) == free
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] in ("gemma4_text", "laguna"), "the family's own format has room for it"
    again = kvell.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert list(generate(again, tokens[0], NEW_TOKENS)) == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculate", ["off", "lookup", "mtp"])
def test_no_suppressed_token_is_chosen_or_drafted(speculate: Any, temperature: float) -> None:
    suppressed = tuple(range(0, 50, 2))
    model = MockDraftingModel(MockConfig(suppress_tokens=suppressed))
    plain = list(generate(model, [3, 2, 3], 40, temperature=temperature))
    pieces = list(generate(model, [3, 2, 3], 40, temperature=temperature, speculate=speculate))
    assert pieces == plain
    assert not set(suppressed) & set(pieces)
    if speculate == "mtp" and not temperature:
        assert sum(piece.drafted for piece in pieces) == 29, "three of four tokens: every draft is the model's choice"


def test_a_real_draft_block_drafts_what_the_model_may_say() -> None:
    from strategies import random_model
    from test_cache import small_config

    config = small_config(7, None)
    config = config.model_copy(update={"draft": DraftConfig(layer=config.layers[0])})
    model = random_model(config)
    kept = [5, 6, 7]
    suppressed = [token for token in range(31) if token not in kept]
    pieces = list(generate(model, [1, 2, 3], 30, speculate="mtp", suppress_tokens=suppressed))
    assert set(pieces) <= set(kept)
    assert pieces == list(generate(model, [1, 2, 3], 30, suppress_tokens=suppressed))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.0}], ids=str)
def test_what_is_left_is_drawn_as_if_the_suppressed_were_not_there(options: dict[str, Any]) -> None:
    logits = torch.tensor([9.0, 1.0, 8.0, 2.0, 0.5])
    sampler = Sampler(SamplingSettings(temperature=1.0, **options), [0, 2])
    drawn = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=5) / 4000
    expected = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5]).exp() * torch.tensor([0, 1, 0, 1, 1])
    if "top_p" in options:  # e^2 and e^1 are 0.82 of the sum of the three, so the third is needed
        expected = expected[:5]
    assert torch.allclose(drawn, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("suppress", "message"),
    [(range(50), "names the whole vocabulary"), ([-1], "at least 0, not -1"), (["a"], "a whole number, not 'a'")],
)
def test_tokens_that_cannot_be_suppressed_are_an_error_at_the_call(suppress: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(MockModel(MockConfig()), [1], suppress_tokens=suppress)


# Saving


def test_saving_keeps_a_folders_sampling_defaults_and_corrects_what_is_the_models(tmp_path: Path) -> None:
    _, folder = released("gemma4", tmp_path, {"suppress_tokens": [5], "top_k": 64, "eos_token_id": [1, 7]})
    model = kvell.from_pretrained(folder)
    model.save_pretrained(folder)
    assert json.loads((folder / FILE).read_text()) == {"suppress_tokens": [5], "top_k": 64, "eos_token_id": [1, 7]}
    model.config = model.config.model_copy(update={"suppress_tokens": (), "eos_token_ids": (1,)})
    model.save_pretrained(folder)
    assert kvell.from_pretrained(folder).config == model.config
    assert json.loads((folder / FILE).read_text()) == {"suppress_tokens": None, "top_k": 64, "eos_token_id": [1]}


def test_a_config_of_kvells_own_keeps_them_too(tmp_path: Path) -> None:
    from test_cache import small_config

    model = kvell.Decoder(small_config(4).model_copy(update={"suppress_tokens": (3, 4)}))
    model.save_pretrained(tmp_path)
    assert kvell.from_pretrained(tmp_path).config == model.config
    assert model.config.digest() == small_config(4).digest(), "they are no part of a token's logits"


# Sampling defaults


def defaults(folder: Path, values: object) -> kvell.GenerationDefaults:
    (folder / FILE).write_text(json.dumps(values))
    return kvell.GenerationDefaults.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "sampling"),
    [
        ({}, {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}),
        ({"temperature": 0.6, "top_k": 5}, {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}),
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
            {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": None},
        ),
        (
            {"do_sample": True, "temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0.1},
            {"temperature": 2.0, "top_k": None, "top_p": 1.0, "min_p": 0.1},
        ),
    ],
    ids=["an empty file", "greedy", "transformers' own defaults", "Gemma 4's", "no top_k"],
)
def test_sampling_defaults_are_those_of_transformers(
    values: dict[str, Any], sampling: dict[str, Any], tmp_path: Path
) -> None:
    assert defaults(tmp_path, values).sampling() == sampling
    # What transformers would do with the file: its warpers and their settings.
    theirs = GenerationConfig(**values)
    model = gemma4(GEMMA4)
    theirs, _ = model._prepare_generation_config(theirs)
    assert bool(theirs.do_sample) == (sampling["temperature"] > 0)
    if theirs.do_sample:
        assert (theirs.temperature, theirs.top_k or None) == (sampling["temperature"], sampling["top_k"])
        assert (theirs.top_p or 1) == (sampling["top_p"] or 1)


def test_a_folder_without_the_file_is_greedy(tmp_path: Path) -> None:
    assert kvell.GenerationDefaults.from_pretrained(tmp_path) == kvell.GenerationDefaults()


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("suppress_tokens", "5", "a token's id or a list of them"),
        ("suppress_tokens", [5, True], "a token's id or a list of them"),
        ("suppress_tokens", [-5], "a token's id or a list of them"),
        ("eos_token_id", 1.5, "a token's id or a list of them"),
        ("do_sample", "yes", "true or false"),
        ("temperature", "warm", "a number of at least 0"),
        ("temperature", -1, "a number of at least 0"),
        ("temperature", float("inf"), "a number of at least 0"),
        ("top_k", 1.5, "a whole number from 0 on"),
        ("top_p", 2, "a number above 0 and at most 1"),
        ("min_p", True, "a number between 0 and 1"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_with_the_file_and_the_key(
    key: str, value: object, wanted: str, tmp_path: Path
) -> None:
    _, folder = released("gemma4", tmp_path, {key: value})
    for read in (kvell.GenerationDefaults.from_pretrained, kvell.ModelConfig.from_pretrained, kvell.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        assert str(caught.value) == f"{folder / FILE}: {key} is {value!r}, wanted is {wanted}"


def test_what_the_file_asks_for_and_kvell_does_not_do_is_one_warning(tmp_path: Path) -> None:
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None}
    harmless = {"max_length": 99, "use_cache": False, "transformers_version": "5", "_from_model_config": True}
    asked = {
        "repetition_penalty": 1.1,
        "bad_words_ids": [[5]],
        "forced_bos_token_id": 3,
        "begin_suppress_tokens": [4],
    }
    _, folder = released("gemma4", tmp_path, neutral | harmless | asked)
    with pytest.warns(UserWarning, match=FILE) as caught:
        kvell.from_pretrained(folder)
    names = "repetition_penalty, bad_words_ids, forced_bos_token_id, begin_suppress_tokens"
    assert [str(one.message) for one in caught] == [
        f"{folder / FILE} asks for {names}, which Kvell does not do: texts may differ"
    ]


def test_nothing_is_said_of_a_file_that_asks_for_nothing_else(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """All that transformers itself writes for its defaults."""
    _, folder = released("gemma4", tmp_path, GenerationConfig(do_sample=True, top_k=64).to_dict())
    kvell.from_pretrained(folder)
    assert not list(recwarn)


# The command line


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """A model's folder, tokenizer and sampling defaults included."""
    from strategies import random_model
    from test_cache import small_config

    backend = byte_level_backend()
    config = small_config(7, None).model_copy(update={"vocab_size": backend.get_vocab_size()})
    random_model(config).save_pretrained(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def report(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["generate", str(folder), "--prompt", "the cat<eos>", "--max-new-tokens", "8", "--json", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_the_command_line_samples_as_the_file_says_and_flags_override_it(
    speaking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = report(speaking, capsys)
    assert greedy["sampling"] == {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0}
    values = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "suppress_tokens": greedy["token_ids"]}
    (speaking / FILE).write_text(json.dumps(values))
    sampled = report(speaking, capsys)
    assert sampled["sampling"] == {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": None, "seed": 0}
    assert sampled["suppress_tokens"] == greedy["token_ids"]
    assert not set(sampled["token_ids"]) & set(greedy["token_ids"])
    given = report(speaking, capsys, "--temperature", "0.7", "--top-k", "9", "--top-p", "0.9")
    assert given["token_ids"] == sampled["token_ids"]
    other = report(speaking, capsys, "--top-k", "1", "--min-p", "0.2", "--seed", "3")
    assert other["sampling"] == {"temperature": 0.7, "top_k": 1, "top_p": 0.9, "min_p": 0.2, "seed": 3}
    cold = report(speaking, capsys, "--temperature", "0")
    assert cold["token_ids"] == other["token_ids"], "the most probable token"
    assert main(["generate", str(speaking), "--prompt", "s", "--max-new-tokens", "2"]) == 0
    table = capsys.readouterr().err
    assert "temperature 0.7, top_k 9, top_p 0.9, seed 0" in table
    assert "never chosen" in table


def test_a_prompt_s_special_tokens_are_parsed_where_that_is_asked_for(
    speaking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, parsed = report(speaking, capsys), report(speaking, capsys, "--parse-special-tokens")
    assert text["prompt_tokens"] == parsed["prompt_tokens"] + len("<eos>") - 1


# The first token


@pytest.mark.parametrize(
    ("prompt_ids", "said"),
    [([0, 3], None), ([3, 0], "does not begin with BOS, token 0"), ([0, 0, 3], "begins with BOS, token 0, twice")],
)
def test_a_prompt_without_its_first_token_or_with_two_gets_one_hint(
    prompt_ids: list[int], said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    model = MockModel(MockConfig(bos_token_id=0))
    cache: Any = model.make_cache()
    first = list(generate(model, prompt_ids, 3, cache=cache))
    list(generate(model, first[-1:], 3, cache=cache))  # which goes on in the middle of a text
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (said is not None)
    assert said is None or said in messages[0]
