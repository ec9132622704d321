"""The families of small models, and the preset of each."""

# The preset of each family, and the blocks of which something stays packed.
PRESETS = {
    "flux1": ("flux1-dev", {"transformer_blocks.0", "transformer_blocks.1"}),
    "flux2": ("flux2-dev", {"transformer_blocks.0", "transformer_blocks.1"}),
    "wan": ("wan2.2-t2v-a14b", {"blocks.3", "blocks.4"}),
    "wan_5b": ("wan2.2-ti2v-5b", {"blocks.3"}),
    "wan_i2v": ("wan2.2-i2v-a14b", {"blocks.3", "blocks.4"}),
    "wan_i2v_image": ("wan2.1-i2v-14b", {"blocks.3", "blocks.4"}),
    "qwen_image": ("qwen-image", {f"transformer_blocks.{block}" for block in (2, 3, 4, 5)}),
    "hunyuan_video": ("hunyuanvideo", {"transformer_blocks.0", "transformer_blocks.1"}),
    "ltx2": ("ltx2", {f"transformer_blocks.{block}" for block in (3, 4, 5)}),
}
FAMILIES = tuple(PRESETS)
# The same of families that not every test of families takes. Their loads are recorded in docs/engines.json too.
MORE = {
    "hunyuan_video_15": ("hunyuanvideo-1.5-t2v", {"transformer_blocks.0", "transformer_blocks.1"}),
    "cosmos": ("cosmos-predict2.5", {"transformer_blocks.0", "transformer_blocks.1"}),
    "ltx_video": ("ltx-video-2b", {"transformer_blocks.3"}),
    "ltx2_3": ("ltx-2.3", {f"transformer_blocks.{block}" for block in (3, 4, 5)}),
    "z_image": ("z-image", {"layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"}),
    "chroma": ("chroma", {"transformer_blocks.0", "transformer_blocks.1"}),
    "flux2_klein": ("flux2-klein-4b", {f"transformer_blocks.{block}" for block in range(5)}),
    "sd3": ("sd3.5-medium", {"proj_out", *(f"transformer_blocks.{block}" for block in range(3))}),
    "krea2": (
        "krea2-raw",
        {"transformer_blocks.0", "transformer_blocks.1", "text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"},
    ),
}
ALL = PRESETS | MORE
# What no engine's loader can be given of them, and why.
NOT_RUN = {("comfyui", "sd3"): "it takes the number of blocks from the width, 64 of it for each"}
# Those whose exports are built as they are. SGLang has one name for the cross-attention of all blocks of wan_i2v_image,
# of which ModelOpt packs some.
WITHOUT_PRESET = tuple(family for family in FAMILIES if family != "wan_i2v_image")


BROKEN = {
    ("flux2", "nvfp4"),
    ("ltx2", "nvfp4"),
    ("ltx2", "fp8"),
    ("wan_i2v_image", "nvfp4"),
    ("hunyuan_video_15", "nvfp4"),
    ("hunyuan_video_15", "fp8"),
    ("cosmos", "nvfp4"),
    ("cosmos", "fp8"),
    ("ltx_video", "nvfp4"),
    ("ltx_video", "fp8"),
    ("ltx2_3", "nvfp4"),
    ("ltx2_3", "fp8"),
    ("z_image", "nvfp4"),
    ("z_image", "fp8"),
    ("chroma", "nvfp4"),
    ("chroma", "fp8"),
    ("flux2_klein", "nvfp4"),
    ("sd3", "nvfp4"),
}


def allowed(family: str, algorithm: str = "nvfp4") -> list[str]:
    """What a build needs that SGLang 0.5.23 is known not to use rightly."""
    return ["--allow-known-broken"] if (family, algorithm) in BROKEN else []
