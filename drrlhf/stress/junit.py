"""The gates of a stress test as a JUnit file, which CI services show case by case."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from drrlhf.files import write_text

# Characters that XML has no way to write.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """A suite for each model of what `stress_test` or `stress_generated` returned, a case for each
    gate; the file."""
    suites = ElementTree.Element("testsuites", name="drrlhf stress")
    for name, model in result["models"].items():
        gates = model["requirements"]
        missed = sum(not one["met"] for one in gates)
        about = {"name": name, "tests": str(len(gates)), "failures": str(missed), "errors": "0"}
        suite = ElementTree.SubElement(suites, "testsuite", about)
        for one in gates:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"stress.{name}", name=one["requirement"]
            )
            found = one["found"]
            text = f"found {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
            if one["met"]:
                ElementTree.SubElement(case, "system-out").text = text
            else:
                ElementTree.SubElement(case, "failure", message=text).text = text
    ElementTree.indent(suites)
    text = _NOT_XML.sub("\ufffd", ElementTree.tostring(suites, encoding="unicode"))
    written = Path(path)
    written.parent.mkdir(parents=True, exist_ok=True)
    write_text(written, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')
    return written
