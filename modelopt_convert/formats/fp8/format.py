"""The facts of FP8: E4M3 codes under one float32 scale per weight. No torch."""

from modelopt_convert.formats.format import Format

FORMAT = Format(
    algorithm="fp8",
    bits=8,
    quant_algo="FP8",
    packed_dtype="F8_E4M3",
    min_gpu="SM89 (Ada, Hopper)",
    words="W8A8, E4M3 with one scale per tensor",
    stored="Scales: float32, one per weight, and one per input where that is calibrated.",
    declared={"quant_type": "FP8"},
    # Under ModelOpt's method SGLang 0.5.23 takes 1.0 for a missing input scale (fsdp_load.py), and vLLM 0.30.0 the
    # number that it sets before loading. Under this one SGLang scales inputs as they come; TensorRT-LLM asks for none.
    dynamic={"quant_method": "fp8", "activation_scheme": "dynamic", "dynamic_input_scale": True},
    block_size=None,
    tensor_scale="weight_scale",
    scales=("weight_scale", "input_scale"),
    export_flags="--format fp8 --quant-algo max",
    export_format="fp8",
    command="convert-fp8",
    max_error=0.1,
    older="; an export of ModelOpt before 0.42 needs --checkpoint with its .pt",
)
