"""What a task reads of an input, for a process that has not opened it: the headers are not parsed again. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.recipe import recipe_of
from modelopt_convert.plan.plan import Origin
from modelopt_convert.plan.prediction import step_readings
from modelopt_convert.proof.due import due_readings
from modelopt_convert.write.recipe_data import from_data, to_data
from modelopt_convert.write.task import ShardTask


@dataclass(frozen=True, slots=True)
class SourcePart:
    """Some tensors of a checkpoint on disk.

    Attributes:
        folder: The checkpoint, as an absolute path.
        tensors: Those tensors, without their recipes.
        recipes: Of those that are no stretch of a file, by name, as ``recipe_data`` writes them.
        files: Size and modification time (ns) of each file that holds one, as they were when it was first opened.
    """

    folder: Path
    tensors: tuple[TensorInfo, ...]
    recipes: Mapping[str, Any]
    files: Mapping[str, tuple[int, int]]


def part_of(reader: CheckpointReader, origin: Origin, task: ShardTask) -> SourcePart:
    """What a task reads of one input.

    Args:
        reader: The input, on disk.
        origin: Which input it is.
        task: Is done elsewhere.
    """
    assert isinstance(reader.folder, Path)
    steps = step_readings(task.steps, origin, reader.tensors)
    compared = due_readings(task.due, origin, reader.tensors)
    names = dict.fromkeys(name for name, _, _ in (*steps, *compared))
    tensors = tuple(reader.tensors[name] for name in names)
    read = {one.file for info in tensors for one in recipe_of(info).extents(0, info.num_bytes)}
    recipes = {info.name: to_data(info.recipe) for info in tensors if info.recipe is not None}
    files: dict[str, tuple[int, int]] = {}
    for name in sorted(read):
        file = reader.opened(name)
        assert isinstance(file, LocalFile)
        files[name] = file.state
    plain = tuple(replace(info, recipe=None) for info in tensors)
    return SourcePart(reader.folder.absolute(), plain, recipes, files)


class PartReader(CheckpointReader):
    """Reads a part of a checkpoint; a context manager, as its base."""

    def __init__(self, part: SourcePart) -> None:
        """Open the files.

        Raises:
            InputError: ``input.changed`` if one is not the file that was opened first; or as ``LocalFile``.
        """
        self._part = part
        super().__init__(part.folder, need_config=False)

    def _open_folder(self, need_config: bool) -> dict[str, bytes]:
        """The files that are needed, instead of all; their headers were checked by whoever made the part."""
        for name, state in self._part.files.items():
            self._files[name] = LocalFile(self._part.folder, name, state=state)
        made = {name: from_data(data) for name, data in self._part.recipes.items()}
        self.tensors = {info.name: replace(info, recipe=made.get(info.name)) for info in self._part.tensors}
        return {}
