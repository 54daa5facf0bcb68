"""What measures Kvell: `python -m benchmarks`, or one part such as `python -m benchmarks.growth`."""
