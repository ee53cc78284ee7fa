"""What tests of faults look at: the connections of a process, and how many workers serve."""

import re
from pathlib import Path

import httpx


def clients_of(process):
    """Ports of the clients whose connections a process has accepted."""
    links = [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
    ours = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].partition(":")[2], 16) for row in rows if row[9] in ours}


def serving_workers(server):
    """How many workers serve digits-mlp."""
    metrics = httpx.get(server.url + "/metrics").text
    return float(re.search(r'model_loaded{model="digits-mlp",version="2"} (\S+)', metrics)[1])
