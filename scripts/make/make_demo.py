"""Make the archive of `mopt demo`: a FLUX.1 of a few layers, and what ModelOpt exports of it; from seeds.

    python scripts/make/make_demo.py

Needs the ``modelopt`` extra. The archive is the same for the same tensors: no times, and names in their order.
"""

import contextlib
import dataclasses
import tempfile
import zipfile
from pathlib import Path

from make_export import make_family
from tiny_models import FAMILIES

TARGET = Path(__file__).resolve().parent.parent.parent / "modelopt_convert" / "commands" / "demo.zip"
# As small as it goes: NVFP4 has blocks of 16 input features.
SIZES = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def main() -> None:
    """Make the models, and pack them."""
    family = FAMILIES["flux1"]
    # Relative, since the export's config says where the base lay.
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path()
        make_family(dataclasses.replace(family, config={**family.config, **SIZES}), ["nvfp4"], folder)
        (folder / "nvfp4").rename(folder / "export")
        with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(path.as_posix())
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    archive.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    main()
