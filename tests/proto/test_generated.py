"""The generated Python of the wire schema says what the .proto says."""

import ast
import importlib
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_tools import protoc

import jaxserve.proto

FOLDER = Path(jaxserve.proto.__file__).parent
SCHEMAS = sorted(path.stem for path in FOLDER.glob("*.proto"))
STALE = "{}.proto was changed; try scripts/proto"


def generated(schema: str, *, suffix: str):
    return importlib.import_module(f"jaxserve.proto.{schema}_{suffix}")


def schema_in(python: Path) -> FileDescriptorProto:
    """The schema that a generated module holds, serialised, as its one long literal of bytes."""
    literals = [
        it.value for it in ast.walk(ast.parse(python.read_text())) if isinstance(it, ast.Constant)
    ]
    return FileDescriptorProto.FromString(
        max((it for it in literals if isinstance(it, bytes)), key=len)
    )


def test_there_is_a_schema():
    assert "jaxserve_v1" in SCHEMAS


@pytest.mark.parametrize("schema", SCHEMAS)
def test_generated_messages_are_up_to_date(schema: str, tmp_path: Path):
    """Descriptors are compared: the text of the files differs between generator releases."""
    command = ["protoc", f"--proto_path={FOLDER}", f"--python_out={tmp_path}", f"{schema}.proto"]
    assert protoc.main(command) == 0
    module = f"{schema}_pb2.py"
    is_up_to_date = schema_in(FOLDER / module) == schema_in(tmp_path / module)
    assert is_up_to_date, STALE.format(schema)  # not the schemas: pytest would print both in full


@pytest.mark.parametrize("schema", SCHEMAS)
def test_generated_services_are_up_to_date(schema: str):
    stubs = generated(schema, suffix="pb2_grpc")
    for name, service in generated(schema, suffix="pb2").DESCRIPTOR.services_by_name.items():
        calls = {it for it in vars(getattr(stubs, f"{name}Servicer")) if not it.startswith("_")}
        assert calls == set(service.methods_by_name), STALE.format(schema)
