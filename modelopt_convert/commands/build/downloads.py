"""How much a build will fetch from the Hub, for the report. No torch."""

from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.readings import proof_readings, step_readings
from modelopt_convert.report.report import Report


def note_fetch(report: Report, part: Opened, plan: BuildPlan, *, whole: bool) -> None:
    """Put into the report what is still to be fetched of one transformer's inputs.

    Args:
        report: Knows which inputs are on the Hub.
        part: The inputs.
        plan: What will be built from them.
        whole: Whether files are fetched whole.
    """
    for role, reader in part.readers.items():
        if noted := report.network.get(f"{part.prefix}{role}"):
            everything = [(name, 0, info.num_bytes) for name, info in reader.tensors.items()]
            needed = [
                *proof_readings(plan, role, reader.tensors),
                *step_readings(plan.steps, role, reader.tensors),
            ]
            noted.to_fetch_bytes = reader.unfetched(everything if whole else needed)


def to_fetch_bytes(report: Report) -> int | None:
    """Of all inputs together; None where none is on the Hub."""
    return sum(one.to_fetch_bytes or 0 for one in report.network.values()) if report.network else None
