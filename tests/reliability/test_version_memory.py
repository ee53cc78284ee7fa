"""Memory of versions that come and go."""

import httpx

from tests.helpers import eventually

HIDDEN = 2_600
"""Units of a layer: 27 MB of weights, which the allocator keeps when they are freed."""


def test_a_version_that_is_dropped_gives_its_memory_back(tmp_path, save_version, make_server):
    save_version(tmp_path, hidden=(HIDDEN, HIDDEN))
    server = make_server(tmp_path, poll_seconds=0.1, keep_versions=0).start()
    before = server.resident()
    save_version(tmp_path, hidden=(32, 32))
    eventually(lambda: httpx.get(server.url + "/v1/models/digits-mlp").json()["version"] == 2)
    eventually(lambda: server.resident() < before - HIDDEN**2 * 4, 10)
