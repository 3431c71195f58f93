"""Random bytes from a cryptographic generator, at the speed of AES."""

import os
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Entropy = Callable[[int], bytes]
"""Function that returns a number of random bytes."""


def keystream() -> Entropy:
    """Return a generator with a new key of the system's: AES-256 in counter mode (NIST SP 800-90A, without reseeding).

    Its state leaves this process only with the process's memory, and its key covers one caller's numbers.
    """
    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    return lambda count: encryptor.update(bytes(count))
