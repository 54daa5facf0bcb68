"""Documents as tokens, by whatever tokenizer: where they begin and end, which are too short, and which bytes of a
text its tokens stand for."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from test_training_stops import small_values
from tokenizer_kinds import END_OF_TEXT, KINDS, like_gemma, like_gpt2, of_bytes, with_gaps, write
from tokenizers import AddedToken, processors

import kvell
from kvell import cli
from kvell.training import loop
from kvell.training.corpus import Document
from kvell.training.ends import Ends, put_first
from kvell.training.settings import NewTokenizer
from kvell.training.tokens import LONGEST_WORD, read_tokenizer, tokenise, train_tokenizer, without_long_words

ATTENTION = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "rotary": {"kind": "default", "theta": 100.0}}
PLAIN = {
    "vocab_size": 320,
    "hidden_size": 8,
    "max_positions": 4096,
    "tied_head": True,
    "layers": [
        {
            "attention": {"kind": "grouped_query", "sliding_window": 16, **ATTENTION},
            "feed_forward": {"kind": "gated_mlp", "intermediate_size": 8},
        }
    ],
}


def model_of(**changes: Any) -> kvell.ModelConfig:
    return kvell.ModelConfig.from_dict({"model_type": "kvell", **PLAIN, **changes})


def corpus(folder: Path, sizes: dict[str, int]) -> Path:
    """Files of so many letters each; their names say on which side of a run they are."""
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name).write_text(("the cat sat, the end.\n" * (size // 22 + 1))[:size])
    return folder


# By their names' hashes texts/d7.txt and texts/d18.txt are held out, and the others not.
SIZES = {"d0.txt": 0, "d1.txt": 1, "d2.txt": 2, "d3.txt": 100_000, "d7.txt": 1, "d18.txt": 900}


def brief(folder: Path, out: Path, tokenizer: Path, **changes: Any) -> dict[str, Any]:
    """Two steps on a folder's texts."""
    values: dict[str, Any] = {
        "model": PLAIN,
        "tokenizer": str(tokenizer),
        "data": {"sources": [{"kind": "files", "paths": [str(folder)]}], "held_out": 0.1},
        "stages": [{"steps": 2, "length": 64, "tokens": 128}],
        "schedule": {"warmup": 0},
        "losses": {"balance": 0},
        "evaluation": {"every": 1, "tasks": [{"kind": "passkey"}], "cases": 1, "lengths": [300]},
    }
    return small_values(folder, out, **{**values, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_goes_through_training_evaluation_and_generation(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Documents of none, one, two and 100,000 tokens, on either side."""
    folder, out = corpus(tmp_path / "texts", SIZES), tmp_path / "run"
    (folder / "d6.txt").write_text("好")  # no token at all, for one of them
    file = tmp_path / "run.json"
    file.write_text(json.dumps(brief(folder, out, write(KINDS[kind](), tmp_path / "tokenizer"))))
    assert cli.main(["train", str(file)]) == 0
    figures = json.loads((out / "evaluation.json").read_text())
    assert 0 < figures["held_out"]["bits_per_byte"] < 20
    assert figures["held_out"]["bytes"] in range(898, 902)
    assert "held-out text: " in capfd.readouterr().err
    model, tokenizer = kvell.from_pretrained(out), kvell.Tokenizer.from_pretrained(out)
    pieces = list(kvell.generate(model, tokenizer.encode("the cat"), max_new_tokens=8, tokenizer=tokenizer))
    assert 1 <= len(pieces) <= 8
    assert cli.main(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "4"]) == 0


def test_a_corpus_of_documents_too_short_to_learn_from_is_refused(tmp_path: Path) -> None:
    """A tokenizer of bytes, and files of one letter: there is nothing to predict."""
    folder = corpus(tmp_path / "texts", {"a.txt": 1, "b.txt": 1, "c.txt": 1})
    values = brief(folder, tmp_path / "run", write(of_bytes(), tmp_path / "tokenizer"))
    with pytest.raises(kvell.InputError, match=r"no document makes two tokens, of 3 \(texts/a\.txt, texts/b\.txt, "):
        loop.train(loop.TrainingConfig.of({**values, "model": model_of()}, "run"))


def said_in(values: dict[str, Any]) -> list[str]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(loop.TrainingConfig.of({**values, "model": model_of()}, "run"))
    return [str(warning.message) for warning in caught]


def test_short_documents_are_left_out_in_one_warning_that_counts_them(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", {f"x{number}.txt": 1 for number in range(20)} | {"long.txt": 900})
    values = brief(folder, tmp_path / "run", write(of_bytes(), tmp_path / "tokenizer"), evaluation={})
    values["data"]["held_out"] = 0
    said = said_in(values)
    assert sum(line.startswith("left out: 20 documents make too few tokens") for line in said) == 1
    assert sum("nothing ends a document" in line for line in said) == 1


def test_held_out_text_of_one_token_is_said_to_be_none(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", {"d7.txt": 1, "d2.txt": 300})
    said = said_in(brief(folder, tmp_path / "run", write(of_bytes(), tmp_path / "tokenizer"), evaluation={}))
    assert any(line.startswith("no document is held out") for line in said)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()).keys() == {"steps", "tokens"}


def ends_in(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict[str, Any] | None, **model: Any) -> list[int]:
    """The ids of the document "he" where they are read from a folder."""
    write(tokenizer, folder, config)
    read = read_tokenizer(str(folder))
    ends = Ends.of(read, folder, model_of(**model))
    put_first(read, ends.bos)
    (document,) = tokenise(read, [Document("", "he")], 320, ends.eos)
    return document.ids.tolist()


HE_OF_GPT2 = 256


def test_the_config_s_ids_begin_and_end_documents(tmp_path: Path) -> None:
    he = like_gemma().token_to_id("he")
    assert ends_in(like_gemma(), tmp_path, None, eos_token_ids=[1, 106], bos_token_id=2) == [2, he, 1]
    assert ends_in(like_gpt2(), tmp_path, None, eos_token_ids=[300], bos_token_id=299) == [299, HE_OF_GPT2, 300]


def test_the_tokenizer_s_own_names_count_where_the_config_has_none(tmp_path: Path) -> None:
    he = like_gemma().token_to_id("he")
    assert ends_in(like_gemma(), tmp_path, {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}) == [2, he, 1]
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert ends_in(like_gpt2(), tmp_path, names) == [END_OF_TEXT, HE_OF_GPT2, END_OF_TEXT]
    assert ends_in(like_gpt2(), tmp_path, {**names, "add_bos_token": False}) == [HE_OF_GPT2, END_OF_TEXT]
    assert ends_in(with_gaps(), tmp_path, {"eos_token": "[end]"})[-1] == 4
    assert ends_in(of_bytes(), tmp_path, None, eos_token_ids=[256])[-1] == 256


def test_kvell_s_own_names_count_last(tmp_path: Path) -> None:
    own = train_tokenizer(NewTokenizer(vocab_size=300), ["he"])
    bare = ends_in(own, tmp_path, None)
    assert (bare[0], bare[-1]) == (own.token_to_id("<|bos|>"), own.token_to_id("<|eos|>"))
    assert ends_in(own, tmp_path, None, eos_token_ids=[299])[-1] == 299


def test_an_end_that_the_tokenizer_puts_is_not_put_twice(tmp_path: Path) -> None:
    both = like_gpt2()
    both.add_special_tokens([AddedToken("<s>", special=True)])
    specials = [("<s>", 258), ("<|endoftext|>", 257)]
    both.post_processor = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=specials)
    assert ends_in(both, tmp_path, {"eos_token": "<|endoftext|>"}) == [258, HE_OF_GPT2, 257]
    both.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=specials[1:])
    assert ends_in(both, tmp_path, {"eos_token": "<|endoftext|>", "bos_token": "<s>"}) == [258, HE_OF_GPT2, 257]


def test_an_end_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kvell.ConfigError, match=r"model\.eos_token_ids: 320 is no id of a vocabulary of 320"):
        ends_in(of_bytes(), tmp_path, None, eos_token_ids=[320])


def test_a_tokenizer_whose_highest_id_the_model_lacks_is_refused(tmp_path: Path) -> None:
    """31 tokens, but ids up to 94."""
    folder = corpus(tmp_path / "texts", {"a.txt": 100})
    values = brief(folder, tmp_path / "run", write(with_gaps(), tmp_path / "tokenizer"))
    with pytest.raises(kvell.InputError, match="the tokenizer has 95 tokens, the model only 90"):
        loop.train(loop.TrainingConfig.of({**values, "model": model_of(vocab_size=90)}, "run"))


def test_prompts_begin_as_documents_did_and_the_model_knows_its_ends(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "texts", {"a.txt": 300}), tmp_path / "run"
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    tokenizer = write(like_gpt2(), tmp_path / "tokenizer", names)
    values = brief(folder, out, tokenizer, evaluation={})
    config = loop.TrainingConfig.of({**values, "model": model_of()}, "run")
    training = loop.Training(config, loop.Processes.of(torch.device("cpu")), False, False)
    assert training.ends == Ends(END_OF_TEXT, END_OF_TEXT)
    assert training.model.config.eos_token_ids == (END_OF_TEXT,)
    assert training.model.config.bos_token_id == END_OF_TEXT
    training.run(lambda report: None)
    assert kvell.Tokenizer.from_pretrained(out).encode("he") == [END_OF_TEXT, HE_OF_GPT2]


def test_text_that_spells_a_special_token_and_a_file_s_truncation_change_no_document(tmp_path: Path) -> None:
    cut = like_gpt2()
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    write(cut, tmp_path)
    text = "he <|endoftext|> he"
    (document,) = tokenise(read_tokenizer(str(tmp_path)), [Document("", text)], 320, None)
    assert END_OF_TEXT not in document.ids
    assert len(document.ids) == len(text) - 2  # two of the bytes' pairs are one token


def measured(tokenizer: tokenizers.Tokenizer, text: str, eos: int | None, seen: int | None = None) -> Any:
    (document,) = tokenise(tokenizer, [Document("", text)], 320, eos, measured=True)
    return document.measured(seen)


def test_the_first_token_s_bytes_count_only_behind_a_beginning_and_the_end_s_nats_do_not(tmp_path: Path) -> None:
    """ "he" is one token of two bytes, é two tokens of one byte each."""
    own = train_tokenizer(NewTokenizer(vocab_size=300), ["x"])
    assert measured(own, "abc", own.token_to_id("<|eos|>")) == (1, 4, 3)
    assert measured(of_bytes(), "abc", None) == (1, 3, 2)
    assert measured(of_bytes(), "abc", 256) == (1, 3, 2)
    assert measured(like_gpt2(), "hehe!", END_OF_TEXT) == (1, 3, 3)
    assert measured(of_bytes(), "éab", None) == (2, 4, 2)


def test_a_cut_document_counts_the_bytes_of_whole_characters_before_the_cut() -> None:
    assert measured(of_bytes(), "abcdé", None, seen=3) == (1, 3, 2)
    assert measured(of_bytes(), "abcdé", None, seen=5) == (1, 4, 3)
    assert measured(of_bytes(), "abcdé", None) == (1, 6, 5)
    assert measured(of_bytes(), "a", None)[2] == measured(of_bytes(), "好", None)[2] == 0
    # Behind <bos>: 2 + 3 bytes that are a token each, then a space, "he", " the" and a line break.
    assert measured(like_gemma(), "é好 he the\n", 1) == (1, 10, 13)


def test_bytes_that_a_tokenizer_drops_count_with_the_text() -> None:
    assert measured(with_gaps(), "aé bXX", 4) == (1, 3, 6)


def test_the_tokenizer_of_ordinary_text_is_what_it_was_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the library's own sources, which have no word so long."""
    texts = [file.read_text() for file in sorted(Path(kvell.__file__).parent.rglob("*.py"))]
    bounded = train_tokenizer(NewTokenizer(vocab_size=700), texts).to_str()
    monkeypatch.setattr("kvell.training.tokens.without_long_words", lambda text: [text])
    assert train_tokenizer(NewTokenizer(vocab_size=700), texts).to_str() == bounded


@pytest.mark.parametrize(
    "word", ["a" * 5000, "ACGT" * 1250, "好" * 5000, "=-" * 2500, " " * 5000, "\x1c!" * 2500, "_" * 5000]
)
def test_long_words_are_learnt_from_in_parts(word: str) -> None:
    parts = list(without_long_words(f"say {word} here"))
    assert "".join(parts) == f"say {word} here"
    assert len(parts) == 5
    assert max(map(len, parts)) <= LONGEST_WORD + 5


@pytest.mark.parametrize("length", [LONGEST_WORD, LONGEST_WORD + 1])
def test_a_word_is_cut_when_it_is_longer_than_the_bound(length: int) -> None:
    assert len(list(without_long_words("b" * length))) == 1 + (length > LONGEST_WORD)
    assert list(without_long_words("word " * 9999)) == ["word " * 9999]


def test_a_word_of_two_megabytes_is_learnt_from_in_seconds() -> None:
    import random

    word = "".join(random.Random(0).choices("ACGT", k=2_000_000))
    started = time.monotonic()
    train_tokenizer(NewTokenizer(vocab_size=400), [word])
    assert time.monotonic() - started < 60
