"""What is read first of tensors that are read whole later."""

from modelopt_convert.plan.prediction import GROWN_BYTES, grown


def test_readings_grow_to_what_lies_around_them_within_their_tensor() -> None:
    size = 5 * GROWN_BYTES // 2
    first = [("whole", 7, 2), ("whole", GROWN_BYTES - 1, 2), ("whole", size - 1, 1), ("part", 7, 2)]
    assert list(grown(first, [("whole", 0, size), ("another", 0, 9)])) == [
        ("whole", 0, GROWN_BYTES),
        ("whole", 0, 2 * GROWN_BYTES),
        ("whole", 2 * GROWN_BYTES, size - 2 * GROWN_BYTES),
        ("part", 7, 2),
    ]
