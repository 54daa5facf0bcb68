"""Text to tokens and back, whole and while it arrives."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from generation_mocks import byte_fallback_backend, byte_level_backend, metaspace_backend, word_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, processors
from transformers import AutoTokenizer

from kvell.errors import CheckpointError, InputError
from kvell.generation import StopStrings, TextStream, Tokenizer, Transcript

TOKENIZERS = {
    "byte level": Tokenizer(byte_level_backend()),
    # The library decodes the é of an added token as the byte 0xE9, so this text does not survive.
    "byte level, added é": Tokenizer(byte_level_backend(added=["déjà"])),
    "byte fallback": Tokenizer(byte_fallback_backend()),
    "metaspace": Tokenizer(metaspace_backend()),
    "words": Tokenizer(word_backend()),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
BYTE_LEVEL = TOKENIZERS["byte level"]

awkward = st.sampled_from(
    [
        "🙂",
        "👩\u200d👩\u200d👧",
        "🇸🇪",
        "e\u0301",
        "ก็",
        "\ufffd",
        "日本語",
        " the cat",
    ]  # joined, combined, replaced, added
)
texts = st.lists(st.text(max_size=8) | awkward, max_size=12).map("".join)


def released(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids] + [stream.flush()]


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Special tokens, bytes that are not UTF-8 and ids that stand for nothing among them."""
    size = tokenizer._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=40))
    assert "".join(released(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_any_text_survives(text: str) -> None:
    assert "".join(released(BYTE_LEVEL, BYTE_LEVEL.encode(text))) == text


@settings(max_examples=300, deadline=None)
@given(text=texts.map(lambda text: text.replace("\N{REPLACEMENT CHARACTER}", "")))
def test_a_character_is_released_as_soon_as_it_is_whole(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    stream, shown = TextStream(BYTE_LEVEL), ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        assert shown == BYTE_LEVEL.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_unfinished_character_becomes_the_replacement_character_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("a🙂", add_special_tokens=False)[:-1]
    assert released(BYTE_LEVEL, ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_run_of_byte_tokens_is_released_when_it_ends() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer._backend.token_to_id(token) for token in ("<0xE2>", "<0x82>", "<0xAC>", "▁cat")]
    assert released(tokenizer, ids) == ["", "", "", "€ cat", ""]


@every_tokenizer
def test_the_work_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = 0

    def counting(join: Callable[[list[str]], str]) -> Callable[[list[str]], str]:
        def count(tokens: list[str]) -> str:
            nonlocal joined
            joined += len(tokens)
            return join(tokens)

        return count

    monkeypatch.setattr(tokenizer, "join", counting(tokenizer.join))
    vocabulary = tokenizer._backend.get_vocab_size()
    released(tokenizer, [(7 * step) % vocabulary for step in range(5000)])
    assert joined <= 4 * 5000


# Stop strings


def shown_by_hand(text: str, stop: list[str]) -> tuple[str, bool]:
    """Reads one character at a time and ends when the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [len(candidate) for candidate in stop if text[:end].endswith(candidate)]
        if found:
            return text[: end - max(found)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stop: list[str]) -> None:
    strings = StopStrings(stop)
    shown, arrived = "", ""
    for piece in pieces:
        shown, arrived = shown + strings.push(piece), arrived + piece
        expected, stopped = shown_by_hand(arrived, stop)
        assert strings.stopped == stopped
        held = expected[len(shown) :]
        assert expected.startswith(shown)
        if stopped:
            assert held == "", "what stands before a stop string is released with it"
        else:
            beginnings = [text for text in (expected[i:] for i in range(len(expected))) if is_beginning(text, stop)]
            assert held == max(beginnings, key=len, default=""), "only a possible beginning is held back"
    assert shown + strings.flush() == shown_by_hand(arrived, stop)[0]


def is_beginning(text: str, stop: list[str]) -> bool:
    return any(candidate.startswith(text) for candidate in stop)


def test_nothing_is_shown_after_a_stop_string() -> None:
    strings = StopStrings(["END"])
    assert [strings.push(text) for text in ("go E", "ND on", " END", "x")] == ["go ", "", "", ""]
    assert strings.stopped
    assert strings.flush() == ""


def test_a_special_token_as_a_stop_string_stops_at_that_token() -> None:
    transcript = Transcript(BYTE_LEVEL, ["<eos>", "cats"])
    shown = [transcript.push(token) for token in BYTE_LEVEL.encode("a cat<eos>", parse_special_tokens=True)]
    assert transcript.stopped
    assert "".join(shown) == "a cat", "the beginning of the other stop string is shown after all"


# Tokenizer


def saved(backend: tokenizers.Tokenizer, directory: Path, config: object = None) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no tokenizer.json in {tmp_path}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000])
def test_a_damaged_tokenizer_config_is_named(content: str, tmp_path: Path) -> None:
    saved(byte_level_backend(), tmp_path).joinpath("tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>", "special": True}], ids=["text", "token"])
def test_the_first_token_is_added_where_the_config_asks_for_it(tmp_path: Path, bos: object) -> None:
    saved(byte_level_backend(), tmp_path, {"add_bos_token": True, "bos_token": bos})
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("") == [0]
    assert tokenizer.encode("cat") == [0, *BYTE_LEVEL.encode("cat")]
    assert tokenizer.encode("<bos>cat", parse_special_tokens=True) == tokenizer.encode("cat"), "but not twice"
    assert tokenizer.encode("cat", add_special_tokens=False) == BYTE_LEVEL.encode("cat")


@pytest.mark.parametrize("config", [None, {"add_bos_token": False, "bos_token": "<bos>"}], ids=str)
def test_no_token_is_added_where_nothing_asks_for_it(tmp_path: Path, config: object) -> None:
    tokenizer = Tokenizer.from_pretrained(saved(byte_level_backend(), tmp_path, config))
    assert tokenizer.encode("cat") == BYTE_LEVEL.encode("cat")


def test_a_first_token_that_does_not_exist_is_named(tmp_path: Path) -> None:
    saved(byte_level_backend(), tmp_path, {"add_bos_token": True, "bos_token": "<s>"})
    with pytest.raises(CheckpointError, match="'<s>' is not in the vocabulary"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_post_processor_adds_its_tokens_once(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    saved(backend, tmp_path, {"add_bos_token": True, "bos_token": "<bos>"})
    assert Tokenizer.from_pretrained(tmp_path).encode("cat") == [0, *BYTE_LEVEL.encode("cat")]


def test_special_tokens_are_not_part_of_the_text() -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("<bos>the cat<eos>", parse_special_tokens=True)) == "the cat"


@pytest.mark.parametrize("backend", [byte_level_backend, byte_fallback_backend])
def test_text_that_spells_a_special_token_is_text(
    backend: Callable[[], tokenizers.Tokenizer], tmp_path: Path
) -> None:
    """A line of a program that names the end is no end."""
    text = 'END = "<eos>" + "<bos>"'
    for tokenizer in (Tokenizer(backend()), Tokenizer.from_pretrained(saved(backend(), tmp_path))):
        assert not {0, 1} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode("s<eos>")) == "s<eos>"
        parsed = tokenizer.encode("s<eos>s", parse_special_tokens=True)
        assert parsed == [*tokenizer.encode("s"), 1, *tokenizer.encode("s")]
        assert not {0, 1} & set(tokenizer.encode(text)), "what one call asks for is not the next one's"


def test_threads_that_parse_and_threads_that_do_not_stay_apart() -> None:
    tokenizer = pickle.loads(pickle.dumps(BYTE_LEVEL))
    text, wanted = "s<eos>s", {parse: BYTE_LEVEL.encode("s<eos>s", parse_special_tokens=parse) for parse in (0, 1)}
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda turn: tokenizer.encode(text, parse_special_tokens=turn % 2), range(2000)))
    assert made == [wanted[turn % 2] for turn in range(2000)]


def test_the_models_own_first_token_does_not_rest_on_parsing(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    asked = {"add_bos_token": True, "bos_token": "<bos>"}
    for number, (one, config) in enumerate([(backend, None), (byte_level_backend(), asked)]):
        (folder := tmp_path / str(number)).mkdir()
        ids = Tokenizer.from_pretrained(saved(one, folder, config)).encode("<bos>cat")
        assert ids == [0, *BYTE_LEVEL.encode("<bos>cat")]


# What a folder's two files say, beside transformers


def added(content: str, **flags: bool) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


NEXT = byte_level_backend().get_vocab_size()
TOKENIZER_CONFIGS: dict[str, dict[str, object]] = {
    "nothing": {},
    "a special token": {"added_tokens_decoder": {str(NEXT): added("<turn>")}},
    "a token that is text": {"added_tokens_decoder": {str(NEXT): added("<turn>", special=False)}},
    "one that takes the space before it": {"added_tokens_decoder": {str(NEXT): added("<turn>", lstrip=True)}},
    "two, the later first": {"added_tokens_decoder": {str(NEXT + 1): added("cat"), str(NEXT): added("<turn>")}},
    "one that tokenizer.json has": {"added_tokens_decoder": {"1": added("<eos>")}},
    "one that tokenizer.json has as text": {"added_tokens_decoder": {str(NEXT - 1): added("日本語")}},
    "one that tokenizer.json has as special": {"added_tokens_decoder": {"1": added("<eos>", special=False)}},
    "a name for a word of the vocabulary": {"eos_token": "Ġthe"},
    "a name for an added token": {"image_token": "日本語"},
}


@pytest.mark.parametrize("config", TOKENIZER_CONFIGS.values(), ids=TOKENIZER_CONFIGS.keys())
def test_tokens_are_those_that_transformers_reads(config: dict[str, object], tmp_path: Path) -> None:
    saved(byte_level_backend(), tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    text = "the <turn>日本語 cat<eos> Ġthe"
    assert ours.encode(text, parse_special_tokens=True) == theirs(text).input_ids
    assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
    ids = list(range(NEXT + 2))
    for token in ids:
        assert ours.decode([token]) == theirs.decode([token], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"5": added("<eos>")}, r"lists '<eos>' under 5, but with tokenizer.json it is 1"),
        ({str(NEXT + 3): added("<turn>")}, rf"lists '<turn>' under {NEXT + 3}, but with tokenizer.json it is {NEXT}"),
        (["<turn>"], r"is \['<turn>'\], wanted is an object of tokens by their ids"),
        ({"last": added("<turn>")}, "has 'last' where a token's id is wanted"),
        ({str(NEXT): "<turn>"}, f"lists '<turn>' under {NEXT}, wanted is a token's content"),
        ({str(NEXT): {"content": 3}}, f"lists {{'content': 3}} under {NEXT}, wanted is"),
        ({str(NEXT): added("<turn>") | {"special": 3}}, f"special of {NEXT} is 3, not a flag"),
    ],
)
def test_added_tokens_that_cannot_be_are_one_line(tokens: object, message: str, tmp_path: Path) -> None:
    saved(byte_level_backend(), tmp_path, {"added_tokens_decoder": tokens})
    where = r"tokenizer_config\.json: added_tokens_decoder"
    with pytest.raises(CheckpointError, match=f"{where}:? .*{message}") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncation_and_padding_of_whoever_used_the_file_last_are_taken_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    saved(backend, tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    for text in ("the cat sat on the mat, and the dog did not", "s"):
        assert tokenizer.encode(text) == BYTE_LEVEL.encode(text) == theirs(text).input_ids


def test_a_lone_surrogate_and_what_is_no_text_are_errors() -> None:
    with pytest.raises(InputError, match="the text must be a string, not int"):
        BYTE_LEVEL.encode(5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lone surrogate"):
        BYTE_LEVEL.encode("caf\udce9")


def test_a_decoder_that_cannot_be_followed_is_refused() -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(CheckpointError, match="ByteLevel then Strip"):
        Tokenizer(backend)


def test_a_byte_level_decoder_alone_in_a_sequence_is_byte_level() -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert Tokenizer(backend).is_byte_level
