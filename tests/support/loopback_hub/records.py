"""What the Hub writes down of each request, the faults planted in its answers, and its own errors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FaultKind = Literal["ignore_range", "wrong_range", "short", "other_etag", "drip", "drip_headers"]


@dataclass
class Request:
    """One request: ``path`` with its query as it was sent, and how many bytes of body came in and went out."""

    method: str
    path: str
    host: str
    status: int
    range: str | None
    num_in: int
    num_out: int
    authorized: bool
    user_agent: str


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match."""

    match: re.Pattern[str]
    method: str | None
    status: int | None
    cut: int | None
    times: int
    headers: Mapping[str, str]
    kind: FaultKind | None
    stall: float

    def hits(self, request: Request) -> bool:
        return (
            self.times > 0
            and self.method in (None, request.method)
            and (self.kind not in ("ignore_range", "wrong_range") or request.range is not None)
            and self.match.search(request.path) is not None
        )


@dataclass
class HubError(Exception):
    """An answer that is an error, with the code by which the client tells one from another."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
