"""Every case of bad input, as `make test` has them, with the fast path and without: the figures."""

import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

from tests.reliability.figures import ROOT, published

pytestmark = pytest.mark.timeout(900)

FILES = [
    "reliability/test_bad_http.py",
    "reliability/test_connections.py",
    "service/http/test_bad_inputs.py",
    "service/http/test_body.py",
    "service/http/test_http.py",
    "service/http/test_image_memory.py",
    "service/http/test_image_values.py",
    "service/http/test_images.py",
    "service/http/test_oip_errors.py",
    "models/test_checkpoint.py",
    "models/test_storage.py",
]


def test_bad_inputs(tmp_path):
    report = tmp_path / "report.xml"
    files = [str(ROOT / "tests" / file) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"--junitxml={report}", *files]
    with published("bad-inputs", "make soak SOAK=bad_inputs") as figures:
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314  our own report
        names = [case.attrib["name"] for case in cases]
        failed = [case for case in cases if {"failure", "error", "skipped"} & {e.tag for e in case}]
        figures |= {
            "cases": len(cases),
            "of them over HTTP with the fast path": sum("fast path" in name for name in names),
            "of them over HTTP without it": sum("ASGI path" in name for name in names),
            "failed or skipped": len(failed),
        }
        assert cases
        assert [case.attrib["name"] for case in failed] == []
