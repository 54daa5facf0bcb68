"""The process behind `processes.Worker`: answers requests for one side until its stdin closes."""

import json
import os
import sys
import warnings

from benchmarks.llama_cpp import LlamaCppSide
from benchmarks.sides import SIDES


def main() -> None:
    # Answers have stdout for themselves: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    side = LlamaCppSide() if sys.argv[1] == "llama.cpp" else SIDES[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(side, request["method"])(**request["arguments"])}
        except Exception as error:  # whatever it is, the one who asked is told
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
