"""What SGLang's own ``_resolve_quant_config`` settles on, for each folder: run by SGLang's Python, one JSON line each.

python sglang_resolver.py ENGINES_SCRIPTS FOLDER ...
"""

import json
import sys
import types
from pathlib import Path
from typing import Any


def settled(folder: Path) -> dict[str, Any]:
    """The layout of NVFP4, the class of another config, or what is raised."""
    from sglang.multimodal_gen.configs.models.dits.qwenimage import QwenImageArchConfig
    from sglang.multimodal_gen.runtime.loader.transformer_load_utils import _resolve_quant_config

    config = folder / "config.json"
    replaces = None if config.exists() else str(folder)  # one file replaces the weights of a repo
    try:
        found: Any = _resolve_quant_config(
            hf_config=json.loads(config.read_text()) if config.exists() else {},
            server_args=types.SimpleNamespace(transformer_weights_path=replaces, quantization=None),
            safetensors_list=sorted(str(path) for path in folder.glob("*.safetensors")),
            component_model_path=str(folder),
            arch_config=QwenImageArchConfig(),
        )
    except Exception as error:
        return {"raises": f"{type(error).__name__}: {error}"}
    keys = ("swap_weight_nibbles", "checkpoint_weight_scale_layout", "activation_scheme", "ignored_layers")
    return {"config": type(found).__name__, **{key: getattr(found, key, None) for key in keys}}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import comparison  # type: ignore[import-not-found, unused-ignore]

    comparison.let_torchvision_import()
    for path in map(Path, sys.argv[2:]):
        print(json.dumps({"folder": path.name, **settled(path)}), flush=True)
