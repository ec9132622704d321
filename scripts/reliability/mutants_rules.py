"""The guards of where mopt writes and of what it wrote that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_RULES = "stage/test_output_rules.py"
_MOUNTS = "stage/test_mounts.py"
_READS = "commands/test_reads_that_fail.py"
_CHECK = "commands/build/test_structure.py::"


def _rules(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("stage/output_rules.py", what, old, new, tests or (_RULES,))


def _engines(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(f"commands/{name}.py", what, old, new, ("commands/test_serving.py",))


def _check(what: str, old: str, new: str, *tests: str, file: str = "build/structure") -> Mutant:
    return Mutant(f"commands/{file}.py", what, old, new, tests)


RULES = (
    _rules("names too long", "> _MAX_NAME_BYTES:", "> 300:"),
    _rules("the longest name is allowed", "> _MAX_NAME_BYTES:", ">= _MAX_NAME_BYTES:"),
    _rules("OUT is a link", "if output.is_symlink():", "if False:"),
    _rules("OUT has no parent", "if not parent.is_dir():", "if False:"),
    _rules("OUT is a file", "if not output.is_dir():", "if False:"),
    _rules("OUT is a mount point", "if os.path.ismount(output):", "if False:"),
    _rules("OUT is the home", '[Path(home)] if home != "~" else []', "[]"),
    _rules("OUT is the current folder", "return [*named, Path.cwd()]", "return named"),
    _rules(
        "a user without a home",
        'os.path.expanduser("~")',
        "str(Path.home())",
        f"{_RULES}::test_a_user_without_a_home_is_refused_nothing",
    ),
    _rules("a removed current folder", "except FileNotFoundError:  # the current", "except KeyError:  # the current"),
    _rules("OUT exists", "    if not overwrite and not overwrite_foreign:\n", "    if False:\n"),
    _rules("OUT is no checkpoint", "if what := _other_than_checkpoint(output):", "if what := None:"),
    _rules("OUT has no manifest", "if not any((folder / name).is_file() for", "if False and not any(name for"),
    _rules("OUT has no tensors", 'if not any(folder.rglob("*.safetensors")):', "if False:"),
    _rules("OUT is an input", "out_chain[0] == source_chain[0]:", "False:"),
    _rules(
        "inodes are compared, not paths",
        "[_inode(place) for place in (real, *real.parents) if place.exists()]",
        "[(0, hash(place)) for place in (real, *real.parents) if place.exists()]",
        f"{_MOUNTS}::test_an_input_is_seen_through_a_bind_mount",
    ),
    _rules("parents of OUT are compared", "source_chain[0] in out_chain or", "", f"{_MOUNTS}"),
    _rules("parents of the input are compared", "out_chain[0] in source_chain or", "", f"{_MOUNTS}"),
    _rules("OUT in a part of an input, mounted", " or _lies_in(output, source)", "", _MOUNTS),
    _rules("OUT around an input, mounted", " or _lies_in(source, output)", "", _MOUNTS),
    Mutant("stage/mounts.py", "mounts below an input are part of it", ", *mounted]", "]", (_MOUNTS,)),
    _check(
        "tensors as planned",
        "if planned.get(name) != written.get(name)\n",
        "if False\n",
        f"{_CHECK}test_a_tensor_of_another_shape",
        file="closing",
    ),
    _check(
        "tensors too many",
        "sorted(planned.keys() | written.keys())",
        "sorted(planned)",
        f"{_CHECK}test_a_tensor_too_many",
        file="closing",
    ),
    _check(
        "tensors that are missing",
        "sorted(planned.keys() | written.keys())",
        "sorted(written)",
        f"{_CHECK}test_a_tensor_that_is_missing",
        file="closing",
    ),
    _check(
        "header metadata",
        "if found != metadata.get(file)",
        "if False",
        f"{_CHECK}test_other_header_metadata",
        file="closing",
    ),
    _check(
        "a failed check is an error",
        "if closed.failure is not None:",
        "if False:",
        f"{_CHECK}test_a_checkpoint_at_fault_is_not_published",
        file="closing",
    ),
    Mutant(
        "stage/written_file.py",
        "an input that cannot be looked at is not the report's fault",
        "with contextlib.suppress(OSError):  # of the input",
        "with contextlib.suppress(FileNotFoundError):  # of the input",
        ("stage/test_written_file.py",),
    ),
    Mutant(
        "cli/_output.py",
        "a usage error forges no line",
        "typer.BadParameter(printable(error.message)",
        "typer.BadParameter(str(error.message)",
        ("stage/test_written_file.py",),
    ),
    _check(
        "a stage that cannot be read again",
        "if isinstance(error.__cause__, OSError):",
        "if False:",
        _READS,
        file="closing",
    ),
    Mutant(
        "stage/directory.py",
        "an input that cannot be read while OUT is written",
        "foreseen(error, self._inputs, ",
        "foreseen(error, (), ",
        (_READS,),
    ),
    Mutant(
        "checkpoint/local_file.py",
        "a read that fails says nothing of the bytes",
        "return OSError(error.errno,",
        "return ValueError(error.errno,",
        (_READS,),
    ),
    _check(
        "modules at fault",
        "faults += [module.fault.message for",
        "[module.fault.message for",
        f"{_CHECK}test_a_module_with_a_scale_of_the_wrong_shape",
    ),
    _check(
        "packed as planned",
        "if sorted(modules) != sorted(plan.packed):",
        "if False:",
        f"{_CHECK}test_a_packed_module_that_is_not_planned",
    ),
    _check(
        "a module in one file",
        "len({info.file for info in module.tensors}) > 1",
        "False",
        f"{_CHECK}test_a_module_spread_over_files",
    ),
    _check(
        "fused groups are whole",
        "if not set(group) <= modules.keys():",
        "if False:",
        f"{_CHECK}test_a_fused_group_of_which_one_is_packed",
    ),
    _check(
        "the config is looked at",
        "        faults += _config_faults(reader, plan, set(modules), str(folder))\n",
        "",
        f"{_CHECK}test_a_packed_module_on_the_ignore_list",
    ),
    _check(
        "`ignore` lists nothing packed",
        "if ignored_by(ignore, name)]",
        "if False]",
        f"{_CHECK}test_a_packed_module_on_the_ignore_list",
    ),
    _check(
        "`ignore` lists every other Linear",
        "sorted(linears - packed - ignore)",
        "sorted(linears - linears)",
        f"{_CHECK}test_a_linear_that_is_neither_packed_nor_on_the_ignore_list",
    ),
    _check(
        "config keys as planned",
        "if config.get(key) != value]",
        "if False]",
        f"{_CHECK}test_another_key_in_the_config",
    ),
    Mutant(
        "commands/build/command.py",
        "inputs are compared before the swap",
        "                steps.inputs.check_unchanged()\n",
        "",
        (f"{_CHECK}test_an_input_that_changed_meanwhile",),
    ),
    Mutant(
        "commands/closing.py",
        "a failed check stops the publishing",
        "    if closed.failure is not None:\n",
        "    if False:\n",
        (f"{_CHECK}test_a_checkpoint_at_fault_is_not_published",),
    ),
    Mutant(
        "commands/build/command.py",
        "check.structure",
        "check_structure(stage.path / part.prefix, plan)",
        "[]",
        (f"{_CHECK}test_a_checkpoint_at_fault_is_not_published",),
    ),
    Mutant(
        "commands/rewrite/command.py",
        "check.structure",
        "structure_checked(written_faults(written, plan.steps, plan.shards))",
        "structure_checked([])",
        (f"{_CHECK}test_a_checkpoint_at_fault_is_not_published",),
    ),
    Mutant(
        "commands/rewrite/command.py",
        "what needs a rewrite is told by all bytes",
        "proven_answers(modules[name], layout)",
        "modules[name]",
        ("commands/test_rewrite_whole.py::test_rewrites_put_in_order_what_sampled_rows_cannot_tell",),
    ),
    Mutant(
        "commands/rewrite/plan.py",
        "scales that stay swizzled are declared",
        'kind == "swap" and any(one.scale_layout == "128x4" for one in proven.values())',
        "False",
        ("commands/test_rewrite_whole.py::test_rewrites_put_in_order_what_sampled_rows_cannot_tell",),
    ),
    Mutant(
        "commands/rewrite/plan.py",
        "nibbles that stay swapped are declared",
        'kind != "swap" and any(one.nibble_order == "high" for one in proven.values())',
        "False",
        ("commands/test_rewrite_whole.py::test_rewrites_put_in_order_what_sampled_rows_cannot_tell",),
    ),
    Mutant(
        "verification/levels/layout.py",
        "nibbles are as they are declared",
        "if one.nibbles != declared.nibbles:",
        "if False:",
        ("commands/test_rewrite_whole.py::test_what_sampled_rows_cannot_tell_is_not_proven_as_it_is_declared",),
    ),
    Mutant(
        "verification/levels/layout.py",
        "scales are as they are declared",
        "if one.scales != declared.scales:",
        "if False:",
        ("commands/test_rewrite_whole.py::test_what_sampled_rows_cannot_tell_is_not_proven_as_it_is_declared",),
    ),
    Mutant(
        "verification/levels/decode.py",
        "the declared layout is tried first",
        ", reading=subject.layout)",
        ")",
        ("commands/test_rewrite_whole.py::test_weights_that_tell_nothing_are_right_under_any_declared_layout",),
    ),
    Mutant(
        "proof/nvfp4.py",
        "a layout that the stored shape does not allow is not tried",
        "return found if found.scales in self.scales else dataclasses.replace(found, scales=next(iter(self.scales)))",
        "return found",
        ("commands/test_rewrite.py::test_post_processed_export_is_mended",),
    ),
    Mutant(
        "commands/rewrite/proof.py",
        "what is written is the base's",
        "for name, one in modules.items() if one.verdict in REFUTED]",
        "for name, one in modules.items() if False]",
        ("commands/test_rewrite.py::test_a_rewrite_that_wrote_something_else_is_thrown_away",),
    ),
    Mutant(
        "commands/rewrite/proof.py",
        "the rest is the base's",
        "[*wrong, *unusable, *unlike]",
        "[*wrong, *unusable]",
        ("commands/test_rewrite.py::test_a_rewrite_whose_rest_is_not_the_bases_is_refused",),
    ),
    Mutant(
        "commands/rewrite/proof.py",
        "scales of what is rewritten can be used",
        "if one.code in SCALE_FAULTS]",
        "if False]",
        ("commands/test_rewrite.py::test_a_rewrite_whose_scales_no_kernel_could_use_is_refused",),
    ),
    Mutant(
        "commands/rewrite/proof.py",
        "the rest is near the base's by consent only",
        "[*near, *like]",
        "near",
        ("commands/test_rewrite.py::test_a_rewrite_whose_rest_is_near_the_bases_needs_consent",),
    ),
    Mutant(
        "commands/rewrite/command.py",
        "headers of a rewrite are recorded",
        "files=files, headers=headers)",
        "files=files, headers=None)",
        ("commands/test_rewrite.py::test_a_rewrite_whose_rest_is_near_the_bases_needs_consent",),
    ),
    Mutant(
        "commands/rewrite/command.py",
        "the source is compared before the swap",
        "            reader.check_unchanged()\n",
        "",
        (f"{_CHECK}test_a_source_that_changed_while_it_was_rewritten",),
    ),
    Mutant(
        "commands/rewrite/command.py",
        "the room is asked for",
        "        stage.check_space(",
        "        str(",
        ("stage/test_space.py::test_the_room_is_counted_before_tensors_are_read",),
    ),
    Mutant(
        "commands/build/command.py",
        "the room is asked for",
        "need_bytes=need, ",
        "need_bytes=0, ",
        ("stage/test_space.py::test_the_room_is_counted_before_tensors_are_read",),
    ),
    Mutant(
        "stage/space.py",
        "headers count",
        "build_header(shard.tensors, shard.metadata)[2]",
        "sum(spec.num_bytes for spec in shard.tensors)",
        ("stage/test_space.py::test_headers_count_too",),
    ),
    Mutant(
        "commands/build/space.py",
        "small files count",
        "        sizes += _lengths(files)\n",
        "",
        ("stage/test_space.py::test_the_room_is_counted_before_tensors_are_read",),
    ),
    _engines("serving", "what is broken is refused", "if one.is_broken and not request", "if False and not request"),
    _engines("serving", "consent is asked for", "and not request.allow_known_broken:", "and True:"),
    _engines("serving", "of the engine that was named", "if one.engine == request.engine]", "if one.engine]"),
    _engines(
        "serving", "no command that fails", 'return engine == "sglang" and not broken', 'return engine == "sglang"'
    ),
    _engines("serving", "no command of another", 'return engine == "sglang" and not broken', "return not broken"),
    _engines("push/command", "push asks for consent", "self._warned += refuse_broken(", "self._warned += [] and ("),
    _engines("push/command", "push names no command", "if loads_right(known, request.engine):", "if True:"),
    *(
        Mutant("verification/fused.py", what, old, new, ("verification/test_fused.py",))
        for what, old, new in (
            ("rebased scales are rounded", "(one * (factor / top)).to(torch.float8_e4m3fn)", "(one * (factor / top))"),
            ("each part by its own scale", "(one * factor).flatten() for one", "(one * factors[0]).flatten() for one"),
            (
                "the largest is taken",
                "[one * max(factors) for one in scales]",
                "[one * min(factors) for one in scales]",
            ),
        )
    ),
    *(
        Mutant("engines/limits.py", what, old, new, ("engines/test_limits.py",))
        for what, old, new in (
            ("facts of the class", 'if one.class_name in ("*", config.get("_class_name"))', "if True"),
            ("facts of the format", "and algorithm in one.formats", "and True"),
            ("a fact of the class goes first", " or one.engine not in of_class)", " or True)"),
            ("facts of a key", "and (one.having is None or config.get(one.having) is not None)", "and True"),
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
        "set() if nameless else ignored(entries, spelled, path=path)",
        "ignored(entries, spelled, path=path)",
        ("engines/test_views.py",),
    ),
    *(
        Mutant("engines/belief.py", what, old, new, ("engines/test_views.py",))
        for what, old, new in (
            ("what is cast", "belief.modules & set(linears) - set(packed)", "set()"),
            ("scales that are dropped", "(belief.unset & set(packed), ", "(set(), "),
        )
    ),
    *(
        Mutant("preset/preset.py", what, old, new, ("preset/test_preset.py",))
        for what, old, new in (
            ("keys with a value", "if (config.get(key) is not None) != is_there:", "if False:"),
            ("names of the same parts", "any(key in one.having for key in misfits[one.name])", "False"),
        )
    ),
)
