"""Our OpenAPI document in schemathesis's hands, which knows nothing of us but what the document says.

Negative data break the document as it is, and must be refused. Positive data follow a narrowed copy (this model, its
token ids, short answers), so that most of them reach the workers; what they answer must be as documented.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.fuzz.bodies import Json
from tests.support.public_door import MODEL

_PIN: Final = "schemathesis==4.32.5"
_TIMEOUT_S: Final = 90
_SHORT: Final = {"type": "integer", "minimum": 1, "maximum": 6}
_TOKEN_FIELDS: Final = ("prompt", "input", "tokens", "stop_token_ids", "bad_words")

# Whose values must agree with others': a document cannot say how. Kinds of cases of our own ask for them.
_AGREEING: Final = (
    "best_of",
    "num_beams",
    "num_return_sequences",
    "length_penalty",
    "early_stopping",
    "max_completion_tokens",
    "min_tokens",
    "stream_options",
    "top_logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "timeout_s",
    "dimensions",
)


def ensure(root: Path) -> Path:
    """schemathesis, installed unless it is: it brings a plugin for pytest that our tests shall not load.

    Raises RuntimeError with the remedy.
    """
    directory = root / ".cache" / "venv-schemathesis"
    stamp = directory / "sluice-pins"
    if not stamp.is_file() or stamp.read_text() != _PIN:
        stamp.unlink(missing_ok=True)
        venv.create(directory, symlinks=True, with_pip=True)
        command = [str(directory / "bin" / "python"), "-m", "pip", "install", "-q", _PIN]
        if subprocess.run([*command, "-c", str(root / "constraints.txt")], stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(f"{_PIN} could not be installed into {directory}; mend that, or say --no-schemathesis")
        stamp.write_text(_PIN)
    return directory / "bin" / "st"


@dataclass(frozen=True)
class SchemaRun:
    mode: str
    num_cases: int
    statuses: dict[str, int]
    accepted: dict[str, int]
    """Cases answered with 2xx, by operation."""
    failures: list[str]


@dataclass(frozen=True)
class Document:
    url: str
    schemathesis: Path
    vocab_size: int

    def run(self, mode: str, num_examples: int, seed: int) -> SchemaRun:
        """`num_examples` for each operation, beside those that the document's own edges make."""
        tree = httpx.get(f"{self.url}/openapi.json", timeout=10, trust_env=False).json()
        with tempfile.TemporaryDirectory() as folder:
            location, summary, har = (Path(folder) / name for name in ("openapi.json", "run.json", "run.har"))
            location.write_text(json.dumps(self.narrowed(tree) if mode == "positive" else tree))
            # What is written but cannot be said there, and what Python reads more strictly than JSON Schema (1.0 is
            # no integer), makes positive data a 400 now and then.
            done = subprocess.run(
                [
                    str(self.schemathesis), "run", str(location), "--url", self.url, "--mode", mode,
                    "--phases", "coverage,fuzzing", "--max-examples", str(num_examples), "--seed", str(seed),
                    "--workers", "4", "--request-timeout", str(_TIMEOUT_S), "--continue-on-failure",
                    "--exclude-checks", "positive_data_acceptance", "--report", "json,har",
                    "--report-json-path", str(summary), "--report-har-path", str(har), "--warnings", "off",
                ],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if not summary.exists():
                raise RuntimeError(f"schemathesis ended with {done.returncode}: {done.stderr[-2000:]}{done.stdout}")
            told = json.loads(summary.read_text())
            entries = json.loads(har.read_text())["log"]["entries"]
        failures = [str(each) for each in (*told["failures"], *told["errors"])]
        if done.returncode and not failures:
            failures.append(f"ended with {done.returncode}")
        if failures:
            failures.append(done.stdout)
        accepted = {
            operation: sum(phase["accepted"] for phase in phases.values())
            for operation, phases in told["valid_rates"].items()
        }
        if mode == "positive":
            failures += [f"no case of {operation} was accepted" for operation, number in accepted.items() if not number]
        statuses = Counter(str(entry["response"]["status"]) for entry in entries)
        return SchemaRun(mode, told["test_cases"]["generated"], dict(sorted(statuses.items())), accepted, failures)

    def narrowed(self, tree: Json) -> Json:
        """What this model takes, of what the API takes."""
        tree = json.loads(json.dumps(tree))
        for schema in tree["components"]["schemas"].values():
            fields = schema.get("properties", {})
            if schema.get("additionalProperties") is not False or "model" not in fields:
                continue
            fields["model"] = {"const": MODEL}
            if "messages" in fields and "prompt" not in fields:
                schema["required"] = ["model", "messages", "max_tokens"]
            for name in _AGREEING:
                if name != "messages" or "prompt" in fields:
                    fields.pop(name, None)
            if "max_tokens" in fields:
                fields["max_tokens"] = _SHORT
            if "n" in fields:
                fields["n"] = {"type": "integer", "minimum": 1, "maximum": 3}
            for name in _TOKEN_FIELDS:
                self._bound(fields.get(name))
        message = tree["components"]["schemas"]["ChatMessage"]
        message["properties"] = {
            "role": {"enum": ["system", "user", "assistant", "developer"]},
            "content": {"type": "string"},
        }
        message["required"] = ["role", "content"]
        for parameter in tree["paths"]["/v1/models/{name}"]["get"]["parameters"]:
            parameter["schema"] = {"enum": [MODEL, "another"]}
        return tree

    def _bound(self, schema: Any) -> None:
        """Integers below are token ids, texts and lists are short and not empty."""
        if isinstance(schema, list):
            for each in schema:
                self._bound(each)
        elif isinstance(schema, dict):
            kind = schema.get("type")
            if kind == "integer":
                schema["maximum"] = self.vocab_size - 1
                schema.pop("exclusiveMaximum", None)
            elif kind == "string":
                schema |= {"minLength": 1, "maxLength": 40}
            elif kind == "array":
                schema |= {"minItems": 1, "maxItems": 8}
            for each in ("anyOf", "items"):
                self._bound(schema.get(each))
