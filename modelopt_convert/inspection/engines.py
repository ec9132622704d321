"""What each engine takes a checkpoint of ModelOpt's dialect for, against what it is."""

from collections.abc import Collection, Iterator

from modelopt_convert.checkpoint.config import OWN
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.engines import vllm_omni
from modelopt_convert.engines.belief import Belief, mistaken
from modelopt_convert.engines.limits import declared
from modelopt_convert.engines.outcome import Reading
from modelopt_convert.engines.sglang import GUESSED, believe_fp8, misread
from modelopt_convert.engines.sglang_files import Named, read
from modelopt_convert.families.table import recognise
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.table import is_modelopts
from modelopt_convert.plan.ignore import spellings
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import preset_of_class
from modelopt_convert.report.inspect import EngineReport, LayoutReport


def linears_of(reader: CheckpointReader) -> list[str]:
    """All Linears of a checkpoint, packed or not."""
    found = (name for name, one in reader.tensors.items() if name.endswith(".weight") and len(one.shape) == 2)
    return [name.removesuffix(".weight") for name in found]


def is_one_file(reader: CheckpointReader) -> bool:
    """Whether engines take it for one file: where no config.json of its own is beside it, it is no repo to them."""
    return reader.is_alone or reader.config_from != OWN


def sglang_reading(reader: CheckpointReader) -> Reading:
    """What SGLang makes of a transformer, of the files that it lies in; of FP8 in a repo ``beliefs`` says it."""
    found = recognise({name: info.shape for name, info in reader.tensors.items()})
    named = Named(found.family.name, found.spelling != "diffusers", found.prefix) if found is not None else None
    return read(
        reader.tensors,
        reader.metadata,
        reader.config,
        is_file=is_one_file(reader),
        named=named,
        whole=reader.stored.keys(),
    )


def beliefs(reader: CheckpointReader) -> Iterator[Belief]:
    """What the engines believe that decide by names: SGLang of formats that it does not guess, vLLM-omni of all.

    Raises:
        InputError: ``config.ignore``.
    """
    config, path = reader.config, reader.config_place
    algorithm = declared(config)
    if algorithm is None or not is_modelopts(config["quantization_config"]):
        return
    if algorithm not in GUESSED:
        preset, linears = preset_of_class(config), linears_of(reader)
        rules = preset.sets().get(algorithm) if preset is not None else None
        matcher = PatternMatcher(linears)
        plain = rules.structural if rules is not None else ()
        names = {
            name: spellings(name, preset, config)
            for name in linears
            if not any(matcher.matches(pattern, name) for pattern in plain)
        }
        yield believe_fp8(names, config, path)
    yield vllm_omni.believe(reader.tensors, config, path)


def engine_report(belief: Belief, misreads: Collection[str]) -> EngineReport:
    """One engine's part of the report."""
    layout = {"nibble_order": belief.layout.nibbles, "scale_layout": belief.layout.scales}
    return EngineReport(
        name=belief.engine,
        believes={
            **(layout if belief.group_size is not None else {"nibble_order": "none", "scale_layout": "none"}),
            "group_size": belief.group_size,
            "packed_modules": len(belief.modules),
            "input_scales": belief.input_scales,
            "fused_modules": len(belief.fused),
            "unset_scales": len(belief.unset),
        },
        because=list(belief.because),
        misreads=list(misreads),
    )


def engine_reports(reader: CheckpointReader, packed: Collection[str], layout: LayoutReport) -> list[EngineReport]:
    """Of the engines that decide by names; none where nothing is packed."""
    if not packed:
        return []
    reports = []
    for belief in beliefs(reader):
        read = misread(belief, layout.nibble_order, layout.scale_layout, group_size=BLOCK_SIZE, packed=frozenset())
        taken = mistaken(belief, packed, [*linears_of(reader), *packed])
        reports.append(engine_report(belief, list(dict.fromkeys([*read, *taken]))))
    return reports
