"""Where shards are written: on threads of this process, or as tasks of a Ray cluster that runs already. No torch."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Literal

from modelopt_convert.checkpoint.location import Location
from modelopt_convert.run.errors import InputError
from modelopt_convert.write.stream import Executor, on_threads

ExecutorName = Literal["threads", "ray"]


def refuse_far(name: ExecutorName, *inputs: Location | None) -> None:
    """Refuse inputs that the nodes of a cluster cannot open as files.

    Raises:
        InputError: ``executor.hub_input``.
    """
    far = [one for one in inputs if one is not None and not isinstance(one, Path)]
    if name == "ray" and far:
        raise InputError(
            f"{far[0]}: --executor ray reads inputs on every node, and so takes local paths only",
            code="executor.hub_input",
            hint=f"fetch it to where every node sees it: {far[0].download_command()}",
        )


@contextmanager
def open_executor(name: ExecutorName) -> Iterator[Executor]:
    """The executor of that name; a cluster is left again at the end.

    Raises:
        InputError: ``executor.not_installed``.
        RemoteError: ``executor.no_cluster``.
    """
    if name == "threads":
        yield on_threads
        return
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            f"--executor ray needs Ray, which cannot be imported: {error}",
            code="executor.not_installed",
            hint="pip install ray, or leave --executor out",
        ) from error
    from modelopt_convert.write.ray_cluster import connect, on_ray

    with redirect_stdout(sys.stderr):  # where Ray says that a worker died; stdout is the result's
        connect(ray)
        try:
            yield partial(on_ray, ray)
        finally:
            ray.shutdown()
