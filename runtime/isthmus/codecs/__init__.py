"""Codecs: encoding of tensors before they are sent, and decoding. See docs/training/compression.md."""

from .base import CodecError, NonFiniteError, SegmentCodec, download_seed, upload_seed
from .chain import KNOWN, Chain, parse_chain
from .decoding import Decoder
from .encoding import Encoded, encode
from .residual import Residual

__all__ = [
    "KNOWN",
    "Chain",
    "CodecError",
    "Decoder",
    "Encoded",
    "NonFiniteError",
    "Residual",
    "SegmentCodec",
    "download_seed",
    "encode",
    "parse_chain",
    "upload_seed",
]
