"""The guards of what is known of engines that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_TOLD = "commands/convert/test_told.py::test_fp8_scales_for_each_row_are_told_where_comfyui_shall_read_them"
_AWQ = "commands/convert/test_awq_exports.py::test_comfyui_keeps_the_factors_but_of_what_it_fuses"
_NEXT = "commands/convert/test_engine_names.py::test_the_next_command_is_sglangs_where_it_loads_and_mopts_otherwise"


def _engines(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(f"commands/{name}.py", what, old, new, ("commands/test_serving.py",))


ENGINES = (
    _engines("serving", "what is broken is refused", "if one.is_broken and not request", "if False and not request"),
    _engines("serving", "consent is asked for", "and not request.allow_known_broken:", "and True:"),
    _engines("serving", "of the engine that was named", "if one.engine == request.engine]", "if one.engine]"),
    _engines(
        "serving", "no command that fails", 'return engine == "sglang" and not broken', 'return engine == "sglang"'
    ),
    _engines("serving", "no command of another", 'return engine == "sglang" and not broken', "return not broken"),
    _engines("push/command", "push asks for consent", "self._warned += refuse_broken(", "self._warned += [] and ("),
    _engines("push/command", "push names no command", " and loads_right(known, request.engine)", ""),
    *(
        Mutant("proof/fused.py", what, old, new, ("proof/test_fused.py",))
        for what, old, new in (
            (
                "rebased scales are rounded",
                "(_CODES * (factor / top)).to(torch.float8_e4m3fn)",
                "(_CODES * (factor / top))",
            ),
            ("each part by its own scale", "wanted = (_CODES * factor)", "wanted = (_CODES * factors[0])"),
            (
                "the largest is taken",
                "[_CODES * max(factors) for _ in factors]",
                "[_CODES * min(factors) for _ in factors]",
            ),
        )
    ),
    *(
        Mutant("engines/limits.py", what, old, new, ("engines/test_limits.py",))
        for what, old, new in (
            ("facts of the class", 'if one.class_name in ("*", config.get("_class_name"))', "if True"),
            ("facts of the format", "and algorithm in one.formats", "and True"),
            ("the nearest fact goes first", "if one.nearness == nearest[one.engine])", "if True)"),
            ("facts of a key", "and (one.having is None or config.get(one.having) is not None)", "and True"),
            ("facts without input scales", "and (not one.dynamic or declares_dynamic_inputs(config))", "and True"),
        )
    ),
    *(
        Mutant("plan/ignore.py", what, old, new, ("plan/test_ignore.py",))
        for what, old, new in (
            ("a part of a name has a star", "for entry in widened(entries, taken) if", "for entry in () if"),
            ("no star over a packed module", " if not begins_one(taken, entry)}", "}"),
            ("whole blocks alone", "if not begins_one(taken, block)]", "]"),
            ("blocks are patterns", "{*names, *whole}", "{*names}"),
            ("not too many patterns", "if len(whole) <= _MOST_BLOCKS else []", ""),
            ("quantized names of TensorRT-LLM", "*other_names(packed)}", "}"),
            ("no names in whole blocks", "if not name.startswith(blocks))", ")"),
        )
    ),
    *(
        Mutant("engines/tensorrt_llm.py", what, old, new, ("engines/test_tensorrt_llm.py",))
        for what, old, new in (
            ("all parts of a fused linear", "and all(parent", "and any(parent"),
            ("the first end that fits", "for end in _RENAMED if", "for end in reversed(_RENAMED) if"),
        )
    ),
    *(
        Mutant("engines/vllm_omni.py", what, old, new, ("engines/test_vllm_omni.py",))
        for what, old, new in (
            (
                "within a word",
                "for word in words for at in range(len(word))})",
                "for word in words for at in range(1)})",
            ),
            ("across words", "for tail in begun[word])", "for tail in begun[word][:0])"),
            ("a beginning", "texts[place].startswith(start)", "True"),
            ("parts of fused modules", "listed.issuperset(members)", "False"),
            ("classes that name parts", "if made is not None and made.mapped:", "if made is not None:"),
        )
    ),
    *(
        Mutant("engines/vllm_omni.py", what, old, new, ("engines/test_views.py",))
        for what, old, new in (
            ("a class's own Linears", "re.fullmatch(made.quantized, name)", "True"),
            ("what is ignored", "if group not in left}", "}"),
            ("scales without a name", "in made.renamed)),", "in ())),"),
        )
    ),
    Mutant(
        "engines/sglang.py",
        "classes without names",
        'nameless = config.get("_class_name") in _NAMELESS',
        "nameless = False",
        ("engines/test_views.py",),
    ),
    *(
        Mutant("engines/belief.py", what, old, new, ("engines/test_views.py",))
        for what, old, new in (
            ("what is cast", "(belief.modules & frozenset(linears)) - frozenset(packed)", "frozenset()"),
            ("scales that are dropped", "UNSET: belief.unset & frozenset(packed)", "UNSET: frozenset()"),
        )
    ),
    *(
        Mutant("inspection/every_engine.py", what, old, new, (f"inspection/test_every_engine.py::test_{test}",))
        for what, old, new, test in (
            (
                "nibbles against the base",
                "and one.nibble_order != layout.nibbles",
                "and False",
                "comfyui_reads_its_own_files_and_the_base_tells_swapped_ones",
            ),
            (
                "what is not proven is assumed",
                "if not _is_known(one)]",
                "if False]",
                "comfyui_reads_its_own_files_and_the_base_tells_swapped_ones",
            ),
            (
                "a fact of unequal globals, of a file that has none",
                "and own and not one.unequal)",
                "and own)",
                "globals_that_differ_are_told_of_this_file_alone",
            ),
            (
                "globals of this file",
                "len(set(_globals(reader, group).values())) > 1",
                "True",
                "globals_that_differ_are_told_of_this_file_alone",
            ),
        )
    ),
    *(
        Mutant(f"engines/{name}.py", what, old, new, (f"engines/test_outcome.py::test_{test}",))
        for name, what, old, new, test in (
            (
                "comfyui",
                "a module without a marker beside others",
                "if module not in formats:",
                "if not formats:",
                "comfyui_marks_say_what_codes_are",
            ),
            (
                "comfyui",
                "codes of another dtype",
                "elif weight.dtype != _FORMATS[kind][0]:",
                "elif False:",
                "comfyui_marks_say_what_codes_are",
            ),
            (
                "comfyui",
                "a header hides the sentinel",
                "        return _Marks(formats, hidden)",
                "        pass",
                "comfyui_obeys_the_header_and_then_not_the_legacy_sentinel",
            ),
            (
                "comfyui",
                "names that are translated lose markers",
                "{} if translated else marks.formats",
                "marks.formats",
                "comfyui_translates_names_of_flux1_and_loses_markers",
            ),
            (
                "diffusers",
                "a scale for each row",
                "elif scale.shape not in (weight.shape[:1], (1,)):",
                "elif False:",
                "diffusers_decodes_an_fp8_scale_for_each_row_or_one_in_a_list",
            ),
            (
                "diffusers",
                "codes that nothing declares",
                "fails = HALVED in packed",
                "fails = False",
                "diffusers_refuses_nvfp4_that_is_not_declared",
            ),
            (
                "sglang_files",
                "FP8 that a header declares",
                "_float8(metadata) if is_file and method is None else []",
                "[]",
                "sglang_settles_on_what_is_said",
            ),
            (
                "sglang_files",
                "methods that it does not have",
                "if keys is not None and method not in _METHODS:",
                "if False:",
                "sglang_settles_on_what_is_said",
            ),
        )
    ),
    *(
        Mutant("preset/preset.py", what, old, new, ("preset/test_preset.py",))
        for what, old, new in (
            ("keys with a value", "if (config.get(key) is not None) != is_there:", "if False:"),
            ("names of the same parts", "any(key in one.having for key in misfits[one.name])", "False"),
        )
    ),
    *(
        Mutant(file, what, old, new, (f"commands/build/test_fp8_base.py::test_{test}",))
        for file, what, old, new, test in (
            (
                "plan/fp8.py",
                "Wan is divided in F32",
                '"F32" if class_name in _DIVIDED_IN_F32 else "BF16"',
                '"BF16"',
                "every_family_has_modelopts_own_bytes",
            ),
            (
                "formats/tensor_bytes.py",
                "a base is rounded to BF16",
                "weight if quotient is None else weight.to(torch.bfloat16)",
                "weight",
                "a_wider_base_is_rounded_to_bf16_first",
            ),
            (
                "formats/arithmetic.py",
                "zeros have a scale",
                "if amax else E4M3_MAX",
                "if True else E4M3_MAX",
                "a_weight_of_zeros_gets_the_scale_that_modelopt_gives_it",
            ),
            (
                "plan/ignore.py",
                "no part of a quantized name",
                "sorted(names - taken, key=natural_key)",
                "sorted(names, key=natural_key)",
                "config_declares_what_the_dynamic_paths_of_engines_read",
            ),
            (
                "plan/ignore.py",
                "names, and no patterns",
                'entry.removesuffix("*") for entry',
                "entry for entry",
                "config_declares_what_the_dynamic_paths_of_engines_read",
            ),
            (
                "plan/from_base.py",
                "a name in common is told",
                "    if modules:\n        yield (",
                "    if False:\n        yield (",
                "a_module_that_sglang_cannot_name_is_told",
            ),
            (
                "formats/table.py",
                "missing input scales are declared",
                'found.get("dynamic_input_scale") is True',
                "True",
                "without_the_declaration_a_missing_input_scale_is_a_fault",
            ),
        )
    ),
    Mutant("engines/comfyui.py", "a scale for each row", "elif module in by_row:", "elif False:", (_TOLD,)),
    Mutant("commands/convert/output.py", "scales for each row are told", "    if by_row:", "    if False:", (_TOLD,)),
    Mutant(
        "commands/convert/output.py", "factors are told", "if words is not None else []", "if False else []", (_AWQ,)
    ),
    Mutant(
        "commands/convert/engine_names.py",
        "what cannot be packed",
        "target.algorithm), words",
        "target.algorithm), []",
        (_NEXT,),
    ),
    Mutant("cli/convert.py", "no command that fails", " and not against:", ":", (_NEXT,)),
)
