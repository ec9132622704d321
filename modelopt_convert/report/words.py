"""Words of reports that other rooms read back; without pydantic, since a record is read before any report is made."""

from typing import Literal

QUANTIZED_HERE: Literal["quantized here"] = "quantized here"
