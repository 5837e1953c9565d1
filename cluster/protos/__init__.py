"""The wire format of the words plane: worker.proto and the code generated from it.

`worker_pb2` holds the messages. The generated stub is not needed: `cluster.rpc` moves raw bytes and parses
them itself, so that garbage from a peer ends a session with a clear error.
"""

from typing import Final

SERVICE: Final = "sluice.v1.Worker"
SESSION_PATH: Final = f"/{SERVICE}/Session"
BULK_PATH: Final = f"/{SERVICE}/Bulk"

# Versions of the protocol that this code speaks. A change that an older peer would misread raises the first;
# a new frame kind or field does not, because unknown ones are answered Unsupported or ignored.
PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
