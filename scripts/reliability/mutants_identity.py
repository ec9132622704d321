"""What is told of a base and of unquantized values that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_CONTENT = "checkpoint/test_content.py::"
_HOLE = f"{_CONTENT}test_where_one_byte_was_not_read_there_is_none"
_READ = f"{_CONTENT}test_it_is_the_same_however_the_bytes_are_read"
_BASE = "commands/test_base_content.py::test_"
_BUILD = f"{_BASE}a_build_records_and_reports_all_bytes_of_its_base"
_VERIFY = f"{_BASE}verify_tells_of_another_base_that_proves_the_same"
_NEUTRAL = f"{_BASE}a_digest_in_the_record_makes_nothing_weaker_or_stronger"
_REWRITE = f"{_BASE}a_rewrite_records_its_base_and_tells_of_another"
_FINITE = "formats/test_finite.py"
_ODD = "commands/test_not_finite.py::test_"
_TOLD = f"{_ODD}a_build_and_verify_tell_it_and_the_verdict_stands"
_CONFIGS = "plan/test_configs.py::test_"
_ONE_SIDED = f"{_CONFIGS}keys_of_one_side_are_told_with_their_values"
_EVERY_KEY = f"{_CONFIGS}every_key_is_equal_refused_told_or_of_no_model"
_REWRITTEN = f"{_CONFIGS}a_rewrite_tells_keys_of_one_side"


def _content(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("checkpoint/content.py", what, old, new, tests or (_READ,))


def _finite(what: str, old: str, new: str) -> Mutant:
    return Mutant("formats/finite.py", what, old, new, (_FINITE,))


def _of(file: str, what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"{file}.py", what, old, new, tests)


IDENTITY = (
    _content("a hole ends the digest", "if not 0 <= known < len(piece):", "if known >= len(piece):", _HOLE),
    _content("bytes that were digested are not again", "memoryview(piece)[known:]", "memoryview(piece)"),
    _content("what says nothing new adds nothing", "if not 0 <= known < len(piece):", "if not 0 <= known:"),
    _content("of all tensors or of none", " if found.keys() == self._tensors.keys() else None", "", _HOLE),
    _content("tensors of no byte", "found = empty | self.done", "found = dict(self.done)"),
    _of("checkpoint/digests", "headers are covered", "json.dumps([headers_sha256, dict", 'json.dumps(["", dict', _READ),
    _of("checkpoint/digests", "tensors are covered", "headers_sha256, dict(tensors)]", "headers_sha256, {}]", _READ),
    _of("checkpoint/reader", "what fills a buffer", "self.content.note(name, begin, target)", "pass", _READ),
    _of("checkpoint/reader", "what is read by ranges", "self.content.note(name, begin, found)", "pass", _READ),
    _of("commands/command", "a base is digested", "        if is_base:", "        if False:", _BUILD),
    _of("commands/command", "the report has it", '"identity": reader.identity()', '"identity": one.identity', _BUILD),
    _of("write/attempt", "a task gives it back", "content=content)", "content={})", "write/test_attempt.py"),
    _of(
        "write/attempt",
        "a task digests",
        "            base.digest_content()",
        "            pass",
        "write/test_attempt.py",
    ),
    _of(
        "write/stream",
        "what a task gives back is taken",
        'readers["base"].take_content(name, digest)',
        "pass",
        "write/test_ray_cluster.py::test_a_killed_worker_changes_nothing",
    ),
    _of("checkpoint/record", "another base is told", "or recorded == found:", "or True:", _VERIFY),
    _of("checkpoint/record", "the same base is not", "or recorded == found:", "or False:", _VERIFY),
    _of("checkpoint/record", "a record without it says nothing", "if recorded is None or", "if", _NEUTRAL),
    _of("checkpoint/record", "a base of which rows were read is no other", "or found is None or", "or", _VERIFY),
    _of("verification/transformer", "verify tells", "scanned.warnings += other_base(", "str(other_base)  # (", _VERIFY),
    _of(
        "verification/levels/record",
        "an edited card is not as recorded",
        "found.edited += [name] * is_editable",
        "pass",
        "verification/test_verify.py::test_an_edited_card_is_a_warning",
    ),
    _of("commands/rewrite/command", "rewrites tell", "+= compare_bases(reader, against)", "+= []", _REWRITE),
    _of(
        "commands/rewrite/command",
        "a record beside a single file",
        "against is not None and not source_path.is_file()",
        "against is not None",
        f"{_BASE}a_record_beside_a_single_file_is_not_of_that_file",
    ),
    _of(
        "commands/rewrite/proof",
        "a record that cannot be read",
        "return [(error.code, error.message)]",
        "return []",
        f"{_BASE}a_record_that_cannot_be_read_is_told_by_a_rewrite",
    ),
    _finite("infinity", ".max() < infinity and", ".max() <= infinity and"),
    _finite("infinity below zero", "bits.max() < sign | infinity", "bits.max() <= sign | infinity"),
    _finite("either sign", ".max() < infinity and bits", ".max() < infinity or bits"),
    _finite("infinity is counted", ">= infinity)", "> infinity)"),
    _finite("the sign does not count", "bits & (sign - 1)", "bits"),
    _finite("the place is that in the tensor", "self._passed + first", "first"),
    _finite("the first place", "if count and not self._count:", "if count:"),
    _finite("all pieces are counted", "self._count += count", "self._count = count"),
    _of("write/stream", "what is cast", '"copy", "cast_bf16", "dequ', '"copy", "dequ', _TOLD),
    _of("write/stream", "what is copied", '"copy", "cast_bf16", "dequ', '"cast_bf16", "dequ', _TOLD),
    _of(
        "write/stream",
        "what a scale makes",
        '"cast_bf16", "dequantize_fp8"}',
        '"cast_bf16"}',
        f"{_ODD}what_becomes_infinity_by_its_scale_is_told",
    ),
    _of(
        "commands/build/command", "builds tell", "+= not_finite_warnings(done.not_finite, part.prefix)", "+= []", _TOLD
    ),
    _of(
        "commands/rewrite/command",
        "rewrites tell what is not finite",
        "+= not_finite_warnings(done.not_finite)",
        "+= []",
        f"{_ODD}rewrites_tell_it",
    ),
    _of("verification/levels/record", "verify looks", "        watch.add(chunk)", "        pass", _TOLD),
    _of(
        "verification/levels/record",
        "verify looks without a record",
        "if is_compared and one",
        "if False and one",
        _TOLD,
    ),
    _of(
        "verification/levels/container",
        "verify tells what is not finite",
        "warnings.append(not_finite_words(found))",
        "pass",
        _TOLD,
    ),
    _of(
        "verification/levels/container",
        "verify tells keys",
        "        if subject.reader.config:",
        "        if False:",
        _ONE_SIDED,
    ),
    _of(
        "plan/from_export",
        "builds tell keys",
        ', "the export") if base is not None else []',
        ', "") if False else []',
        _ONE_SIDED,
    ),
    _of("plan/inputs", "quantization is no key of the model", "if key != _QUANTIZATION and not", "if not", _EVERY_KEY),
    _of("plan/inputs", "who wrote it is no key of the model", ' and not key.startswith("_"))', ")", _EVERY_KEY),
    _of("plan/inputs", "keys of the base", ', ("the base", theirs, mine))', ",)", _EVERY_KEY),
    _of(
        "plan/inputs",
        "values of both",
        'check_same_config(export, base, "export")',
        "pass",
        "plan/test_refusals_base.py::test_a_base_of_another_class_or_config_is_refused",
    ),
    _of(
        "commands/rewrite/proof",
        "a rewrite compares configs",
        'check_same_config(source, base, "source")',
        "pass",
        f"{_CONFIGS}another_value_of_the_architecture_is_refused_with_both",
    ),
    _of(
        "commands/rewrite/proof",
        "a rewrite tells keys",
        'base.config, "the source")]',
        'source.config, "")]',
        _REWRITTEN,
    ),
)
