"""Validates a manifest against the reduced schemas in `reference/`."""

import json
import re
from pathlib import Path

SCHEMAS = json.loads((Path(__file__).parent / "reference/manifests.json").read_text())


def errors(value, schema, where="$"):
    """Yields what is wrong with a value; names that a schema lacks are errors."""
    if isinstance(schema, str):
        schema = SCHEMAS[schema]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{where} is no {schema['type']}"
    elif kind is dict:
        yield from _errors_of_object(value, schema, where)
    elif kind is list:
        for number, entry in enumerate(value):
            yield from errors(entry, schema["items"], f"{where}[{number}]")
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}={value!r} is none of {schema['enum']}"
    elif not re.fullmatch(schema.get("pattern", "(?s).*"), str(value)):
        yield f"{where}={value!r} does not match {schema['pattern']}"


def _errors_of_object(value, schema, where):
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is missing"
    for name, entry in value.items():
        inner = schema.get("properties", {}).get(name, schema.get("values"))
        if inner is None:
            yield f"{where}.{name} is unknown"
        else:
            yield from errors(entry, inner, f"{where}.{name}")
