"""A config in a released family's spelling: it is written so that it reads back the same, refused in words, or the
fault of the code that writes it, which nothing hides."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEEPSEEK_V4, GEMMA4, LAGUNA, ZAYA
from strategies import ATTENTIONS, CONNECTIONS, FEED_FORWARDS

import kvell
from kvell.checkpoint.saving import released_form
from kvell.families import FAMILIES, parse_config

CONFIGS = {"gemma4": GEMMA4, "laguna": LAGUNA, "zaya": ZAYA, "deepseek_v4": DEEPSEEK_V4}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_family_writes_any_config_or_says_that_it_has_no_spelling(family: str, data: st.DataObject) -> None:
    """Some or all of the family's own attentions and feed-forwards are replaced by those of a kind, any there is."""

    def either(own: Any, kind: Any) -> Any:
        return own if kind is None else data.draw(st.one_of(st.just(own), kind([])) if some else kind([]))

    config = parse_config(CONFIGS[family])
    attention = data.draw(st.sampled_from([None, *ATTENTIONS.values()]))
    feed_forward = data.draw(st.sampled_from([None, *FEED_FORWARDS.values()]))
    some = data.draw(st.booleans())
    layers = []
    for layer in config.layers:
        parts = {
            "attention": either(layer.attention, attention),
            "feed_forward": either(layer.feed_forward, feed_forward),
        }
        layers.append(layer.model_copy(update=parts))
    connection = data.draw(st.one_of(st.just(config.connection), *CONNECTIONS.values()))
    changed = config.model_copy(update={"layers": tuple(layers), "connection": connection})
    refusal = values = None
    try:
        values = FAMILIES[family].write_config(changed)
    except kvell.ConfigError as error:
        refusal = str(error)
    assert refusal.startswith(family) if refusal else values["num_hidden_layers"] == config.num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_config_reads_back_as_it_was_written(family: str) -> None:
    config = parse_config(CONFIGS[family])
    form = released_form(config)
    assert form is not None
    assert parse_config(form[0]) == config


@pytest.mark.parametrize("fault", [AttributeError, TypeError, KeyError])
def test_a_fault_in_a_familys_writer_is_not_taken_for_a_config_without_a_spelling(
    fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: kvell.ModelConfig) -> dict[str, Any]:
        raise fault("in the writer")

    model = kvell.Decoder(parse_config(LAGUNA))
    monkeypatch.setitem(FAMILIES, "laguna", replace(FAMILIES["laguna"], write_config=broken))
    with pytest.raises(fault, match="in the writer"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
