"""Files of other kinds under the name of a .safetensors file: the refusal names the kind, and what to run."""

import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SINGLE, reader_refusal, write
from safetensors_files import pack
from support import run_mopt

from modelopt_convert.checkpoint.header import parse_header, read_header_length
from modelopt_convert.run.errors import InputError

FETCH = "`hf download ORGANIZATION/NAME --local-dir FOLDER`"
READS = f"mopt reads safetensors alone: give the original model's, fetched with {FETCH}"
ZIP = "a zip archive, as torch.save writes it (.pt, .ckpt, .bin)"
PICKLE = "a pickle, as old torch.save writes it (.pt, .ckpt, .bin)"
WEIGHTS = pack({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x")


def saved(*, new: bool) -> bytes:
    """What torch writes of a state dict, in its format of today or of before 1.6."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"x" * 100)
    return file.getvalue()


def unpack(program: str) -> str:
    return f"unpack it: `{program} -dc FILE > OTHER.safetensors`"


# (the file, what it is called, what to do)
KINDS: dict[str, tuple[bytes, str, str]] = {
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "a pointer of git-lfs",
        f"run `git lfs pull` in the folder, or fetch it with {FETCH}",
    ),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file", READS),
    "torch": (saved(new=True), ZIP, READS),
    "zip": (zipped(), ZIP, READS),
    "zip without flags": (b"PK\x03\x04" + bytes(100), ZIP, READS),
    "old torch": (saved(new=False), PICKLE, READS),
    "pickle": (pickle.dumps({"a": [1.0] * 9}, 4), PICKLE, READS),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file (.h5)", READS),
    "html": (
        b"<!DOCTYPE html>\n<html></html>",
        "a web page, not the file behind it",
        f"fetch it with {FETCH}",
    ),
    "html, indented": (b"\n  <html lang='en'>", "a web page, not the file behind it", f"fetch it with {FETCH}"),
    "gated": (
        b"Access to model x/y is restricted. You must be authenticated to access it.",
        "an answer of the Hub, not the file",
        f"log in with `hf auth login`, accept the model's terms on its page, and fetch it with {FETCH}",
    ),
    "json": (json.dumps({"error": "Repository not found"}).encode(), "a JSON text", f"fetch it with {FETCH}"),
    "gzip": (gzip.compress(WEIGHTS, mtime=0), "a gzip archive", unpack("gzip")),
    "xz": (lzma.compress(WEIGHTS), "an xz archive", unpack("xz")),
    "text": (b"root:x:0:0:root:/root:/bin/bash\n", "a text", f"fetch it with {FETCH}"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x10" + bytes(30), "a zstd archive", unpack("zstd")),
}


@pytest.mark.parametrize(("content", "found", "hint"), KINDS.values(), ids=KINDS)
def test_the_kind_is_named_and_what_to_run(content: bytes, found: str, hint: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", {SINGLE: {"a": torch.ones(1)}})
    (folder / SINGLE).write_bytes(content)
    error = reader_refusal(folder)
    assert error.message == f"{folder / SINGLE}: expected a safetensors file, found {found}"
    assert (error.code, error.path, error.hint) == ("header.foreign", str(folder / SINGLE), hint)


def test_the_terminal_says_it_in_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    file.write_bytes(KINDS["git-lfs"][0])
    outcome = run_mopt("inspect", file, json_report=False)
    assert outcome.exit_code == 3
    assert outcome.stderr.splitlines() == [
        f"error: {file}: expected a safetensors file, found a pointer of git-lfs [header.foreign]",
        f"hint: run `git lfs pull` in the folder, or fetch it with {FETCH}",
    ]


def test_a_large_archive_whose_first_bytes_could_be_a_length() -> None:
    """Without flags they are a number below the limit, and the file may have as many bytes."""
    length = int.from_bytes(b"PK\x03\x04\0\0\0\0", "little")
    with pytest.raises(InputError, match="found a zip archive") as caught:
        parse_header(b"\x14" * length, file="f", file_bytes=length + 8)
    assert caught.value.code == "header.foreign"


@pytest.mark.parametrize("prefix", [b"\x80\x02\0\0\0\0\0\0", b"\x80\x04\x01\0\0\0\0\0", b"\x1f\x8b\0\0\0\0\0\0"])
def test_a_file_that_was_cut_short_is_no_other_kind(prefix: bytes) -> None:
    with pytest.raises(InputError) as caught:
        read_header_length(prefix, file="f", file_bytes=100)
    assert caught.value.code == "header.truncated"


@pytest.mark.parametrize("prefix", [b"PK\x03\x04\0\0\0\0", b"\x1f\x8b\x08\0\0\0\0\0"])
def test_a_header_of_such_a_length_is_read(prefix: bytes) -> None:
    length = int.from_bytes(prefix, "little")
    assert read_header_length(prefix, file="f", file_bytes=length + 8) == length
