"""Who may import whom, read from the source."""

from rooms import PACKAGE, ROOMS, imported, modules, room


def test_no_room_imports_a_room_above_it() -> None:
    assert {room(path) for path in modules()} == set(ROOMS)
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in modules()
        for other in imported(path)
        if ROOMS.index(other) > ROOMS.index(room(path))
    ]
    assert wrong == []
