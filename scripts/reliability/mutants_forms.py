"""The guards of the dialects' forms that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_COMFYUI = "dialects/test_forms_comfyui.py"
_REFUSED = f"{_COMFYUI}::test_what_contradicts_itself_is_refused_in_one_line"
_READ = "dialects/test_forms_read.py::test_what_is_not_of_the_dialect_is_refused_in_one_line"
_LAWS = "dialects/test_forms.py"


def _marker(what: str, old: str, new: str, test: str = _REFUSED) -> Mutant:
    return Mutant("dialects/comfyui_markers.py", what, old, new, (test,))


def _comfyui(what: str, old: str, new: str, test: str = _REFUSED) -> Mutant:
    return Mutant("dialects/comfyui_form.py", what, old, new, (test,))


FORMS = (
    _marker("a sentinel that the header hides", "if says and hidden is not None:", "if False:"),
    _marker("a scale in both spellings", "if name != role and name in roles:", "if False:"),
    _marker(
        "marker and header say the same",
        "if layer is not None and _entry(",
        "if False and _entry(",
    ),
    _marker("a format that is not converted", "if word not in FORMATS:", "if False:"),
    _comfyui(
        "packed among marked modules",
        "        if marked:\n",
        "        if False:\n",
        f"{_COMFYUI}::test_black_forest_labs_files_have_no_markers",
    ),
    _comfyui("scales of a plain weight", "if lonely is not None:", "if False:"),
    _comfyui("rows that may be padding", "if not any(read(weight, (rows - 1) * width, width)):", "if False:"),
    _comfyui("scales of the padded grid", "if scale.shape != grid:", "if False:"),
    _comfyui(
        "columns as known",
        "if round_up(columns, pad) != stored:",
        "if False:",
        f"{_COMFYUI}::test_a_known_shape_tells_padding_from_rows_and_columns",
    ),
    Mutant(
        "dialects/form.py", "a tensor that changes a weight's meaning", "if odd is not None:", "if False:", (_READ,)
    ),
    Mutant(
        "dialects/scales.py",
        "scales and codes of plain modules",
        "if module not in described.modules and (",
        "if False and (",
        ("dialects/test_forms_read.py::test_scales_or_codes_of_a_module_that_is_not_quantized",),
    ),
    Mutant(
        "dialects/scales.py",
        "neither one scale nor one a row",
        "scale.shape not in ((), (one.rows,)):",
        "False:",
        (f"{_COMFYUI}::test_one_scale_for_each_member_of_a_fused_module",),
    ),
    Mutant(
        "dialects/compressed_tensors_form.py",
        "a tensor in two forms",
        "if ours in roles and (",
        "if False and (",
        (_READ,),
    ),
    Mutant(
        "dialects/compressed_tensors_form.py",
        "a factor that no reciprocal gives",
        "_inverse(turned) == raw",
        "True",
        (f"{_LAWS}::test_compressed_tensors_announces_the_factors_that_no_reciprocal_gives",),
    ),
    Mutant(
        "dialects/compressed_tensors_form.py",
        "a scale without a reciprocal",
        "if not value or not math.isfinite(value):",
        "if not value:",
        (f"{_LAWS}::test_a_scale_without_a_reciprocal_is_refused",),
    ),
    Mutant(
        "dialects/torchao_form.py",
        "a part that the header does not name",
        'if "._weight_" in info.name and module not in at_fault:',
        "if False:",
        (_READ,),
    ),
    Mutant("dialects/torchao_form.py", "a weight in parts and whole", "if both is not None:", "if False:", (_READ,)),
    Mutant(
        "dialects/torchao_form.py",
        "the names of all files in each",
        'metadata["tensor_names"] = json.dumps(list(metadata))',
        'metadata["tensor_names"] = json.dumps(list(metadata)[1:])',
        ("dialects/test_forms_oracles.py::test_torchao_makes_its_tensors_of_it_and_the_same_file_of_them",),
    ),
    Mutant(
        "dialects/bfl_form.py",
        "an input scale that diffusers requires",
        'if quantized.algorithm == "nvfp4" and f"{module}.input_scale" not in described.tensors:',
        "if False:",
        (f"{_LAWS}::test_what_a_dialect_has_no_place_for_is_refused",),
    ),
    Mutant(
        "dialects/modelopt/form.py",
        "input scales in all modules or in none",
        "if 0 < len(calibrated) < len(described.modules):",
        "if False:",
        (f"{_LAWS}::test_modelopt_has_input_scales_in_all_modules_or_in_none",),
    ),
    Mutant(
        "dialects/bf16_form.py",
        "unquantized in name alone",
        'if info.name.endswith(".weight") and DTYPE_BITS[info.dtype] < 16:',
        "if False:",
        (_READ,),
    ),
    Mutant(
        "commands/convert/restore.py",
        "a scale of a fused module is every member's",
        "not _is_shared(name, again, found, read)",
        "False",
        ("commands/convert/test_forged_records.py::test_a_scale_that_the_file_has_once_is_every_members",),
    ),
    Mutant(
        "commands/convert/restore.py",
        "a claimed scale is a number that can be one",
        "not _fits(again.tensors.get(name), read)",
        "False",
        ("commands/convert/test_forged_records.py",),
    ),
    Mutant(
        "commands/convert/command.py",
        "a quantized base",
        "check_config_unquantized(against)",
        "pass",
        ("commands/convert/test_files_people_have.py::test_a_quantized_base_is_called_that",),
    ),
)
