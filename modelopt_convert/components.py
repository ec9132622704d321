"""Which folder of a pipeline holds the transformer that a user means. No torch."""

from pathlib import Path

from modelopt_convert.errors import InputError

COMPONENTS = ("transformer", "transformer_2")


def resolve_component(path: Path, *, what: str) -> Path:
    """The transformer folder that a user means: ``path`` itself, or its ``transformer/``.

    Args:
        path: A component folder, or a pipeline folder holding one transformer.
        what: How messages call it: ``export`` or ``base``.

    Raises:
        InputError: Not a folder, nothing in it to load, or two transformers to choose from.
    """
    if not _is_dir(path):
        raise InputError(
            f"{what} {path}: no such folder",
            code="input.missing",
            path=str(path),
            hint="give a local folder: the transformer itself, or the pipeline that holds transformer/",
        )
    if (path / "config.json").is_file():
        return path
    found = [name for name in COMPONENTS if (path / name / "config.json").is_file()]
    if len(found) == 1:
        return path / found[0]
    if found:
        raise InputError(
            f"{what} {path}: expected one transformer, found {' and '.join(found)}",
            code="input.ambiguous",
            path=str(path),
            hint=f"name the one to build: {path / found[0]}",
        )
    raise InputError(
        f"{what} {path}: expected config.json here or in transformer/, found neither",
        code="input.missing",
        path=str(path),
        hint="give a diffusers transformer folder, or the pipeline that holds transformer/",
    )


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False
