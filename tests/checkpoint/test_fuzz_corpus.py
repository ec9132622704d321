"""The cases from which fuzzing starts, and what it found, replayed; the fuzzer itself runs under ``make fuzz``."""

from collections import Counter
from pathlib import Path

import fuzz_header
import fuzz_index
from figures import note
from root import ROOT

CORPUS = ROOT / "tests" / "checkpoint" / "fuzz_corpus"


def cases(name: str) -> list[Path]:
    found = sorted((CORPUS / name).iterdir())
    assert 10 <= len(found) <= 50 and all(path.stat().st_size < 2000 for path in found)
    return found


def test_header_cases() -> None:
    seen = Counter(fuzz_header.check(path.read_bytes()) for path in cases("header"))
    assert seen["accepted"] >= 3 and len(seen) >= 8
    note(4, fuzz="header", cases=seen.total(), escapes=0)


def test_index_cases() -> None:
    seen = Counter(fuzz_index.check(path.read_bytes()) for path in cases("index"))
    assert seen["accepted"] >= 2 and {"index.json", "index.mismatch", "index.path_escape"} < seen.keys()
    note(4, fuzz="index", cases=seen.total(), escapes=0)
