"""A folder with something wrong in it loads, or is refused in one line; `python -m tests.mutations` runs more."""

from collections import Counter

from mutations import run_all
from shape_checks import unchecked

CASES = range(200)


def test_mutated_folders_load_and_generate_or_are_refused_in_one_line() -> None:
    with unchecked():
        outcomes = list(run_all(CASES))
    failures = [f"{one.seed}: {one.mutations}\n{one.message}" for one in outcomes if one.result == "fails"]
    assert not failures, "\n".join(failures)
    # Neither all of them harmless nor all of them hopeless.
    assert min(Counter(one.result for one in outcomes)[result] for result in ("loads", "refused")) >= 20
