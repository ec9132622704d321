"""Refuse a build with all that is wrong: the rest is looked at before it is refused, and nothing is written."""

from collections.abc import Sequence

from modelopt_convert.commands.build.inputs import Opened, to_fetch
from modelopt_convert.commands.build.proof import Proven, add_unproven, compare_rest, prove_part
from modelopt_convert.commands.requests import BuildRequest
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.run.errors import Faults
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread


def look_on(
    parts: Sequence[Opened], plans: Sequence[BuildPlan], request: BuildRequest, progress: Progress, faults: Faults
) -> None:
    """Refuse what is wrong in headers, and with it what is wrong in the data of all other modules.

    No more is read than the proof would read. A dry run reads no data, and nothing is fetched for it.

    Args:
        parts: All transformers.
        plans: For each that has one, the plan of the modules without faults.
        request: What is asked for.
        progress: Told what is read.
        faults: What headers say.

    Raises:
        InputError: All of it.
    """
    is_blind = request.dry_run or request.export is None or len(plans) < len(parts)
    if is_blind or any(any(to_fetch(*one, request).values()) for one in zip(parts, plans, strict=True)):
        faults.refuse()
    progress.announce("refused for what headers say; data is looked at too, so that all faults are told")
    data = Faults()  # of its own: what headers say of a module's input scale excuses nothing of its weight
    with torch_on_one_thread(), faults.taken():
        asked = zip(parts, plans, strict=True)
        proofs = [prove_part(part, plan, request, progress, data.under(part.prefix)) for part, plan in asked]
        refuse_found(parts, proofs, request, progress, data, is_certain=True)
    faults.refuse()


def refuse_found(
    parts: Sequence[Opened],
    proofs: list[Proven],
    request: BuildRequest,
    progress: Progress,
    faults: Faults,
    *,
    is_certain: bool = False,
) -> None:
    """Refuse what failed, if anything did; what is not compared yet is, so that one run tells all.

    Args:
        parts: All transformers.
        proofs: Of each, as far as it goes.
        request: What is asked for.
        progress: Told what is read.
        faults: Causes of failure that can be named.
        is_certain: Whether the run is refused for something else in any case.

    Raises:
        InputError: Causes of failure that can be named.
        CheckFailedError: ``check.proof``.
    """
    if not is_certain and not faults and all(one.report.status != "fail" for one in proofs):
        return
    for number, (part, found) in enumerate(zip(parts, proofs, strict=False)):
        mine = faults.under(part.prefix)
        proofs[number] = found = compare_rest(part, found, request, progress, mine)
        add_unproven(part, found.report, mine, accept_near=request.accept_near)
    faults.refuse()
