"""Presets: which modules of a model stay in BF16, as TOML data. No Python is needed to add one."""

import hashlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from modelopt_convert.checkpoint.location import is_far, read_small
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.patterns import check_pattern, stars
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.text import nearest

# A license belongs to one model's weights. A preset that extends another has its architecture, maybe not its license.
_NOT_INHERITED = ("license", "license_name", "license_link")
_MAX_BYTES = 1 << 20
_LONGEST_CHAIN = 32  # of presets that extend one another
_HERE = Path(__file__).resolve().parent
# In the wheel the TOML files lie inside the package; in a checkout, beside it. No other place is searched.
_FOLDERS = (_HERE / "toml", _HERE.parent.parent / "presets")
_Globs = list[Annotated[str, AfterValidator(check_pattern)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


class KeepRules(_Strict):
    """What stays in BF16 for one algorithm, and what that choice rests on."""

    status: Literal["validated", "candidate"] = Field(description="what the set rests on")
    source: str = Field(description="where the set comes from")
    min_gpu: str = Field(description="smallest GPU that runs the result")
    known_limits: list[str] = Field(description="what a user should know before building")
    export_limits: list[str] = Field(default=[], description="what a user should know of ModelOpt's exports")
    structural: _Globs = Field(description="module globs that the runtime cannot load packed")
    quality: _Globs = Field(description="module globs kept for quality")


# A table for each format that there is: a new format needs no line here.
_Sets = create_model(
    "_Sets",
    __base__=_Strict,
    **{
        algorithm: (KeepRules | None, Field(default=None, description=f"the keep sets of {algorithm}"))
        for algorithm in FORMATS
    },
)  # type: ignore[call-overload]


class Preset(_Sets):
    """One model's preset; the TOML file has these fields, and ``extends`` for fields that another preset has."""

    schema_: Literal[1] = Field(alias="schema", description="version of the preset language")
    name: str = Field(description="what --preset takes")
    title: str | None = Field(default=None, description="the model's name for people")
    class_name: str = Field(description="_class_name of the transformer's config.json")
    base_repo: str | None = Field(default=None, description="Hub id of the base model")
    known_as: str | None = Field(
        default=None, description="Hub id by which SGLang knows how to sample the model, where it is not base_repo"
    )
    repos: list[str] = Field(default=[], description="Hub ids the preset fits")
    pipeline_tag: str | None = Field(default=None, description="the Hub's pipeline tag")
    license: str | None = Field(default=None, description="the base's license, as its model card has it")
    license_name: str | None = Field(default=None, description="its name where license is other")
    license_link: str | None = Field(default=None, description="where it is to be read, in full")
    modelopt_model: str | None = Field(
        default=None, description="--model of ModelOpt's quantize.py that makes the export; empty for none"
    )
    load_flag: str = Field(description="SGLang's flag that loads the result")
    fused: list[list[str]] = Field(description="names under one parent that the runtime may fuse; dots allowed")
    shared_scale: list[list[str]] | None = Field(
        default=None,
        description="names under one parent to which ModelOpt's export gives one global scale; dots allowed; needed to "
        "build NVFP4 without an export",
    )
    keep_fp32: _Globs = Field(description="globs over tensor names that stay in F32 where the base holds F32")
    config: dict[str, bool | int | float | str] = Field(description="config.json values that identify this model")
    defaults: dict[str, bool | int | float | str] = Field(
        default={}, description="what keys of config that config.json leaves out stand for"
    )
    having: dict[str, bool] = Field(default={}, description="config.json keys that must have a value, or none")
    runtime_names: dict[str, list[str]] = Field(
        description="disk name = runtime names; * for one segment, *+key to add config.json's number of that key; "
        "without * all that match have that one name"
    )

    @field_validator("schema_", mode="before")
    @classmethod
    def _version(cls, version: object) -> object:
        if type(version) is not int:  # True and 1.0 equal 1
            raise ValueError("must be the integer 1")
        return version

    @field_validator("runtime_names")
    @classmethod
    def _stars(cls, names: dict[str, list[str]]) -> dict[str, list[str]]:
        for disk, spellings in names.items():
            for runtime in spellings:
                if any(stars(disk)) or len(stars(runtime)) not in (0, len(stars(disk))):
                    raise ValueError(
                        f"{disk!r} and {runtime!r} must have the same number of * segments, or the latter none"
                    )
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
        found: dict[Algorithm, KeepRules | None] = {algorithm: getattr(self, algorithm, None) for algorithm in FORMATS}
        return {algorithm: rules for algorithm, rules in found.items() if rules is not None}

    def recipe(self) -> list[str]:
        """The commands of ModelOpt's examples/diffusers/quantization that make the exports, as lines of text."""
        if not self.modelopt_model:
            return []
        lines = ["The exports come from ModelOpt's examples/diffusers/quantization. Its default dtype is Half:"]
        for algorithm in self.sets():
            lines.append(
                f"python quantize.py --model {self.modelopt_model} --override-model-path {self.base_repo or 'BASE'} "
                f"--model-dtype BFloat16 --format {FORMATS[algorithm].export_format} --batch-size 1 --calib-size 128 "
                f"--n-steps 20 --quantized-torch-ckpt-save-path out/ckpt --hf-ckpt-dir out/hf"
            )
        return lines

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this model: it has the class, and the values that single the model out."""
        return next(self.misfits(config), None) is None

    def misfits(self, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The keys of a config.json of another model, and what this one has there."""
        for key, value in {"_class_name": self.class_name, **self.config}.items():
            if config.get(key, self.defaults.get(key)) != value:
                yield key, repr(value)
        for key, is_there in self.having.items():
            if (config.get(key) is not None) != is_there:
                yield key, "a value" if is_there else "none"

    def contradiction(self, config: Mapping[str, Any]) -> tuple[str, str] | None:
        """The first key of a config.json that has a value which this model has not, and what it has there."""
        return next((one for one in self.misfits(config) if config.get(one[0]) is not None), None)


class LoadedPreset(_Strict):
    """A preset with its text and where it came from.

    Attributes:
        preset: What was read.
        text: The TOML text.
        path: The name or path by which it was asked for.
        inherited: The texts of the presets that it extends, nearest first.
        warnings: What there is to say of the base that it was drafted from; none of a preset that was read.
        build: The command that builds with a draft, and its flags for an engine; none of a preset that was read.
    """

    preset: Preset
    text: str
    path: str
    inherited: list[str]
    warnings: list[str] = []
    build: list[str] = []

    def formats_instead(self, algorithm: Algorithm) -> list[Algorithm]:
        """The formats that the text itself has sets for, where it has none for this one and inherits what it has."""
        own = [one for one in FORMATS if one in tomllib.loads(self.text)]
        return own if self.inherited and algorithm not in own else []

    @property
    def sha256(self) -> str:
        """Digest of the TOML text and of the texts that it extends, recorded in mopt.json."""
        return hashlib.sha256("\0".join((self.text, *self.inherited)).encode()).hexdigest()


class ChosenPreset(_Strict):
    """The preset of a run.

    Attributes:
        loaded: The preset.
        also: Other presets that fit as well and give the same, where config.json chose the preset.
        is_named: Whether the user named the preset, or its model by a repo of the preset. A config.json names no model:
            siblings and fine-tunes have the same.
    """

    loaded: LoadedPreset
    also: list[str]
    is_named: bool

    def made_for(self, repo: str | None) -> Preset | None:
        """The preset, among those that fit, that was made for a base; None if there is none, or the base is unknown.

        Args:
            repo: Hub id of the base.
        """
        return next((one.preset for one in self._fitting() if repo in one.preset.repos), None)

    def known_as(self, repo: str | None) -> str | None:
        """The Hub id by which SGLang knows how to sample the model; None where nothing tells which model it is.

        Args:
            repo: Hub id of the base.
        """
        made = self._model(repo)
        return repo if made is None else made.known_as or repo or made.base_repo

    def repos(self, repo: str | None) -> list[str]:
        """Hub ids of the model, where the Hub id of the base tells which it is, or the user."""
        made = self._model(repo)
        return [] if made is None else made.repos

    def _model(self, repo: str | None) -> Preset | None:
        return self.loaded.preset if repo is None and self.is_named else self.made_for(repo)

    def _fitting(self) -> list[LoadedPreset]:
        return [self.loaded, *(load_preset(name) for name in self.also)]

    def status(self, algorithm: Algorithm) -> str | None:
        """The status of the set: the weakest of all presets that fit."""
        status = {one.preset.rules(algorithm).status for one in self._fitting()}
        return "validated" if status == {"validated"} else "candidate"

    def limits(self, algorithm: Algorithm, *, exported: bool) -> list[str]:
        """What a user should know of this set; what engines make of the result is in engines/limits.toml.

        Of several presets that fit only what all of them say: the rest is of one model, and this may be another.

        Args:
            algorithm: The format.
            exported: Whether it is built from an export.
        """
        rules = [one.preset.rules(algorithm) for one in self._fitting()]
        told = [[*one.known_limits, *(one.export_limits if exported else ())] for one in rules]
        return [limit for limit in told[0] if all(limit in other for other in told)]


def parse_preset(text: str, *, path: str) -> LoadedPreset:
    """Parse and validate a preset.

    Raises:
        InputError: ``preset.toml``, ``preset.field``, ``preset.pattern`` or ``preset.extends``.
    """
    fields, texts = _with_inherited(text, path)
    try:
        preset = Preset.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error, path) from error
    return LoadedPreset(preset=preset, text=text, path=path, inherited=texts[1:])


def _with_inherited(text: str, path: str, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """The fields of a preset over the fields that it extends, tables merged key by key; all texts, its own first."""
    try:
        fields = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"{path}: not TOML: {reason}", code="preset.toml", path=path, hint="correct the file"
        ) from error
    extended = fields.pop("extends", None)
    if extended is None:
        return fields, [text]
    if not isinstance(extended, str) or extended in seen or len(seen) >= _LONGEST_CHAIN:
        raise InputError(
            f"{path}: extends: expected the name or path of another preset, found {extended!r}",
            code="preset.extends",
            path=path,
            hint=f"a preset can extend one other preset, and never itself; a chain has at most {_LONGEST_CHAIN}",
        )
    where = Path(path).parent / extended if _is_path(extended) else _folder() / f"{extended}.toml"
    parent, texts = _with_inherited(_read(where, extended), str(where), (*seen, extended))
    parent = {key: value for key, value in parent.items() if key not in _NOT_INHERITED}
    for key, value in fields.items():
        inherited = parent.get(key)
        parent[key] = inherited | value if isinstance(inherited, dict) and isinstance(value, dict) else value
    return parent, [text, *texts]


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".toml")


_OF_A_BASE = ("config.json", "model_index.json")


def _read(path: Path, name: str) -> str:
    try:
        # Wherever a link leads: the user named it.
        return read_small(Path(os.path.realpath(path, strict=True)), _MAX_BYTES, code="preset").decode()
    except (InputError, OSError, ValueError) as error:  # also not UTF-8, or a path with a NUL
        known = preset_names()
        parts = [part for part in name.lower().replace("_", "-").split("-") if part.strip(".")]
        begun = [one for one in known if parts and all(part in one for part in parts)]
        near = None if _is_path(name) else nearest(name, known) or " or ".join(begun)
        told = f"did you mean {near}? `mopt presets` lists all" if near else f"known are {', '.join(known)}"
        if is_far(name) or any((Path(name) / one).is_file() for one in _OF_A_BASE):
            told = f"a base is no preset: `mopt presets new {shlex.quote(name)}` drafts one for it"
        said = error.message if isinstance(error, InputError) else getattr(error, "strerror", None)
        why = f"cannot be read: {said or 'it is not UTF-8'}"
        raise InputError(
            f"preset {name!r}: {why if _is_path(name) else 'is not one that comes with mopt'}",
            code="preset.unknown",
            path=str(path) if _is_path(name) else None,
            hint=f"{told}; a path to a TOML of your own must have a / or end in .toml",
        ) from error


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
    path = Path(name) if _is_path(name) else _folder() / f"{name}.toml"
    return parse_preset(_read(path, name), path=name)


OF_YOUR_OWN = "`mopt presets new BASE` drafts one for this model; with --export, --preset none keeps what it keeps"
"""What to do where presets of the model's class expect other sizes."""


def choose_preset(config: Mapping[str, Any], algorithm: Algorithm, repo: str | None = None) -> ChosenPreset:
    """The preset for a config.json, when the user named none.

    Of those that fit, the one that lists the base's repo is chosen; else the one that says most of the config.

    Args:
        config: config.json of the transformer.
        algorithm: The format that it needs sets for.
        repo: Hub id of the base, as far as it is known.

    Raises:
        InputError: ``preset.none_fits``, or ``preset.ambiguous`` if several fit and their rules differ;
            ``preset.not_diffusion`` for another kind of model.
    """
    refuse_other_kind(config)
    loaded = [load_preset(name) for name in preset_names()]
    fitting = [one for one in loaded if one.preset.fits(config) and algorithm in one.preset.sets()]
    listed = [one for one in fitting if repo in one.preset.repos]
    said = [len(one.preset.config) + len(one.preset.having) for one in fitting]  # what says more of it fits better
    fitting = listed or [one for one, count in zip(fitting, said, strict=True) if count == max(said)]
    names = [one.preset.name for one in fitting]
    if not fitting:
        same = [one.preset for one in loaded if one.preset.class_name == config.get("_class_name")]
        misfits = "".join(_misfit(one, config) for one in same)
        raise InputError(
            f"no preset fits {config.get('_class_name')!r}" + misfits,
            code="preset.none_fits",
            hint=OF_YOUR_OWN
            if misfits
            else "`mopt presets new BASE` drafts one for this model; else --preset names a TOML of your own or one of "
            f"{', '.join(preset_names())}",
        )
    sets = {_rule_key(one.preset, algorithm) for one in fitting}
    if len(sets) > 1:
        raise InputError(
            f"several presets fit {config.get('_class_name')!r}: {', '.join(names)}",
            code="preset.ambiguous",
            hint=f"config.json does not tell them apart: name one, such as --preset {names[0]}, or the model with "
            "--base-model",
        )
    return ChosenPreset(loaded=fitting[0], also=names[1:], is_named=bool(listed))


def fits_any(config: Mapping[str, Any]) -> bool:
    """Whether a preset that comes with mopt would be chosen."""
    return any(load_preset(name).preset.fits(config) for name in preset_names())


def _misfit(preset: Preset, config: Mapping[str, Any]) -> str:
    """Why a preset of the class does not fit, in words; it may have no section for the format instead."""
    key, expected = next(iter(preset.misfits(config)), (None, None))
    return f"; {preset.name} expects {key} {expected}, found {config.get(key)!r}" if key is not None else ""


_CONFIG = "config.json"  # of a model that the caller names


def refuse_other_kind(config: Mapping[str, Any], where: str = _CONFIG) -> None:
    """Refuse a model of transformers, such as a language model, which its config names in another key, and a VAE.

    Raises:
        InputError: ``preset.not_diffusion``.
    """
    named, of_diffusers = config.get("architectures"), config.get("_class_name")
    other = named[0] if "_class_name" not in config and isinstance(named, list) and named else None
    if isinstance(of_diffusers, str) and re.search("autoencoder|vae|vqmodel", of_diffusers, re.IGNORECASE):
        other = of_diffusers
    if other is not None:
        raise InputError(
            f"{where}: expected a diffusion transformer of diffusers, found {str(other)[:80]}: not a diffusion "
            "transformer",
            code="preset.not_diffusion",
            path=where if where != _CONFIG else None,
            hint="mopt is for diffusion transformers; give a language model or a VAE to its engine as it is",
        )


def preset_of_class(config: Mapping[str, Any]) -> Preset | None:
    """A preset that comes with mopt for this class of transformers: one that fits, or the first of the same parts."""
    found = [load_preset(name).preset for name in preset_names()]
    same = [one for one in found if one.class_name == config.get("_class_name")]
    misfits = {one.name: [key for key, _ in one.misfits(config)] for one in same}
    return min(
        same,
        key=lambda one: (bool(misfits[one.name]), any(key in one.having for key in misfits[one.name])),
        default=None,
    )


def _rule_key(preset: Preset, algorithm: Algorithm) -> str:
    rules = preset.rules(algorithm)
    shared = (preset.keep_fp32, preset.fused, preset.shared_scale, preset.runtime_names)
    return repr((rules.structural, rules.quality, *shared))


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())
