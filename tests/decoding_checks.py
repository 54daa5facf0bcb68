"""What decoding must give, however it is run: the logits of the model as it is."""

import torch
from strategies import VOCAB
from torch import Tensor

from kvell import Cache, Decoder


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def check_all_ways(model: Decoder, compiled: Decoder) -> None:
    """After a prompt, after taking tokens back, and in a batch of two lengths."""
    tokens = draw_tokens(2, 23).to(model.device)
    with torch.no_grad():
        caches = [compiled.make_cache(max_rewind=2), compiled.make_cache(max_rewind=2)]
        for row, (cache, prompt) in enumerate(zip(caches, (9, 2), strict=True)):
            expected = model(tokens[row : row + 1])
            compiled(tokens[row : row + 1, :prompt], cache=cache)
            for at in (*range(prompt, prompt + 6), None, *range(prompt + 4, prompt + 6)):
                if at is None:
                    cache.rewind(2)
                else:
                    logits = compiled(tokens[row : row + 1, at : at + 1], cache=cache)
                    assert_same(logits, expected[:, at : at + 1])
        batch = Cache.merge(caches)
        for step in range(6):
            both = torch.stack([tokens[0, 15 + step : 16 + step], tokens[1, 8 + step : 9 + step]])
            logits = compiled(both, cache=batch)
            for row, at in enumerate((15 + step, 8 + step)):
                assert_same(logits[row, 0], model(tokens[row : row + 1, : at + 1])[0, -1])
