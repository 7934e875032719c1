"""Validates a manifest against the published schemas of JobSet and Kubernetes in `reference/`."""

import json
import re
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
JOB_SET = json.loads((REFERENCE / "jobset.json").read_text())
KUBERNETES = json.loads((REFERENCE / "kubernetes.json").read_text())

_KINDS = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
    "number": (int, float), "null": type(None),
}  # fmt: skip
_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?"


def expanded(argument):
    """Returns what Kubernetes makes of an argument (third_party/forked/golang/expansion)."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "", argument)


def errors(manifest):
    """Yields what is wrong with a JobSet; names that the schema lacks are errors."""
    yield from _errors(manifest, JOB_SET["schema"], "$")
    metadata = manifest.get("metadata", {})
    names = [metadata.get("name", ""), metadata.get("namespace", "a")]
    yield from (f"{name!r} is no name" for name in names if not re.fullmatch(_NAME, name))
    labels = metadata.get("labels", {}).values()
    yield from (f"{label!r} is no label" for label in labels if not re.fullmatch(_LABEL, label))


def _errors(value, schema, where):
    known = {}
    if "$ref" in schema:
        known = {
            name.removeprefix(f"{schema['$ref']}."): values
            for name, values in KUBERNETES["values"].items()
        }
        schema = KUBERNETES["definitions"][schema["$ref"]]
    if "oneOf" in schema:
        if not any(not list(_errors(value, one, where)) for one in schema["oneOf"]):
            yield f"{where}={value!r} is of no kind that it may have"
        return
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = any(isinstance(value, _KINDS[kind]) for kind in kinds)
    if not fits or (isinstance(value, bool) and "boolean" not in kinds):
        yield f"{where} is no {kinds[0]}"
    elif isinstance(value, dict):
        yield from _errors_of_object(value, schema, known, where)
    elif isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield f"{where} has more than {schema['maxItems']} entries"
        for number, entry in enumerate(value):
            yield from _errors(entry, schema["items"], f"{where}[{number}]")
    elif value not in schema.get("enum", [value]):
        yield f"{where}={value!r} is none of {schema['enum']}"
    elif isinstance(value, int) and value < schema.get("minimum", value):
        yield f"{where}={value} is less than {schema['minimum']}"


def _errors_of_object(value, schema, known, where):
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is missing"
    more = schema.get("additionalProperties", True)
    for name, entry in value.items():
        inner = schema.get("properties", {}).get(name, more)
        if inner is False:
            yield f"{where}.{name} is unknown"
        elif entry not in known.get(name, [entry]):
            yield f"{where}.{name}={entry!r} is none of {known[name]}"
        elif inner is not True:
            yield from _errors(entry, inner, f"{where}.{name}")
