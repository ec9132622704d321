"""Presets: which modules of a model stay in BF16, as TOML data. No Python is needed to add one."""

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modelopt_convert.errors import InputError
from modelopt_convert.patterns import check_pattern

Algorithm = Literal["nvfp4", "fp8"]

_HERE = Path(__file__).resolve().parent
# In the wheel the TOML files lie inside the package; in a checkout, beside it. Nowhere else is looked.
_FOLDERS = (_HERE / "presets", _HERE.parent / "presets")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeepRules(_Strict):
    """What stays in BF16 for one algorithm, and what that choice rests on."""

    status: Literal["validated", "candidate", "known_broken"] = Field(description="what the set rests on")
    source: str = Field(description="where the set comes from")
    min_gpu: str = Field(description="smallest GPU that runs the result")
    known_limits: list[str] = Field(description="what a user should know before building")
    structural: list[str] = Field(description="module globs that the runtime cannot load packed")
    quality: list[str] = Field(description="module globs kept for quality")

    @field_validator("structural", "quality")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns


class Preset(_Strict):
    """One model family's preset; the TOML file has these fields."""

    schema_: Literal[1] = Field(alias="schema", description="version of the preset language")
    name: str = Field(description="what --preset takes")
    title: str = Field(description="the model's name for people")
    class_name: str = Field(description="_class_name of the transformer's config.json")
    base_repo: str = Field(description="Hub id of the base model")
    repos: list[str] = Field(description="Hub ids the preset fits")
    pipeline_tag: str = Field(description="the Hub's pipeline tag")
    modelopt_model: str | None = Field(
        default=None, description="--model of ModelOpt's quantize.py that makes the export"
    )
    load_flag: str = Field(description="SGLang's flag that loads the result")
    fused: list[list[str]] = Field(description="sibling modules that the runtime may fuse")
    keep_fp32: list[str] = Field(description="globs over tensor names that stay in F32 where the base holds F32")
    config: dict[str, bool | int | float | str] = Field(description="config.json values that single this model out")
    runtime_names: dict[str, str] = Field(description="disk name = runtime name, * for one segment")
    nvfp4: KeepRules | None = None
    fp8: KeepRules | None = None

    @field_validator("schema_", mode="before")
    @classmethod
    def _version(cls, version: object) -> object:
        if type(version) is not int:  # True and 1.0 equal 1
            raise ValueError("must be the integer 1")
        return version

    @field_validator("keep_fp32")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    @field_validator("runtime_names")
    @classmethod
    def _stars(cls, names: dict[str, str]) -> dict[str, str]:
        for disk, runtime in names.items():
            if disk.split(".").count("*") != runtime.split(".").count("*"):
                raise ValueError(f"{disk!r} and {runtime!r} must have the same number of * segments")
        return names

    def rules(self, algorithm: Algorithm) -> KeepRules:
        """The keep sets of one algorithm.

        Raises:
            InputError: ``preset.algorithm``: the preset has none.
        """
        found = self.sets().get(algorithm)
        if found is None:
            raise InputError(
                f"preset {self.name}: has no {algorithm} section",
                code="preset.algorithm",
                hint="write one in a TOML of your own and give its path to --preset",
            )
        return found

    def sets(self) -> dict[Algorithm, KeepRules]:
        """The keep sets there are, by algorithm."""
        found: dict[Algorithm, KeepRules | None] = {"nvfp4": self.nvfp4, "fp8": self.fp8}
        return {algorithm: rules for algorithm, rules in found.items() if rules is not None}

    def recipe(self) -> list[str]:
        """The commands of ModelOpt's examples/diffusers/quantization that make the exports, as lines of text."""
        if self.modelopt_model is None:
            return []
        formats = {"nvfp4": "fp4", "fp8": "fp8"}
        lines = ["The exports come from ModelOpt's examples/diffusers/quantization. Its default dtype is Half:"]
        for algorithm in self.sets():
            lines.append(
                f"python quantize.py --model {self.modelopt_model} --override-model-path {self.base_repo} "
                f"--model-dtype BFloat16 --format {formats[algorithm]} --batch-size 1 --calib-size 128 --n-steps 20 "
                f"--quantized-torch-ckpt-save-path out/ckpt --hf-ckpt-dir out/hf"
            )
        return lines

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this model: same class, and the values that single it out."""
        same = config.get("_class_name") == self.class_name
        return same and all(config.get(key) == value for key, value in self.config.items())


class LoadedPreset(_Strict):
    """A preset with its text and where it came from."""

    preset: Preset
    text: str
    path: str

    @property
    def sha256(self) -> str:
        """Digest of the TOML text, recorded in mopt.json."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def parse_preset(text: str, *, path: str) -> LoadedPreset:
    """Parse and validate a preset.

    Raises:
        InputError: ``preset.toml``, ``preset.field`` or ``preset.pattern``.
    """
    try:
        preset = Preset.model_validate(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise _field_error(error, path) from error
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path}: not TOML: {reason}", code="preset.toml", path=path, hint="mend the file") from error
    return LoadedPreset(preset=preset, text=text, path=path)


def _field_error(error: ValidationError, path: str) -> InputError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return InputError(
        f"{path}: {where}: {first['msg']} ({error.error_count()} in all)",
        code="preset.field",
        path=path,
        hint="`mopt presets flux1-dev` prints a whole one to start from",
    )


def preset_names() -> list[str]:
    """Names of the presets that come with mopt, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_preset(name: str) -> LoadedPreset:
    """A preset by name, or by path if ``name`` has a slash or ends in ``.toml``.

    Raises:
        InputError: ``preset.unknown`` or what ``parse_preset`` raises.
    """
    is_path = "/" in name or name.endswith(".toml")
    path = Path(name) if is_path else _folder() / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a path with a NUL
        known = ", ".join(preset_names())
        raise InputError(
            f"preset {name!r}: {'cannot be read' if is_path else 'is not one that comes with mopt'}",
            code="preset.unknown",
            path=str(path) if is_path else None,
            hint=f"known are {known}; a path to a TOML of your own must have a / or end in .toml",
        ) from error
    return parse_preset(text, path=name)


def choose_preset(config: Mapping[str, Any], algorithm: Algorithm) -> tuple[LoadedPreset, tuple[str, ...]]:
    """The preset for a config.json, when the user named none.

    Returns:
        The preset, and the names of the others that fit with equal rules.

    Raises:
        InputError: ``preset.none_fits``, or ``preset.ambiguous`` if several fit and their rules differ.
    """
    loaded = [load_preset(name) for name in preset_names()]
    fitting = [one for one in loaded if one.preset.fits(config) and algorithm in one.preset.sets()]
    names = tuple(one.preset.name for one in fitting)
    if not fitting:
        raise InputError(
            f"no preset fits {config.get('_class_name')!r}",
            code="preset.none_fits",
            hint=f"name one of {', '.join(preset_names())}, a TOML of your own, or --preset none with --keep-bf16",
        )
    sets = {_rule_key(one.preset, algorithm) for one in fitting}
    if len(sets) > 1:
        raise InputError(
            f"several presets fit {config.get('_class_name')!r}: {', '.join(names)}",
            code="preset.ambiguous",
            hint=f"name one: --preset {names[0]}",
        )
    return fitting[0], names[1:]


def _rule_key(preset: Preset, algorithm: Algorithm) -> str:
    rules = preset.rules(algorithm)
    return repr((rules.structural, rules.quality, preset.keep_fp32, preset.fused, preset.runtime_names))


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())
