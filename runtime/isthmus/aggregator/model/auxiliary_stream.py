"""What a strategy sends along with the model."""

import asyncio
from collections.abc import AsyncIterator

from isthmus_contracts.pb import federation_pb2 as pb

from ...framing import model_messages
from ...tensors import State, checksum_of, chunks_of, specs_of
from .global_model import GlobalModel


async def auxiliary_messages(model: GlobalModel, companion: State) -> AsyncIterator[tuple[bytes, int]]:
    """The answer to a Pull of it.

    A strategy may change the tensors while a straggler still reads them, at the end of a round: then the checksum does
    not fit, and the straggler finds on its next try that the model is not the current one any more.
    """
    header = pb.ModelHeader(round=model.round, digest=model.digest, tensors=specs_of(companion))
    checksum = await asyncio.to_thread(checksum_of, companion)
    for message in model_messages(header, chunks_of(companion), checksum):
        yield message
