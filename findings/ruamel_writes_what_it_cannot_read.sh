#!/usr/bin/env bash
# ruamel.yaml 0.19.1 with ruamel.yaml.clib 0.2.15, Python 3.11 (what DVC 3.67 reads and writes params.yaml with).
# Expected (our guess): what the round-trip dumper writes, the safe loader of the same package reads back.
# Seen: the quoted string "2:4" in a flow list is written bare, [2:4]. The round-trip loader and the pure Python safe loader read it
# back as the string; YAML(typ="safe"), which is the C loader where clib is installed, raises ScannerError "found unexpected ':'".
# So `dvc exp run -S lr=0.1` makes a valid params.yaml that DVC itself cannot read. Strings with ":" inside (host:port, s3://...) and
# with "?" inside are concerned, in flow lists and flow mappings; in block style they are read. Exits 1 once that is no longer so.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3.11 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check ruamel.yaml==0.19.1 ruamel.yaml.clib==0.2.15
"$room/venv/bin/python" - <<'PY'
import io
import sys

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

same = True
for text in ('a: ["2:4"]\n', 'a: {address: "10.0.0.1:6379"}\n', 'a: ["block?.attn"]\n'):
    trip, out = YAML(), io.StringIO()
    trip.dump(trip.load(text), out)
    written = out.getvalue()
    again = YAML().load(written), YAML(typ="safe", pure=True).load(written)
    try:
        read = YAML(typ="safe").load(written)
    except YAMLError as error:
        read = f"{type(error).__name__}: {error.problem}"
    print(f"{text.strip():34} written {written.strip():30} pure {dict(again[0])} {again[1]}  C: {read}")
    same &= isinstance(read, str)
sys.exit(0 if same else 1)
PY
