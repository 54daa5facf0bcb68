"""What measures Kvell: `python -m benchmarks`, or one goal's module alone, such as `python -m benchmarks.small_models`."""
