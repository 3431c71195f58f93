"""Stream of a strategy's auxiliary tensors, which the protocol calls the companion of the model."""

import asyncio
from collections.abc import AsyncIterator

from isthmus_contracts.pb import federation_pb2 as pb

from ...framing import model_messages
from ...tensors import State, checksum_of, chunks_of, specs_of
from .global_model import GlobalModel


async def auxiliary_messages(model: GlobalModel, companion: State) -> AsyncIterator[tuple[bytes, int]]:
    """Yield the messages of a Pull of auxiliary tensors, and the number of data bytes in each.

    At the end of a round a strategy may change the tensors while a straggler still reads them. The checksum then does
    not match, and the straggler learns on its next attempt that the model is no longer current.
    """
    header = pb.ModelHeader(round=model.round, digest=model.digest, tensors=specs_of(companion))
    checksum = await asyncio.to_thread(checksum_of, companion)
    for message in model_messages(header, chunks_of(companion), checksum):
        yield message
