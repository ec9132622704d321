"""The guards of values that a damaged or whole checkpoint would lose silently; mutants.py takes each away."""

from mutants_disk import Mutant

_CONVERT = "commands/convert/"
_HAVE = f"{_CONVERT}test_files_people_have.py::test_"
_PARTS = "commands/test_rewrite_parts.py::test_"
_NUNCHAKU = f"{_CONVERT}test_nunchaku.py::test_"

LOST = tuple(
    Mutant(file, what, old, new, (test,))
    for file, what, old, new, test in (
        (
            "commands/rewrite/command.py",
            "a packed weight without block scales",
            "        add_parts(reader, modules, faults)\n",
            "",
            f"{_PARTS}a_packed_weight_without_block_scales_is_not_left_as_it_is_among_others",
        ),
        (
            "commands/rewrite/command.py",
            "what lies beside the transformer",
            "= present_transformer(reader)",
            "= {}, []",
            f"{_PARTS}a_text_encoder_in_the_file_is_left_out_and_said",
        ),
        (
            "dialects/nunchaku_form.py",
            "a factor that others have",
            "if lacking and any(role in roles for roles in alike):",
            "if False:",
            f"{_NUNCHAKU}what_others_of_a_kind_have_is_not_taken_for_one_or_nothing",
        ),
        (
            "dialects/nunchaku_form.py",
            "a header of another kind",
            'if said.startswith("int4" if is_nvfp4 else "fp4"):',
            "if False:",
            f"{_NUNCHAKU}a_header_of_another_kind_is_a_contradiction",
        ),
        (
            "dialects/comfyui_form.py",
            "a scale that others have",
            "if bare and scaled:",
            "if False:",
            f"{_HAVE}a_weight_that_lost_its_scale_among_scaled_ones_is_refused",
        ),
        (
            f"{_CONVERT}restore.py",
            "a record is of the file's bytes",
            "changed = changed_since(claim.digests, raw, read) if alone else None",
            "changed = None",
            f"{_CONVERT}test_forged_records.py::"
            "test_a_record_beside_other_weights_gives_nothing_that_the_file_does_not_say",
        ),
        (
            f"{_CONVERT}command.py",
            "a config of another model",
            "if request.config is not None and found.other_class is not None:",
            "if False:",
            f"{_HAVE}a_config_of_another_model_is_refused_where_a_record_has_one_too",
        ),
        (
            f"{_CONVERT}command.py",
            "a scale that is not max calibration's",
            'self._warned += [("proof.scale_factor", words) for words in found.scales]',
            "pass",
            f"{_HAVE}a_scale_beside_that_of_max_calibration_is_told",
        ),
        (
            "proof/tensors.py",
            "a base beyond half precision",
            'if dtype == "F16":',
            "if False:",
            "commands/build/test_fp8_base.py::test_weights_beyond_half_precision_are_proven",
        ),
        (
            "dialects/source.py",
            "a text encoder in another spelling",
            "tensors = {name: info for name, info in reader.tensors.items() if name not in rest}",
            "tensors = reader.tensors",
            "inspection/test_whole.py::test_a_conversion_does_not_look_at_the_text_encoder",
        ),
        (
            "dialects/presented.py",
            "a whole base under diffusers' names",
            "and not is_foreign and not rest:",
            "and not is_foreign:",
            "inspection/test_whole.py::test_a_base_under_diffusers_names_may_be_a_whole_checkpoint",
        ),
        (
            "commands/inspect.py",
            "the transformer alone is looked at",
            "self._warned += present_transformer(reader)[1]",
            "pass",
            "inspection/test_whole.py::test_modules_lints_and_verdicts_are_the_transformers",
        ),
        (
            "engines/diffusers.py",
            "a folder without a config",
            "if (is_file or not config) and any(",
            "if is_file and any(",
            "engines/test_outcome.py::test_diffusers_reads_one_file_by_bfl_low_and_row_by_row",
        ),
        (
            "inspection/fp8.py",
            "the older spelling of scales",
            "(role, *(old for old, new in LEGACY.items() if new == role))",
            "(role,)",
            "inspection/test_eight_bits.py::test_scales_in_the_older_spelling_of_comfyui_are_scales",
        ),
    )
)
