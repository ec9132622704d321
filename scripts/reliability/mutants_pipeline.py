"""The guards of whole pipelines that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_BUILD = "commands/build/test_pipeline_output.py"
_ALL = f"{_BUILD}::"
_PUSH = "commands/push/test_pipeline.py"
_POWER = "stage/test_powerloss.py::test_a_power_cut_at_any_step"


def _companions(what: str, old: str, new: str) -> Mutant:
    return Mutant("checkpoint/companions.py", what, old, new, (_BUILD,))


PIPELINE = (
    _companions("weights in pickles alone", "(len(copied) < len(found) and not weights)", "False"),
    _companions("a component that is not there", "if not copied or", "if False or"),
    _companions("a link to a folder in a component", "isinstance(path, Path) and path.is_symlink()", "False"),
    _companions("names of components", "if not (name.isascii() and name.isidentifier())]", "if False]"),
    _companions("a transformer that is not listed", "sorted(set(built) - set(listed))", "sorted(set())"),
    _companions("pickles are not copied", "if not path.lower().endswith(OTHER_WEIGHTS)]", "if True]"),
    Mutant(
        "commands/command.py", "copied files are compared before the swap", "file.check_unchanged()", "pass", (_BUILD,)
    ),
    Mutant(
        "stage/ownership.py", "an edited copy is foreign", "return found == {name: digest}", "return True", (_BUILD,)
    ),
    Mutant(
        "verification/levels/record.py",
        "the bytes of copies",
        "if digest.hexdigest() == copied[path] else",
        "if True else",
        (_BUILD,),
    ),
    Mutant(
        "verification/levels/record.py",
        "copies that are gone",
        'faults.append(f"{path} was copied',
        'str(f"{path} was copied',
        (_BUILD,),
    ),
    Mutant(
        "verification/levels/record.py",
        "weights beside copies",
        "failures, _ = unlisted(_below(root, folder),",
        "failures, _ = [], (_below(root, folder),",
        (_BUILD,),
    ),
    Mutant(
        "verification/levels/record.py",
        "weights beside a pipeline",
        "    failures, _ = unlisted(root, set(names(root)) - tops)\n    faults += failures\n",
        "",
        (_BUILD,),
    ),
    Mutant(
        "verification/levels/record.py",
        "files above the transformers",
        'if name not in _EDITABLE and "/" not in name and',
        "if False and",
        (_BUILD,),
    ),
    _companions("a pointer of git-lfs", "file.read(0, len(_LFS_POINTER)) == _LFS_POINTER", "False"),
    _companions("shards that an index lists", "in sorted(named - weights.keys()):", "in ():"),
    _companions("shards that no index lists", "if _SHARD.fullmatch(", "if None and _SHARD.fullmatch("),
    _companions("a model without weights", "if config is not None and not weights:", "if False:"),
    _companions("a model without a config", 'if config is None and any(path.count("/") == 1', "if False and any(True"),
    _companions("a model without a class", 'if not isinstance(says.get("_class_name"), str):', "if False:"),
    _companions("text in a list is no setting", "return has_text or", "return"),
    _companions("a folder is no setting", "(has_folder and value != [None, None])", "False"),
    _companions("a folder that is null", "value != [None, None]", "True"),
    _companions("a pipeline of its own code", 'if not isinstance(found.get("_class_name"), str):', "if False:"),
    Mutant("commands/build/command.py", "null folders are named", "if companions.unlisted:", "if False:", (_BUILD,)),
    Mutant(
        "checkpoint/index.py",
        "variants are skipped",
        "if name not in variants] or",
        "if True] or",
        ("checkpoint/test_reader.py",),
    ),
    Mutant("checkpoint/index.py", "variants alone", "] or list(shards)", "]", ("checkpoint/test_reader.py",)),
    Mutant(
        "checkpoint/pipeline.py",
        "null is no quantization",
        '.get("quantization_config") is not None',
        '.get("quantization_config", 0) != 0',
        ("checkpoint/test_pipeline.py",),
    ),
    Mutant(
        "plan/inputs.py",
        "how a base is quantized says nothing of the model",
        '- {"_class_name", _QUANTIZATION})',
        '- {"_class_name"})',
        ("plan/test_configs.py",),
    ),
    Mutant(
        "commands/build/command.py",
        "all of the pipeline is an input",
        "inputs += tuple(places_read(self._base))",
        "pass",
        (f"{_ALL}test_all_of_the_pipeline_is_an_input",),
    ),
    Mutant(
        "commands/requests.py",
        "to reports, too",
        "found += places_read(parse_location(str(self.base)))",
        "pass",
        (f"{_ALL}test_all_of_the_pipeline_is_an_input",),
    ),
    Mutant(
        "checkpoint/companions.py",
        "what is linked there is an input",
        "return [root, *filter(Path.is_symlink, found)]",
        "return [root]",
        (f"{_ALL}test_all_of_the_pipeline_is_an_input",),
    ),
    _companions("names of copies are text", "        check_name(folder, name)\n", ""),
    _companions("names of licenses are text", "            check_name(root, name)\n", ""),
    Mutant(
        "inspection/component.py",
        "what is known of FP8 is told",
        "*_known(reader.config, modules, dialect.name)",
        "*_known(reader.config, packed, dialect.name)",
        (_BUILD,),
    ),
    Mutant(
        "commands/build/card.py",
        "no card names a command that is known to fail",
        "if one.engine == DEFAULT and one.is_broken]:",
        "if False]:",
        (_BUILD,),
    ),
    Mutant(
        "checkpoint/record.py",
        "paths of copies stay inside",
        'if not {"", ".", ".."} & {*path.split("/")}',
        "if True",
        ("checkpoint/test_copied_files.py",),
    ),
    Mutant(
        "commands/push/publishable.py",
        "a copy that is a link",
        "check_link(checkpoint, checkpoint / path)",
        "pass",
        (_PUSH,),
    ),
    Mutant(
        "commands/push/publishable.py",
        "paths of a machine in copies",
        'if path.endswith("config.json"):',
        "if False:",
        (_PUSH,),
    ),
    Mutant("commands/push/changes.py", "copies of before go", "if path in copied or (ours", "if (ours", (_PUSH,)),
    Mutant(
        "commands/push/changes.py",
        "weights of others in components",
        "(*local.paths, *copied)}",
        "(*copied,)}",
        (_PUSH,),
    ),
    Mutant("stage/leftovers.py", "copies in a dead stage are mopt's", "name in copied or", "", (_POWER,)),
    Mutant("stage/directory.py", "the names of copies are on disk first", "if self._copies:", "if False:", (_POWER,)),
)
