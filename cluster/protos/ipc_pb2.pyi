from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IpcOffer(_message.Message):
    __slots__ = ("host", "spans", "below")
    HOST_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    host: bytes
    spans: _containers.RepeatedCompositeFieldContainer[IpcSpan]
    below: bytes
    def __init__(self, host: _Optional[bytes] = ..., spans: _Optional[_Iterable[_Union[IpcSpan, _Mapping]]] = ..., below: _Optional[bytes] = ...) -> None: ...

class IpcSpan(_message.Message):
    __slots__ = ("address", "num_bytes", "handle")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    address: int
    num_bytes: int
    handle: bytes
    def __init__(self, address: _Optional[int] = ..., num_bytes: _Optional[int] = ..., handle: _Optional[bytes] = ...) -> None: ...
