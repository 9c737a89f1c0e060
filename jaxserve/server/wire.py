"""Request bytes into messages, with every damage named. Knows protobuf's encoding, no meaning.

gRPC's own parsing would not do: it answers undecodable bytes with INTERNAL, lets the last of two
oneof members win, and drops a field it does not know, or whose type is wrong, without a word. A
parameter is served or refused here, never ignored. Source: protobuf.dev, "Encoding".
"""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from jaxserve.errors import BadRequest

M = TypeVar("M", bound=Message)

# Descriptors are typed Any: those of the C runtime share no base with `google.protobuf.descriptor`.

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_KIND_NAMES: Final = {
    _VARINT: "a varint",
    _FIXED64: "8 bytes",
    _LENGTH: "bytes with a length",
    _FIXED32: "4 bytes",
}
_F = FieldDescriptor
_KINDS: Final = (
    dict.fromkeys((_F.TYPE_STRING, _F.TYPE_BYTES, _F.TYPE_MESSAGE), _LENGTH)
    | dict.fromkeys((_F.TYPE_DOUBLE, _F.TYPE_FIXED64, _F.TYPE_SFIXED64), _FIXED64)
    | dict.fromkeys((_F.TYPE_FLOAT, _F.TYPE_FIXED32, _F.TYPE_SFIXED32), _FIXED32)
)


class _Damaged(Exception):
    """The bytes are no protobuf message."""


def parse(kind: type[M], data: bytes, *, max_bytes: int) -> M:
    """The message of type `kind` in `data`.

    Raises BadRequest for a message that is too long or damaged, for unknown fields, wrong types,
    strings that are not UTF-8, and two members of one oneof (such as both `text` and `token_ids`).
    """
    if len(data) > max_bytes:
        raise BadRequest("message", f"{len(data)} bytes", f"at most {max_bytes} bytes")
    try:
        _check(kind.DESCRIPTOR, data, "")
        return kind.FromString(data)
    except (_Damaged, DecodeError):
        allowed = f"a serialised {kind.DESCRIPTOR.full_name}"
        raise BadRequest("message", f"{len(data)} damaged bytes", allowed) from None


def _check(descriptor: Any, data: bytes, path: str) -> None:
    members: dict[str, str] = {}  # oneof -> the member seen
    for number, kind, payload in _fields(data):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            known = ", ".join(field.name for field in descriptor.fields)
            raise BadRequest(f"{path}field {number}", _KIND_NAMES[kind], f"the fields {known}")
        name = path + field.name
        _check_kind(field, name, kind)
        if field.containing_oneof is not None:
            seen = members.setdefault(field.containing_oneof.name, field.name)
            if seen != field.name:
                choices = " or ".join(member.name for member in field.containing_oneof.fields)
                got = f"both {seen} and {field.name}"
                raise BadRequest(path + field.containing_oneof.name, got, f"one of {choices}")
        if field.type == _F.TYPE_STRING:
            _check_utf8(name, payload)
        elif field.type == _F.TYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            _check(field.message_type, payload, name + ".")


def _check_kind(field: Any, name: str, kind: int) -> None:
    wanted = _KINDS.get(field.type, _VARINT)
    # default_value tells repeated fields in every protobuf release; `is_repeated` is recent.
    packed = kind == _LENGTH and isinstance(field.default_value, list)
    if kind != wanted and not packed:
        raise BadRequest(name, _KIND_NAMES[kind], f"{_KIND_NAMES[wanted]} on the wire")


def _check_utf8(name: str, payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError as error:
        shown = payload[max(0, error.start - 8) : error.end + 8]
        raise BadRequest(name, shown, f"UTF-8 (byte {error.start}: {error.reason})") from None


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and, for lengths, payload of each field of one message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        payload = b""
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind == _LENGTH:
            length, place = _varint(data, place)
            payload = data[place : place + length]
            place += length
        elif kind == _FIXED64:
            place += 8
        elif kind == _FIXED32:
            place += 4
        else:
            raise _Damaged
        if place > len(data) or number == 0:
            raise _Damaged
        yield number, kind, payload


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place` and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _Damaged
