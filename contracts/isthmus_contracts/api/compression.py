"""Compression in the manifest: a chain of codecs for each direction, written as one string, like ``Delta+Int8+Zstd``.

A chain is a string, and not a list, so that the simple case reads ``upload: Int8`` (a CRD field cannot be either a
string or a list), and so that one pattern lets the API server check the order too.
"""

import re
from typing import Annotated

from pydantic import Field, field_validator

from .fields import Decimal, Resource

NONE = "None"
DELTA, TOP_K, ROTATION, ZSTD = "Delta", "TopK", "Rotation", "Zstd"
HALVES = ("Float16", "BFloat16")
INTEGERS = ("Int8", "Int4")
KNOWN_CODECS = (DELTA, TOP_K, ROTATION, *HALVES, *INTEGERS, ZSTD)

_QUANTISED = r"(Rotation\+)?(Int8|Int4)"
_SPARSE = r"TopK(\+(Float16|BFloat16|Int8|Int4))?"
PATTERN_UPLOAD = rf"^(None|Zstd|(Delta\+)?(Float16|BFloat16|{_QUANTISED}|{_SPARSE})(\+Zstd)?)$"
PATTERN_DOWNLOAD = rf"^(None|Zstd|(Delta\+)?(Float16|BFloat16|{_QUANTISED})(\+Zstd)?)$"

_ORDER = "[Delta+][TopK+ | Rotation+][Float16 | BFloat16 | Int8 | Int4][+Zstd]"


def _chain(pattern: str) -> object:
    """Return a field whose schema has the pattern; :func:`_problem` formats its errors."""
    return Field(max_length=64, json_schema_extra={"pattern": pattern})


class Compression(Resource):
    """Encoding of tensors for transport. Integers, booleans, small tensors and buffers (such as batch-norm statistics)
    always travel unchanged."""

    upload: Annotated[str, _chain(PATTERN_UPLOAD)] = NONE
    """For the clients' updates: None, or a chain [Delta+][TopK+|Rotation+][Float16|BFloat16|Int8|Int4][+Zstd], such as
    Int8 or TopK+Int8. All but Zstd alone imply Delta (the difference from the round's global model). TopK keeps an
    error feedback at the client."""
    download: Annotated[str, _chain(PATTERN_DOWNLOAD)] = NONE
    """For the global model: the same without TopK; Float16 and BFloat16 do not imply Delta here. The decoded model is
    the global model, also in checkpoints."""
    top_k_fraction: Decimal = "0.01"
    """Share of each tensor's elements that TopK sends: above 0, at most 0.5."""

    @field_validator("upload")
    @classmethod
    def _upload_is_chain(cls, chain: str) -> str:
        if not re.fullmatch(PATTERN_UPLOAD, chain):
            raise ValueError(_problem(chain))
        return chain

    @field_validator("download")
    @classmethod
    def _download_is_chain(cls, chain: str) -> str:
        if not re.fullmatch(PATTERN_DOWNLOAD, chain):
            if TOP_K in chain.split("+"):
                raise ValueError("TopK is for uploads: the aggregator keeps no error feedback")
            raise ValueError(_problem(chain))
        return chain

    @field_validator("top_k_fraction")
    @classmethod
    def _is_fraction(cls, fraction: str) -> str:
        if not 0 < float(fraction) <= 0.5:
            raise ValueError(f"must be above 0 and at most 0.5, not {fraction}")
        return fraction

    @property
    def upload_codecs(self) -> list[str]:
        """Codecs of the upload as named in the protocol, including the implied ones."""
        # The rounding error of weights does not come from training; strategies with state would accumulate it.
        return self._codecs(self.upload, {TOP_K, *INTEGERS, *HALVES})

    @property
    def download_codecs(self) -> list[str]:
        """Codecs of the download as named in the protocol, including the implied ones."""
        return self._codecs(self.download, {*INTEGERS})

    def _codecs(self, chain: str, on_differences: set[str]) -> list[str]:
        names = [] if chain == NONE else chain.split("+")
        if names and names[0] != DELTA and on_differences & set(names):
            names.insert(0, DELTA)
        return [f"{TOP_K}={float(self.top_k_fraction):g}" if name == TOP_K else name for name in names]


def _problem(chain: str) -> str:
    """Return why a string is not a valid chain, and how to fix it."""
    names = chain.split("+")
    if unknown := [name for name in names if name not in (NONE, *KNOWN_CODECS)]:
        return f"{unknown[0]!r} is no codec; there are {', '.join((NONE, *KNOWN_CODECS))}"
    if NONE in names:
        return f"None stands alone, not in {chain!r}"
    if ZSTD in names[:-1]:
        return f"Zstd comes last, not as in {chain!r}"
    if names[0] == DELTA and set(names) <= {DELTA, ZSTD}:
        return f"{chain!r} gains nothing: Delta needs Float16, BFloat16, Int8, Int4 or TopK after it"
    if ROTATION in names and not set(INTEGERS) & set(names):
        return f"Rotation needs Int8 or Int4 after it, not as in {chain!r}"
    return f"{chain!r} is not in the order {_ORDER}"
