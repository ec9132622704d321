"""How much room an output takes on disk, to the byte where that is known before the proof. No torch."""

from collections.abc import Mapping, Sequence

from modelopt_convert.checkpoint.companions import Companions, folders_of
from modelopt_convert.checkpoint.record import RECORD
from modelopt_convert.commands.build.card import Made
from modelopt_convert.commands.build.files import pipeline_files, small_files
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.report.report import ModuleReport, ProofReport
from modelopt_convert.report.words import QUANTIZED_HERE
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes

# Not shorter than what the proof of a module that passes will say; one that fails is not written.
LONGEST = ModuleReport(
    verdict="x" * 24,
    compared="sampled rows",
    codes=10**12,
    codes_equal=10**12,
    codes_tied=10**12,
    zero_signs=10**12,
    scales=10**12,
    scales_equal=10**12,
    scales_tied=10**12,
    scales_idle=10**12,
    blocks_above=10**12,
    padding=10**12,
    relative_error=1234.5678,
    rule="x" * 56,
    reason="x",
)
_VERDICTS = ("reproduced", "near (sampled rows)", "reproduced (sampled rows)", "not proven: replaced")
_COUNTS = 4096  # what the proof may add to the counts of fates, and its method
CONTENT_BYTES = 80  # of a record: the digest of a base that is not read yet


def build_bytes(parts: Sequence[Opened], plans: Sequence[BuildPlan], made: Made, companions: Companions | None) -> int:
    """What a build will take, before its proof has run: the small files are made with the longest it can say."""
    sizes: list[int] = []
    manifests: dict[str, bytes] = {}
    for part, plan in zip(parts, plans, strict=True):
        sizes += shard_sizes(plan.shards)
        files = small_files(part, plan, made, _longest_proof(part, plan), dict.fromkeys(plan.steps, DIGEST))
        sizes += _lengths(files)
        sizes.append(_COUNTS + CONTENT_BYTES)
        manifests[part.prefix.rstrip("/")] = files[RECORD]
    copied = companions.files if companions is not None else {}
    sizes += [file.num_bytes for file in copied.values()]
    if parts[0].prefix:
        named = dict(zip(manifests, plans, strict=True))
        sizes += _lengths(pipeline_files(manifests, named, made, companions, dict.fromkeys(copied, DIGEST)))
    return disk_bytes(sizes, folders=1 + len(parts) * bool(parts[0].prefix) + len(folders_of(copied)))


def _lengths(files: Mapping[str, bytes]) -> list[int]:
    return [len(data) for data in files.values()]


def _longest_proof(part: Opened, plan: BuildPlan) -> ProofReport:
    return ProofReport(
        method="",
        words="x" * 40,
        status=QUANTIZED_HERE if part.export is None else "not proven" if part.base is None else "pass",
        max_error=0.0,
        counts=dict.fromkeys(
            ("reproduced", "near (sampled rows)", "reproduced (sampled rows)", "not proven: replaced"),
            len(plan.modules),
        ),
        fused_scales_differ={", ".join(group): 1.0 for group in plan.fused},
        biases_differ=[],
        modules=dict.fromkeys(sorted(plan.modules), LONGEST),
    )
