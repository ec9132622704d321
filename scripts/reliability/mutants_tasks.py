"""The guards of tasks, of copies in the kernel and of the GPU that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_ATTEMPT = "write/test_attempt.py"
_RAY = "write/test_ray_cluster.py::test_other_commands_and_what_goes_wrong"
_SHARED = "stage/test_shared_blocks.py"
_DEVICE = "write/test_gpu.py"


def _attempt(what: str, old: str, new: str) -> Mutant:
    return Mutant("write/attempt.py", what, old, new, (_ATTEMPT,))


def _compared(file: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(file, f"on a GPU: {what}", old, new, ("write/test_gpu_export.py",))


def _codes(what: str, old: str, new: str) -> Mutant:
    return Mutant("formats/nvfp4/codes.py", what, old, new, ("formats/test_codes.py",))


_WEIGHTED = "commands/build/test_weighted.py::"


_GPTQ = "commands/build/test_gptq.py::"


def _gptq(file: str, what: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(file, f"GPTQ: {what}", old, new, (f"{_GPTQ}{test}",))


def _swept(file: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(file, what, old, new, ("formats/test_sweep.py",))


TASKS = (
    _attempt(
        "only a whole file gets the name", "path = room / secrets.token_hex(8)", "path = job.stage / job.task.file"
    ),
    _attempt("a node of another version", "if version != __version__:", "if False:"),
    _attempt("a node that does not see the stage", "if not room.is_dir():", "if False:"),
    _attempt("a node that does not see an input", 'if error.code != "input.missing":', "if True:"),
    Mutant(
        "checkpoint/local_file.py",
        "a task reads the planned files",
        "if state not in (None, self.state):",
        "if False:",
        (_ATTEMPT,),
    ),
    Mutant("write/executors.py", "inputs on the Hub", 'if name == "ray" and far:', "if False:", (_ATTEMPT,)),
    Mutant(
        "write/ray_cluster.py",
        "a file that the driver does not see",
        "if size != result.num_bytes:",
        "if False:",
        (_RAY,),
    ),
    Mutant(
        "write/ray_cluster.py",
        "what dead attempts left is removed",
        "    fsops.remove_tree(stage.path / ATTEMPTS)\n",
        "",
        ("write/test_ray_cluster.py::test_a_killed_worker_changes_nothing",),
    ),
    Mutant("stage/fsops.py", "a failing copy is an error", "if error.errno in _FAILED:", "if False:", (_SHARED,)),
    Mutant("stage/fsops.py", "blocks must lie alike", "if (source_offset - offset) % block:", "if False:", (_SHARED,)),
    Mutant(
        "stage/shard_writer.py",
        "copies where blocks are shared",
        "extent if self._shares else None",
        "extent",
        (_SHARED,),
    ),
    Mutant(
        "write/gpu.py",
        "a GPU that rounds otherwise",
        "    if not is_equal:\n",
        "    if False:\n",
        (_DEVICE,),
    ),
    Mutant("write/gpu.py", "a chunk is waited for", "                    launched.wait()\n", "", (_DEVICE,)),
    _compared(
        "write/gpu.py",
        "a comparison's cast",
        "_quantizing(info.dtype, cast, scale)",
        '_quantizing(info.dtype, "BF16", scale)',
    ),
    _compared("proof/nvfp4.py", "rows in their places", "number * height", "number"),
    _codes("NaN is left to torch", "if math.isnan(amax)", "if False"),
    _codes("bounds are looked for above, too", "torch.arange(-2, 3)", "torch.arange(-2, 0)"),
    _codes("a zero has no sign", "quotients[:, 0] > 0", "quotients[:, 0] >= 0"),
    Mutant(
        "formats/nvfp4/compiled.py",
        "a value that rounds to zero keeps its sign",
        "%negative, %reached0",
        "%negative, %reached1",
        ("formats/test_codes.py",),
    ),
    _swept(
        "formats/nvfp4/sweep.py", "a sweep leaves what nothing improves", "error[:, 0] < least", "error[:, 0] <= least"
    ),
    _swept("formats/nvfp4/compiled.py", "the compiled sweep leaves it, too", "fcmp olt double", "fcmp ole double"),
    _swept(
        "formats/nvfp4/compiled.py",
        "columns begin anew with each row",
        "%is_row_done, i64 0,",
        "%is_row_done, i64 %column,",
    ),
    Mutant(
        "proof/nvfp4.py",
        "the scales of a sweep are compared",
        "if not same or not torch.equal",
        "if not torch.equal",
        ("proof/test_judgement.py::test_mopts_own_sweep_is_nearest_byte_for_byte",),
    ),
    Mutant(
        "proof/nvfp4.py",
        "a weighted sweep is heeded with its calibration alone",
        'if self.tally.is_exact or self.swept in OF_CALIBRATION:\n            return "reproduced"',
        'if self.tally.is_exact or self.swept:\n            return "reproduced"',
        ("proof/test_judgement.py::test_mopts_own_sweep_is_nearest_byte_for_byte",),
    ),
    Mutant(
        "proof/nvfp4.py",
        "a sweep in BF16 under a scale that BF16 reaches",
        "if self.is_scaled(found) and not is_free:  # else",
        "if not is_free:  # else",
        ("proof/test_judgement.py::test_a_sweep_under_a_scale_that_bf16_does_not_reach_is_no_proof",),
    ),
    Mutant(
        "checkpoint/calibration.py",
        "the calibration of the build",
        "if recorded != self.digest:",
        "if False:",
        (f"{_WEIGHTED}test_another_calibration_is_refused_by_name",),
    ),
    Mutant(
        "checkpoint/calibration.py",
        "mean squares are none below 0",
        "not all(0 <= one < inf for",
        "not all(one < inf for",
        (f"{_WEIGHTED}test_mean_squares_that_are_none_are_refused",),
    ),
    Mutant(
        "commands/requests.py",
        "a weighted sweep needs its weights",
        'if self.weights in ("sweep-weighted", "gptq") and self.calibration is None:',
        "if False:",
        (f"{_WEIGHTED}test_what_cannot_be_meant_is_a_usage_error",),
    ),
    Mutant(
        "verification/levels/decode.py",
        "a record's sweep is still a sweep",
        " or (is_swept and one.rule != SWEPT):",
        ":",
        ("commands/build/test_weights.py::test_a_scale_of_max_calibration_among_swept_ones_is_another_search",),
    ),
    Mutant(
        "write/gpu.py",
        "a chunk of a weighted sweep is whole rows",
        "height = self.height(row_bytes) * row_bytes",
        "pass",
        ("write/test_gpu.py::test_a_chunk_of_a_weighted_sweep_begins_with_the_first_column",),
    ),
    Mutant(
        "commands/requests.py",
        "an export has its scales",
        'if self.weights != "max" and self.export is not None:',
        "if False:",
        ("commands/build/test_weights.py",),
    ),
    Mutant(
        "formats/nvfp4/gptq.py",
        "GPTQ: sums are exact in any order",
        "_FACTOR_BITS, _ERROR_BITS = 15, 23",
        "_FACTOR_BITS, _ERROR_BITS = 15, 40",
        ("formats/test_gptq.py::test_no_order_of_additions_changes_a_bit",),
    ),
    Mutant(
        "formats/nvfp4/gptq.py",
        "GPTQ: a matrix too large for exact sums",
        "if columns > MOST_COLUMNS:",
        "if False:",
        ("formats/test_gptq.py::test_moments_that_are_singular_get_more_damping_or_are_told",),
    ),
    Mutant(
        "write/gpu.py",
        "GPTQ: a device whose sums are not exact",
        "        self._check_gptq()\n",
        "",
        (f"{_DEVICE}::test_a_device_whose_sums_are_not_exact_is_not_used",),
    ),
    _gptq(
        "checkpoint/calibration.py",
        "what is read is what calibration.json names",
        "if (found := digest_of(raw)) != digest:",
        "if (found := digest_of(raw)) is None:",
        "test_a_compensation_that_is_read_is_the_one_that_was_written",
    ),
    _gptq(
        "checkpoint/calibration.py",
        "the input of another width",
        "if shapes != [",
        "if False and shapes != [",
        "test_what_is_said_of_compensations_is_held_against_the_file",
    ),
    _gptq(
        "checkpoint/calibration.py",
        "a CALIB without what it needs",
        "if module not in self.compensations:",
        "if False:",
        "test_what_was_not_calibrated_for_it_is_refused",
    ),
    _gptq(
        "fidelity/moments.py",
        "weights stay near the base",
        "if all(stays_near(*one, here) for one in weights()):",
        "if True:",
        "test_without_it_weights_are_near",
    ),
    _gptq(
        "fidelity/moments.py",
        "parts of another calibration",
        'if said["settings"] != self._settings or said["name"] != name:',
        "if False:",
        "test_parts_of_another_calibration_are_not_mixed_in",
    ),
    _gptq(
        "proof/nvfp4.py",
        "a calibration that is made up",
        "is_free = rule in OF_CALIBRATION and not self.is_near(reading)",
        "is_free = False",
        "test_a_calibration_that_is_made_up_proves_nothing",
    ),
    _gptq(
        "checkpoint/calibration.py",
        "an amax that is not the stored one",
        "if stored != (None if amax is None else _float32(amax)):",
        "if False:",
        "test_what_is_said_of_a_calibration_is_held_against_its_files",
    ),
    _gptq(
        "stage/ownership.py",
        "a calibration of two files is ours",
        "if not indexes and isinstance(shards, list) and len(shards) > 1:",
        "if False:",
        "test_it_is_replaced_and_nothing_else_is",
    ),
    _gptq(
        "commands/calibrate.py",
        "what was kept for --gptq is not thrown away",
        "if not request.gptq and any(number >= runs.count for number in kept.numbers()):",
        "if False:",
        "test_what_was_kept_for_it_is_not_thrown_away",
    ),
    _gptq(
        "proof/nvfp4.py",
        "every code is its own",
        "                if not same or not torch.equal(packed, _canonical(tile.stored, reading)):\n",
        "                if not same:\n",
        "test_a_planted_fault_is_seen",
    ),
)
