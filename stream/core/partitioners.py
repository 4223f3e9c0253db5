"""Which partition a producer puts a key on."""
from typing import Literal

PartitionerName = Literal['murmur2', 'crc32', 'fnv1a', 'none']
