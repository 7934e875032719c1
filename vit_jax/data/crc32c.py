"""CRC-32C (Castagnoli), the checksum of TFRecord files, computed with NumPy.

A checksum is a linear function of a message's bits: each of its 32 bits is the parity of some of
them. The checksums of all blocks of a message are computed at once, then joined in pairs.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Its bits in reverse order, as in RFC 3720, appendix B.4.
_BLOCK = 256  # In bytes.
_ALL = 0xFFFFFFFF
_DELTA = 0xA282EAD8


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum that a TFRecord file stores beside `data`: its CRC-32C, changed.

    https://www.tensorflow.org/tutorials/load_data/tfrecord describes the format.
    """
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _DELTA) & _ALL


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C of some bytes."""
    if len(data) < 4:
        crc = _ALL
        for byte in data:
            crc = int(_of_bytes()[(crc ^ byte) & 255]) ^ crc >> 8
        return crc ^ _ALL
    padding = -len(data) % _BLOCK  # Zeros in front of a message do not change the result.
    padded = np.zeros(padding + len(data), np.uint8)
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= 255  # The definition inverts the first 32 bits.
    crcs, size = _of_blocks(padded), _BLOCK
    while len(crcs) > 1:
        if len(crcs) % 2:
            crcs = np.append(np.uint32(0), crcs)
        crcs = _with_zeros(crcs[0::2], size) ^ crcs[1::2]
        size *= 2
    return int(crcs[0]) ^ _ALL


def _of_blocks(data: np.ndarray) -> np.ndarray:
    """Returns the checksum of each block, uint32, without the inversions of the definition."""
    words = np.ascontiguousarray(data.view(np.uint64).reshape(-1, _BLOCK // 8).T)
    masks = _masks()
    found = np.zeros((32, words.shape[1]), np.uint64)
    for number, column in enumerate(words):
        found ^= column & masks[:, number, None]
    parities = np.bitwise_count(found) & np.uint8(1)
    packed = np.packbits(parities, axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<u4")[:, 0]


@functools.cache
def _of_bytes() -> np.ndarray:
    """Returns the checksum of each byte, uint32 `[256]`."""
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = np.where(found & 1, found >> 1 ^ np.uint32(_POLYNOMIAL), found >> 1)
    return found


@functools.cache
def _masks() -> np.ndarray:
    """Returns the bits of a block that each bit of its checksum sums: uint64 `[32, words]`."""
    crcs = [_of_bytes()[1 << np.arange(8)]]  # Of the bits of the last byte.
    for _ in range(_BLOCK - 1):
        crcs.append(_of_bytes()[crcs[-1] & 255] ^ crcs[-1] >> 8)
    bits = np.stack(crcs[::-1])[..., None] >> np.arange(32, dtype=np.uint32) & 1
    packed = np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")[:, 0]
    return np.ascontiguousarray(packed.T).view(np.uint64)


def _with_zeros(crcs: np.ndarray, size: int) -> np.ndarray:
    """Returns the checksums of messages that are continued with `size` zero bytes."""
    table = _zeros_table(size)
    return (
        table[0, crcs & 255]
        ^ table[1, crcs >> 8 & 255]
        ^ table[2, crcs >> 16 & 255]
        ^ table[3, crcs >> 24]
    )


@functools.cache
def _zeros_table(size: int) -> np.ndarray:
    """Returns `_with_zeros` of each byte of a checksum, uint32 `[4, 256]`; size is a power of 2."""
    values = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    if size == 1:
        return _of_bytes()[values & 255] ^ values >> 8
    return _with_zeros(_with_zeros(values, size // 2), size // 2)
