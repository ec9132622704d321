"""The comparisons of an export with its base that mutants.py turns round, each with the tests that are to notice."""

from mutants_disk import Mutant

_BLOCKS = "proof/test_blocks.py"
_NVFP4 = "proof/test_judgement.py"
_FP8 = "proof/test_judgement_fp8.py"
_CASTS = "commands/build/test_base_dtypes.py"
_NAMES = "verification/test_record.py::test_a_renamed_weight_file_fails"


def _blocks(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/blocks.py", what, old, new, (_BLOCKS,))


def _nvfp4(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/nvfp4.py", what, old, new, (_NVFP4,))


def _fp8(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/fp8.py", what, old, new, (_FP8,))


def _shared(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/judgement.py", what, old, new, (_NVFP4,))


def _padding(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/padding.py", what, old, new, ("proof/test_padding.py",))


def _export(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("proof/export.py", what, old, new, tests or (_NVFP4,))


def _cast(what: str, old: str, new: str) -> Mutant:
    return Mutant("proof/unquantized.py", what, old, new, ("proof/test_unquantized.py",))


def _record(what: str, old: str, new: str, *tests: str, file: str = "checkpoint") -> Mutant:
    return Mutant(f"{file}/record.py", what, old, new, tests or ("verification/test_record.py",))


PROOF = (
    _blocks("codes are compared", "!= expected[0].view(", "!= found[0].view("),
    _blocks("scales are compared", "differs |= found[1] != expected[1]", "pass"),
    _blocks("a tie ends at 2 ulp", "TIE = 2.4e-7", "TIE = 2.9e-7"),
    _blocks("a tie goes to 2 ulp", "TIE = 2.4e-7", "TIE = 1.7e-7"),
    _blocks("a tie is at the midpoint", "neighbours & same_sign & ((quotient", "neighbours & same_sign | ((quotient"),
    _blocks("a tie is a neighbour", ".abs() == 1\n", ".abs() >= 1\n"),
    _blocks("a tie has the value's sign", "same_sign & ((quotient", "((quotient"),
    _blocks("a zero has either sign", " | ((codes & 7) == 0)\n", "\n"),
    _blocks("a zero over a value is wrong", " & ((nearest & 7) == 0)", ""),
    _blocks(
        "a tied scale is at the midpoint",
        "(wanted - middle).abs() <= TIE * middle",
        "(wanted - middle).abs() <= middle",
    ),
    _blocks("a zero byte underflows", " & self._underflows(blocks)", ""),
    _blocks("a zero byte excuses no code", " & equal.all(dim=1)", ""),
    _blocks("an idle block is all zeros", ".all(dim=1) & ~same_scale", ".any(dim=1) & ~same_scale"),
    _blocks("an idle block's codes are judged", "torch.where(idle, max_values, values)", "values"),
    _blocks("an idle scale is zero or odd", "(idle & (scale == 0))", "idle"),
    _blocks("a block with a wrong code is odd", " & ~wrong.any(dim=1)", ""),
    _blocks("errors above", "above = error > least *", "above = error < least *"),
    _blocks("errors slightly above", "_ROUNDING = 1e-5", "_ROUNDING = 1e-2"),
    _blocks("rounding of the comparison", "_ROUNDING = 1e-5", "_ROUNDING = -1e-2"),
    _blocks("few blocks are damage", "FEW = 0.01", "FEW = 0.02"),
    _blocks("none is no damage", "return 0 < self", "return 0 <= self"),
    _blocks("wrong codes are not nearest", "self.wrong_codes == 0 and self", "self"),
    _blocks("blocks above are not nearest", " and self.blocks_above == 0", ""),
    _blocks("exact codes", "return self.codes_equal == self.codes and ", "return "),
    _blocks(
        "exact scales",
        "self.codes_equal == self.codes and self.scales_equal + self.scales_zero == self.scales",
        "self.codes_equal == self.codes",
    ),
    _blocks("tied scales", "return codes == self.codes and ", "return "),
    _blocks("the first place stays", "self._first_wrong is None and len(bad)", "len(bad)"),
    _blocks("the first other place stays", "self._first_other or difference(0)", "difference(0)"),
    _blocks("what is wrong is named first", "self._first_wrong or self._first_other", "self._first_other"),
    _blocks("an error above is named", "bad = (above | wrong.any(dim=1))", "bad = (wrong.any(dim=1))"),
    _blocks("a wrong code is named", "bad = (above | wrong.any(dim=1))", "bad = (above)"),
    _blocks("a searched scale is not wrong", " and not (wrong[block].any() and", " and not (False and"),
    _blocks("the other neighbour below", "for step in (-1, 1):", "for step in (1,):"),
    _blocks("the other neighbour above", "for step in (-1, 1):", "for step in (-1,):"),
    _blocks("the larger of both errors", "torch.maximum(error[tied], ", "torch.minimum(error[tied], "),
    _nvfp4(
        "one reading for all rows",
        "is_like = one.tally.is_exact or one.tally.is_tied",
        "is_like = bool(one.tally.scales_equal)",
    ),
    _nvfp4("damage is not nearest", " and not one.tally.is_damaged)", ")"),
    _nvfp4("the nearest is nearest", "one.is_complete and one.tally.is_nearest and", "one.is_complete and"),
    _nvfp4("nothing is clipped", "one.amax <= float(", "one.amax >= 0 * float("),
    Mutant("proof/nvfp4.py", "a tie does not end the search", "tied = tied or one", "return one", (_CASTS,)),
    Mutant("proof/nvfp4.py", "a cast that no scale was made of", "beyond = beyond or one", "return one", (_CASTS,)),
    _nvfp4("a scale far too large", "verdict if near.within(self.due.max_error) else", "verdict if near else"),
    _nvfp4(
        "what is tied is not exact",
        "if self.tally.is_exact or self.swept in OF_CALIBRATION:",
        "if self.tally.is_tied or self.swept in OF_CALIBRATION:",
    ),
    _nvfp4("compressed: codes", "if not torch.equal(packed, _canonical(tile.stored, reading)) or not", "if not"),
    _nvfp4("compressed: the scale of another", "if not 0.0 < float(own) < float(factor):", "if False:"),
    _nvfp4("near within the limit", "if near.within(limit) and", "if"),
    _nvfp4("near in every strip", " and sums.worst_strip() <= limit and not tried", " and not tried"),
    _nvfp4("damage is not near", " and not tried.tally.is_damaged:", ":"),
    Mutant(
        "proof/nvfp4.py",
        "near under one reading alone",
        "if self.is_clear(reading, near.relative_error) else",
        "if True else",
        ("proof/test_refusals.py::test_a_layout_that_cannot_be_told_is_refused",),
    ),
    _nvfp4("unrelated", ">= RELATED_COSINE", ">= 0.0"),
    _fp8("every code", "differs = wanted != tile.stored", "differs = wanted > tile.stored"),
    _fp8("all codes or none", "is_equal = found.equal == found.codes", "is_equal = found.share > 0.999"),
    _fp8("few codes are damage", "< FEW * found.codes", "<= FEW * found.codes"),
    _fp8("damage of a whole module", "damaged = is_whole and", "damaged ="),
    _fp8("near within the limit", "if not near.within(limit) or", "if"),
    _fp8("near in every strip", " or sums.worst_strip() > limit or", " or"),
    _fp8("what is cut off is within the limit", "found.clipped.count > 0 or (is_whole", "(is_whole"),
    _fp8("a scale far too large", "self.due.scale > AMPLE *", "self.due.scale < 0 *"),
    _fp8("unrelated", ">= RELATED_COSINE", ">= 0.0"),
    _fp8("related", ">= RELATED_COSINE", ">= 0.9"),
    _fp8("codes that are no number", "(codes & 0x7F) == 0x7F", "(codes & 0x7F) == 0xFF"),
    _fp8("the scale rounded too", ", _Rule(dtype, dtype, dtype)]", "]"),
    _fp8("the quotient in F32", '[_Rule(dtype, "F32"), ', "["),
    _fp8("what is clipped is told", "found.clipped if found.clipped.count else None", "None"),
    _shared("a scale is one of max calibration", "if one.scale not in calibrated:", "if False:"),
    _shared("of the largest", "max(largest[one.scale], one.amax)", "one.amax"),
    _shared("of the module itself", "if not (one.is_whole and one.passed):", "if not one.is_whole:"),
    _shared("of what was compared whole", "if not (one.is_whole and one.passed):", "if not one.passed:"),
    _shared("compressed beside the largest alone", "in (COMPRESSED, *OF_CALIBRATION)", "in OF_CALIBRATION"),
    _shared("a weight of zeros", " if scale else 1.0", ""),
    _export("the scales of all modules together", "in with_shared_scales(rules, found).items():", "in found.items():"),
    _export("most modules tell another base", "2 * len(unrelated) <= len(", "2 * len(unrelated) < len("),
    _export("another base is told", "if 2 * len(unrelated) <= len(modules):", "if True:"),
    _padding("columns of padding are zero", "stored[:, half:].count_nonzero() + ", ""),
    _padding("rows of padding are zero", " + stored[max(0, module.rows - top) :, :half].count_nonzero()", ""),
    _padding("rows are counted on", "top += len(stored)", "pass"),
    _padding("padding of scales is counted", "num_bytes - module.rows * module.columns // BLOCK_SIZE", "num_bytes * 0"),
    _shared("the factor of a group", "for scale in calibrated)", "for scale in calibrated[:1] * 2)"),
    _export("a cause is named", "    if not _is_other_base(export, modules, faults):\n", "    if False:\n"),
    _export("what rows tell is tried first", "reading=due.reading or look.reading, rule=look.rule", "rule=look.rule"),
    _export("sampled rows are kept", "one.closeness or modules[name].closeness", "one.closeness"),
    _export(
        "unquantized tensors are the base's",
        "[*proof.unquantized_differ, *biases]",
        "biases",
        "plan/test_refusals_base.py::test_unquantized_tensors_that_differ_tell_another_base",
    ),
    _export(
        "biases are the base's",
        "[*proof.unquantized_differ, *biases]",
        "proof.unquantized_differ",
        "plan/test_refusals_base.py::test_a_bias_of_a_packed_module_may_be_near_where_that_is_accepted",
    ),
    _export(
        "biases are near at least",
        "if not is_near_base(export, base, name, near)]",
        "if False]",
        "plan/test_refusals_base.py::test_another_bias_of_a_packed_module_is_refused",
    ),
    _export(
        "a few rows refute nothing",
        "if rows is None or found.verdict not in REFUTED else",
        "if True else",
        "proof/test_refusals.py::test_a_merged_lora_is_refused_and_never_called_proven",
    ),
    _record(
        "what is no file is no missing record",
        "    if not is_there(path):\n        return None",
        "    if not path.is_file():\n        return None",
    ),
    _record("so above transformers", "if not is_there(path) or", "if not path.is_file() or"),
    Mutant(
        "checkpoint/location.py",
        "small files are small",
        "if file.num_bytes > limit:",
        "if False:",
        ("verification/test_record.py::test_what_is_no_file_is_no_missing_record",),
    ),
    _export(
        "a base of less precision is told",
        'side == "base" and plan',
        "False and plan",
        "commands/build/test_families.py::test_a_base_of_less_precision_is_the_base_all_the_same_and_told",
    ),
    _cast("the export is the base's cast", "if equal_after(values, path, wanted)]", "if False]"),
    _cast("the base is the export's cast", "if equal_after(wanted, path, values)]", "if False]"),
    _cast("values of both are compared", "if not (down or up):", "if False:"),
    _cast("the side that is rounded", 'return "export" if down else "base"', 'return "export"'),
    _record("a record has its schema", 'record.get("schema") != _SCHEMA or not all(', "not all("),
    _record("the names of weight files", ', "shards": sorted(shards)}', "}", _NAMES),
    _record(
        "weight files have their names",
        " + _name_faults(reader, record)",
        "",
        _NAMES,
        file="verification/levels",
    ),
    _record("a status of any type", 'str(proof.get("status")) in _KNOWN else', 'proof.get("status") in _KNOWN else'),
)
