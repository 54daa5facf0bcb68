"""What evaluation says a model is worth, against its logits."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from test_training_tokens import brief, corpus, model_of
from tokenizer_kinds import END_OF_TEXT, like_gpt2, of_bytes, write

import kvell
from kvell import cli
from kvell.training.corpus import Document
from kvell.training.ends import put_first
from kvell.training.evaluation import evaluate_texts
from kvell.training.settings import TrainingConfig
from kvell.training.tokens import tokenise


def model_with(**changes: Any) -> kvell.Decoder:
    torch.manual_seed(1)
    model = kvell.Decoder(model_of(**changes))
    with torch.no_grad():  # so that tokens differ in what they cost
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def bits(model: kvell.Decoder, ids: list[int], scored: range) -> float:
    """What the tokens at some places cost, each given all before it."""
    with torch.no_grad():
        costs = -model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return sum(float(costs[place - 1, ids[place]]) for place in scored) / math.log(2)


def figures(model: kvell.Decoder, tokenizer: tokenizers.Tokenizer, texts: list[str], **more: Any) -> dict[str, Any]:
    documents = tokenise(tokenizer, [Document("", text) for text in texts], 320, END_OF_TEXT, measured=True)
    return evaluate_texts(model, documents, **more)


def begun_by_299() -> tokenizers.Tokenizer:
    tokenizer = like_gpt2()
    put_first(tokenizer, 299)
    return tokenizer


def test_behind_a_beginning_all_of_the_text_counts_and_the_end_does_not() -> None:
    """ "hehe!" is three tokens of 2, 2 and 1 bytes."""
    model, he, mark = model_with(), 256, like_gpt2().token_to_id("!")
    ids = [299, he, he, mark, END_OF_TEXT]
    found = figures(model, begun_by_299(), ["hehe!"])
    assert found["bits_per_byte"] == pytest.approx(bits(model, ids, range(1, 4)) / 5, rel=1e-5)
    assert found["nats_per_end"] == pytest.approx(bits(model, ids, range(4, 5)) * math.log(2), rel=1e-5)
    assert (found["bytes"], found["documents"], found["tokens"]) == (5, 1, 4)


def test_without_a_beginning_the_first_token_s_bytes_do_not_count() -> None:
    model, he, mark = model_with(), 256, like_gpt2().token_to_id("!")
    found = figures(model, like_gpt2(), ["hehe!"])
    assert found["bits_per_byte"] == pytest.approx(
        bits(model, [he, he, mark, END_OF_TEXT], range(1, 3)) / 3, rel=1e-5
    )


def test_a_document_that_is_cut_counts_the_bytes_that_were_seen() -> None:
    """Not the share of its bytes that its share of tokens would be: "he" has two, every other token one."""
    model, he = model_with(), 256
    a, b = (like_gpt2().token_to_id(letter) for letter in "ab")
    found = figures(model, begun_by_299(), ["abhehehe"], length=4)
    assert found["bits_per_byte"] == pytest.approx(bits(model, [299, a, b, he], range(1, 4)) / 4, rel=1e-5)
    assert found["nats_per_end"] is None


def test_short_documents_cost_no_more_for_having_ends() -> None:
    """A model that gives every token the same probability: log2(320) bits for every byte, however texts are cut."""
    model = model_with()
    with torch.no_grad():
        model.embedding.weight.zero_()
    for size in (2, 10, 200):
        found = figures(model, of_bytes(), ["x" * size] * 3)
        assert found["bits_per_byte"] == pytest.approx(math.log2(320), rel=1e-6)


def test_documents_beyond_the_model_s_positions_are_evaluated_in_pieces_that_are_said() -> None:
    """8 positions, 21 tokens: three pieces, each without what stood before it."""
    model, text = model_with(max_positions=8), "the cat sat on a mat"
    ids = [299, *begun_by_299().encode(text, add_special_tokens=False).ids, END_OF_TEXT]
    assert len(ids) == 21
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = figures(model, begun_by_299(), [text])
    pieces = [(ids[0:9], range(1, 9)), (ids[8:17], range(1, 9)), (ids[16:21], range(1, 4))]
    expected = sum(bits(model, piece, scored) for piece, scored in pieces) / len(text)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert (found["in_pieces_of"], found["tokens"], found["documents"]) == (8, 20, 1)
    assert "in_pieces_of" not in figures(model_with(max_positions=20), begun_by_299(), [text])


def test_a_run_says_that_its_figure_is_of_pieces(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = corpus(tmp_path / "texts", {"d18.txt": 900, "d3.txt": 3000})
    values = brief(folder, tmp_path / "run", write(of_bytes(), tmp_path / "tokenizer"), evaluation={"every": 1})
    values["model"] = {**values["model"], "max_positions": 128}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(values))
    assert cli.main(["train", str(file)]) == 0
    said = capfd.readouterr().err
    assert re.search(r"held-out text: [\d.]+ bits per byte, in pieces of 128 tokens, the model's positions", said)
    assert "extrapolates" not in said


@pytest.mark.parametrize("length", [129, 1])
def test_evaluation_length_is_held_to_the_model_s_positions(length: int, tmp_path: Path) -> None:
    values = brief(tmp_path, tmp_path / "run", tmp_path, evaluation={"length": length})
    said = "evaluation.length: 129 is more than model.max_positions 128" if length > 1 else "evaluation.length: .* 2"
    with pytest.raises(kvell.ConfigError, match=said):
        TrainingConfig.of({**values, "model": model_of(max_positions=128)}, "run")


def test_evaluation_length_is_the_model_s_positions_where_those_are_few(tmp_path: Path) -> None:
    values = brief(tmp_path, tmp_path / "run", tmp_path, evaluation={})
    for positions, expected in ((128, 128), (8192, 4096)):
        config = TrainingConfig.of({**values, "model": model_of(max_positions=positions)}, "run")
        assert config.evaluation_length == expected
