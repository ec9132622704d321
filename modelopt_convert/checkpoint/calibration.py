"""What ``mopt calibrate`` wrote, as builds read it: the inputs of every module, in figures. No torch, no numpy.

CALIB holds ``calibration.json``, ``stats.safetensors`` and a record. The record has the digest of the first, and the
first that of the second, so that a damaged CALIB is told from a whole one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from struct import iter_unpack, pack
from typing import Any

import xxhash

from modelopt_convert.checkpoint.content import CONTENT
from modelopt_convert.checkpoint.header import (
    PREFIX_BYTES,
    Header,
    TensorInfo,
    TensorSpec,
    parse_header,
    read_header_length,
)
from modelopt_convert.checkpoint.location import read_small
from modelopt_convert.checkpoint.record import RECORD, digest_of, read_record, write_record
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.formats.format import Weights
from modelopt_convert.formats.nvfp4.shapes import num_stored
from modelopt_convert.run.errors import InputError

SCHEMA = "mopt.calibration/1"
FILE = "calibration.json"
STATS = "stats.safetensors"
COMPENSATIONS = "compensations.safetensors"
_LIMIT = 64 << 20  # bytes: a line of each of a hundred thousand modules is less
_READ_BYTES = 8 << 20
_LEAST, _MOST = 2.0**-112, 2.0**120  # beyond these a scale, or amax times headroom, is none in float32
_AGAIN = "run `mopt calibrate` again, or copy CALIB again, whole"


@dataclass(frozen=True, slots=True)
class StoredCompensation:
    """Where CALIB has what GPTQ needs of one input (``formats/nvfp4/gptq.py``); plain data, read where it is used.

    Attributes:
        path: The file.
        module: The first module with that input.
        tensors: Panels and exponents.
        digests: xxh3-128 of each.
    """

    path: Path
    module: str
    tensors: tuple[TensorInfo, TensorInfo] = field(repr=False)
    digests: tuple[str, str] = field(repr=False)

    def read(self) -> tuple[bytes, bytes]:
        """The bytes of both.

        Raises:
            InputError: ``calibration.damaged``.
        """
        panels, exponents = (_bytes_of(self.path, info) for info in self.tensors)
        for info, raw, digest in zip(self.tensors, (panels, exponents), self.digests, strict=True):
            if (found := digest_of(raw)) != digest:
                words = f"expected the digest {digest[:12]} as in {FILE}, found {found[:12]}"
                raise _damaged(self.path, f"tensor {info.name!r}: {words}")
        return panels, exponents


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The inputs of one transformer's modules.

    Attributes:
        path: CALIB.
        digest: What identifies CALIB: the digest of ``calibration.json``.
        headroom: By which amax is multiplied before a scale is made of it.
        base: The identity of the base that ran.
        amax: Largest magnitude of a module's input by module; None of one that never ran.
        squares: Where ``stats.safetensors`` has the mean square of each input channel, by module.
        compensations: What GPTQ needs, by module; empty where CALIB was made without ``--gptq``.
    """

    path: Path
    digest: str
    headroom: float
    base: Mapping[str, str]
    amax: Mapping[str, float | None]
    squares: Mapping[str, TensorInfo] = field(repr=False)
    compensations: Mapping[str, StoredCompensation] = field(default_factory=dict, repr=False)

    def refuse_other_base(self, identity: Mapping[str, str], path: str) -> None:
        """Require that a base is the one that was calibrated, as far as is known by now.

        Args:
            identity: Of the base: of its headers, and once it was read whole of its bytes.
            path: Where it lies.

        Raises:
            InputError: ``calibration.other_base``.
        """
        for key in ("headers_sha256", CONTENT):
            if key in identity and identity[key] != self.base.get(key):
                raise InputError(
                    f"{self.path}: expected a calibration of {path}, found one of another base "
                    f"({key} {str(self.base.get(key))[:12]}, and the base has {identity[key][:12]})",
                    code="calibration.other_base",
                    path=str(self.path),
                    hint="calibrate this very base, or give the one that was calibrated",
                )

    def largest(self, module: str) -> float:
        """The largest magnitude of a module's input.

        Raises:
            InputError: ``calibration.no_module``, ``calibration.never_ran`` or ``calibration.amax``.
        """
        if module not in self.amax:
            raise self._unusable(module, "expected its amax, found no such module", "calibration.no_module")
        found = self.amax[module]
        if found is None:
            raise self._unusable(
                module, "expected its amax, but it never ran while calibrating", "calibration.never_ran"
            )
        if not _LEAST < found < _MOST:
            raise self._unusable(module, f"expected an amax above 0 and finite, found {found!r}", "calibration.amax")
        return found

    def refuse_other(self, recorded: object, checkpoint: str) -> None:
        """Require that it is the calibration that a checkpoint was built with.

        Args:
            recorded: The digest in the checkpoint's record.
            checkpoint: Where the checkpoint lies.

        Raises:
            InputError: ``calibration.other``.
        """
        if recorded != self.digest:
            raise InputError(
                f"{self.path}: expected the calibration that {checkpoint} was built with, of the digest "
                f"{str(recorded)[:12]}, found {self.digest[:12]}",
                code="calibration.other",
                path=str(self.path),
                hint="give the folder that the build was given",
            )

    def importance(self, module: str, columns: int) -> bytes:
        """The mean square of each channel of a module's input, float32 [K].

        Args:
            module: Its name.
            columns: K.

        Raises:
            InputError: As ``largest``, or ``calibration.damaged``.
        """
        self.largest(module)
        path, info = self.path / STATS, self.squares.get(module)
        if info is None or (info.dtype, info.shape) != ("F32", (columns,)):
            found = "none" if info is None else f"{info.dtype} {list(info.shape)}"
            raise _damaged(path, f"module {module!r}: expected mean squares F32 [{columns}], found {found}")
        raw = _bytes_of(path, info)
        if len(raw) != info.num_bytes or not all(0 <= one < inf for (one,) in iter_unpack("<f", raw)):
            raise _damaged(path, f"module {module!r}: expected {columns} mean squares from 0 on, and finite")
        return raw

    def needed(self, weights: Weights, module: str, columns: int) -> dict[str, Any]:
        """What a rule needs of a module's input, by the names that steps and comparisons have for it.

        Args:
            weights: The rule.
            module: Its name.
            columns: K.

        Raises:
            InputError: As ``importance``, or ``calibration.no_compensation``.
        """
        if weights not in ("sweep-weighted", "gptq"):
            return {}
        wanted: dict[str, Any] = {"importance": self.importance(module, columns)}
        if weights == "gptq":
            if module not in self.compensations:
                raise InputError(
                    f"{self.path}: module {module!r}: expected what GPTQ needs of its input, found none",
                    code="calibration.no_compensation",
                    path=str(self.path),
                    hint="run `mopt calibrate --gptq` again, or build with --weights sweep-weighted",
                )
            found = self.compensations[module]
            shapes = [(one.dtype, one.shape) for one in found.tensors]
            if shapes != [("I16", (num_stored(columns),)), ("I16", (columns,))]:
                raise _damaged(found.path, f"module {module!r}: expected what {columns} channels have, found {shapes}")
            wanted["compensation"] = found
        return wanted

    def known(self, module: str, columns: int) -> dict[str, Any]:
        """All that ``needed`` can give of a module.

        Raises:
            InputError: As ``importance``.
        """
        return self.needed("gptq" if module in self.compensations else "sweep-weighted", module, columns)

    def _unusable(self, module: str, what: str, code: str) -> InputError:
        return InputError(
            f"{self.path}: module {module!r}: {what}",
            code=code,
            path=str(self.path),
            hint=f"calibrate with prompts, frames and steps that reach it, or --keep-bf16 '{module}'",
        )


@dataclass(frozen=True, slots=True)
class CalibrationFolder:
    """CALIB, whole.

    Attributes:
        path: Where it lies.
        digest: xxh3-128 of ``calibration.json``, which has the digest of the rest.
        said: ``calibration.json``.
        transformers: By the name of their component.
    """

    path: Path
    digest: str
    said: Mapping[str, Any]
    transformers: Mapping[str, Calibrated]

    def of(self, *names: str | None) -> Calibrated:
        """That of a transformer.

        Args:
            names: What may be its name in the pipeline, the likeliest first: its own, or those of folders.

        Raises:
            InputError: ``calibration.no_transformer``.
        """
        asked = [name for name in names if name is not None] or ["transformer"]
        if len(self.transformers) == 1:
            return next(iter(self.transformers.values()))
        found = next((name for name in asked if name in self.transformers), None)
        if found is None:
            raise InputError(
                f"{self.path}: expected a calibration of {' or '.join(asked)}, found those of "
                f"{', '.join(self.transformers)}",
                code="calibration.no_transformer",
                path=str(self.path),
                hint="give the base's folder of that transformer as --base; or calibrate the whole pipeline",
            )
        return self.transformers[found]

    def claim(self) -> dict[str, Any]:
        """What a record says of it."""
        kept = ("headroom", "prompts", "runs", "steps", "size", "pipeline")
        return {"digest": self.digest, **{key: self.said[key] for key in kept}}


def read_calibration(path: Path) -> CalibrationFolder:
    """Read CALIB and require that it is whole.

    Raises:
        InputError: ``calibration.missing``, ``calibration.damaged``, or what reading a small file raises.
    """
    if not (path / FILE).is_file():
        raise InputError(
            f"{path}: expected a folder that `mopt calibrate` wrote, found no {FILE} in it",
            code="calibration.missing",
            path=str(path),
            hint="give the folder that `mopt calibrate --output` named",
        )
    raw = read_small(path / FILE, _LIMIT, code="calibration")
    record = _record(path)
    digest, recorded = digest_of(raw), str(record["digests"]["files"][FILE])
    if digest != recorded:
        raise _damaged(path / FILE, f"expected the digest {recorded[:12]} as in {RECORD}, found {digest[:12]}")
    said = parse_json_object(raw, code="calibration", path=str(path / FILE))
    if said.get("schema") != SCHEMA:
        raise _damaged(path / FILE, f"expected {SCHEMA}, found {str(said.get('schema'))[:40]!r}")
    try:
        stats = str(said["stats_xxh3_128"])
        transformers = _transformers(path, digest, said)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(path / FILE, f"expected the fields of {SCHEMA}, found others") from None
    stats_bytes = (path / STATS).read_bytes() if (path / STATS).is_file() else None
    if stats_bytes is None or digest_of(stats_bytes) != stats:
        found = None if stats_bytes is None else digest_of(stats_bytes)[:12]
        raise _damaged(path / STATS, f"expected the digest {stats[:12]} as in {FILE}, found {found}")
    compensations = _compensations(path, said)
    _check_record(path, record, raw, stats_bytes, compensations)
    tensors = _header(path / STATS).tensors
    for name, one in transformers.items():
        prefix = f"{name}/" if len(transformers) > 1 else ""
        inputs = {module: kept.get("compensation") for module, kept in said["transformers"][name]["modules"].items()}
        squares = {module: tensors.get(f"{prefix}{module}.mean_square") for module in one.amax}
        known = {module: info for module, info in squares.items() if info is not None}
        for module, amax in one.amax.items():
            info = tensors.get(f"{prefix}{module}.amax")
            stored = None if info is None else stats_bytes[info.start : info.start + info.num_bytes]
            if stored != (None if amax is None else _float32(amax)):
                found = "none" if stored is None else stored.hex()
                raise _damaged(path / STATS, f"module {module!r}: expected the amax {amax!r} of {FILE}, found {found}")
        of = {module: compensations.get(f"{prefix}{first}") for module, first in inputs.items()}
        gptq = {module: found for module, found in of.items() if found is not None}
        transformers[name] = replace(one, squares=known, compensations=gptq)
    return CalibrationFolder(path, digest, said, transformers)


def file_digest(path: Path) -> str | None:
    """xxh3-128 of a file's bytes; None where there is no such file."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _check_record(
    path: Path,
    record: Mapping[str, Any],
    raw: bytes,
    stats: bytes,
    compensations: Mapping[str, StoredCompensation],
) -> None:
    """Require that a record says of the files what their writer says, but for its version.

    Raises:
        InputError: ``calibration.damaged``.
    """
    header = _header(path / STATS)
    infos, metadata = list(header.tensors.values()), {STATS: header.metadata}
    tensors = {one.name: digest_of(stats[one.start : one.start + one.num_bytes]) for one in infos}
    for one in compensations.values():
        infos += one.tensors
        tensors |= {info.name: digest for info, digest in zip(one.tensors, one.digests, strict=True)}
    if compensations:
        metadata[COMPENSATIONS] = _header(path / COMPENSATIONS).metadata
    headers = [TensorSpec(one.name, one.dtype, one.shape) for one in infos], metadata
    rewritten = write_record("calibrate", {}, tensors=tensors, files={FILE: raw}, headers=headers)
    if {**record, "tool": None} != {**parse_json_object(rewritten, code="record", path=RECORD), "tool": None}:
        raise _damaged(path / RECORD, f"expected the record of {FILE} and {STATS}, found another")


def _header(path: Path) -> Header:
    """The header of a safetensors file of CALIB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = read_header_length(file.read(PREFIX_BYTES), file=str(path), file_bytes=size)
        return parse_header(file.read(length), file=str(path), file_bytes=size)


def _bytes_of(path: Path, info: TensorInfo) -> bytes:
    with path.open("rb") as file:
        file.seek(info.start)
        return file.read(info.num_bytes)


def _compensations(path: Path, said: Mapping[str, Any]) -> dict[str, StoredCompensation]:
    """What GPTQ needs, by the module that its tensors are named after, with the prefix of its transformer.

    The digests in ``calibration.json`` are held against the bytes where they are read: most commands need none of them.

    Raises:
        InputError: ``calibration.damaged``.
    """
    claimed = said.get("compensations", {})
    if not claimed:
        return {}
    file = path / COMPENSATIONS
    if not file.is_file():
        raise _damaged(file, f"expected the {len(claimed)} compensations of {FILE}, found no such file")
    tensors, found = _header(file).tensors, dict[str, StoredCompensation]()
    for name, one in claimed.items():
        try:
            infos = tensors[f"{name}.compensation"], tensors[f"{name}.compensation_exponents"]
            found[name] = StoredCompensation(file, name, infos, (str(one["panels"]), str(one["exponents"])))
        except (KeyError, TypeError):
            raise _damaged(file, f"expected the compensation of {name!r}, found none") from None
    return found


def _record(path: Path) -> dict[str, Any]:
    try:
        record = read_record(path)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise _damaged(
            path / RECORD, f"expected the record of {FILE}, found one that is damaged: {error.message}"
        ) from None
    if record is None or FILE not in record["digests"]["files"]:
        raise _damaged(path / RECORD, f"expected the record of {FILE}, found none")
    return record


def _transformers(path: Path, digest: str, said: Mapping[str, Any]) -> dict[str, Calibrated]:
    """What is said of each transformer; where its mean squares lie, another file says.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is not of the schema.
    """
    headroom, found = float(said["headroom"]), dict[str, Calibrated]()
    if not 1 <= headroom <= 64 or not said["transformers"]:
        raise ValueError
    for name, one in said["transformers"].items():
        amax = {module: None if kept["n"] == 0 else float(kept["amax"]) for module, kept in one["modules"].items()}
        base = {key: str(value) for key, value in one["base"].items()}
        found[name] = Calibrated(path, digest, headroom, base, amax, {})
    counts = [said["prompts"]["count"], *(said[key] for key in ("runs", "seeds", "steps", "size"))]
    if not all(type(one) is int and one > 0 for one in counts):
        raise ValueError
    for strings in (said["pipeline"].values(), said["devices"], [said["prompts"]["sha256"]]):
        if not all(isinstance(one, str) for one in strings):
            raise ValueError
    said.get("compensations", {}).items()
    return found


def _float32(value: float) -> bytes:
    try:
        return pack("<f", value)
    except OverflowError:
        return b""


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}", code="calibration.damaged", path=str(path), hint=_AGAIN)
