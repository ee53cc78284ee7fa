"""What the Dockerfile says of the image: its user, its environment, its command."""

import os
import re
import shlex
import string
from pathlib import Path

ROOT = Path(__file__).parent.parent


def instructions(dockerfile):
    """Read (keyword, arguments) pairs, one list a stage."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    stages = []
    for line in filter(str.strip, text.splitlines()):
        keyword, arguments = line.split(maxsplit=1)
        if keyword == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((keyword, arguments))
    return stages


BUILDER, FINAL = instructions((ROOT / "Dockerfile").read_text())


def last(keyword):
    """Read the arguments of the final stage's last such instruction: the one that counts."""
    return [arguments for name, arguments in FINAL if name == keyword][-1]


def image_environment():
    """Read the final stage's ENV on top of a bare system's PATH."""
    environment = {"PATH": os.defpath}
    for name, arguments in FINAL:
        if name == "ENV":
            pairs = [pair.split("=", 1) for pair in shlex.split(arguments)]
            expanded = {k: string.Template(v).substitute(environment) for k, v in pairs}
            environment |= expanded
    return environment
