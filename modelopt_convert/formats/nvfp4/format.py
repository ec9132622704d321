"""The facts of NVFP4: E2M1 codes, an E4M3 scale per 16 columns, a float32 scale per weight. No torch."""

from modelopt_convert.formats.format import Format
from modelopt_convert.formats.layout import CANONICAL

BLOCK_SIZE = 16
FORMAT = Format(
    algorithm="nvfp4",
    bits=4,
    quant_algo="NVFP4",
    packed_dtype="U8",
    min_gpu="SM100 (Blackwell)",
    words="W4A4, blocks of 16",
    stored="Codes: the low nibble holds the even column. Scales: row-major. Both are declared in `config.json`.",
    declared={"quant_type": "NVFP4", "group_size": BLOCK_SIZE} | CANONICAL.config_keys(),
    dynamic={"quant_method": "modelopt", "dynamic_input_scale": True},
    block_size=BLOCK_SIZE,
    tensor_scale="weight_scale_2",
    scales=("weight_scale", "weight_scale_2", "input_scale"),
    export_flags="--format fp4 --quant-algo max",
    export_format="fp4",
    command="build-nvfp4",
    max_error=0.15,
)
