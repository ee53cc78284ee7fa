"""Pods as processes: a container of the Deployment, a small kubelet, and HAProxy in front of them.

The container's command, environment, user, volumes and read-only root are those of the Deployment
and of the image; bubblewrap and setpriv make them true for a process. What a cluster does to Pods
is done here in its times: probes decide what HAProxy is told, later by a random delay; a Pod that
is deleted gets SIGTERM after its `preStop`, whatever HAProxy knows by then, and SIGKILL after its
grace period. Not here: limits of processors and memory, and the pause before a container restarts.
"""

import asyncio
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

from tests import manifests
from tests.dockerfile import image_environment, last
from tests.helpers import free_port
from tests.manifests import ROOT

PROPAGATION = 5.0
"""Seconds in which every proxy has learnt of a change: half of the sleep of `preStop`."""
SLOTS = 12
"""Servers that HAProxy has room for: Pods that serve, start and stop."""
LONGEST_START = 180
"""Seconds: more than the startup probe allows, on a machine that does much else."""
POLL = 0.2
"""Seconds until a kubelet has noticed that a container ended; a real one takes up to a second."""


def missing():
    """Say why Pods cannot be processes here; None: they can."""
    for tool in ("haproxy", "bwrap", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if os.getuid() != 0:
        return "only root may run processes as another user"
    tried = ["bwrap", "--ro-bind", "/", "/", "--unshare-pid", "true"]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        return "bubblewrap may make no namespaces here"
    return None


class Container:
    """A Pod's only container, in folders of this machine."""

    def __init__(self, pod, checkpoints):
        (self.spec,) = pod["containers"]
        self.pod, self.checkpoints = pod, checkpoints
        self.environment = image_environment() | manifests.environment(self.spec)

    def start(self, port, log):
        """Start it as process 1 of its namespace, on a port that stands for the Pod's address."""
        environment = self.environment | {"DROPSERVE_PORT": str(port)}
        return subprocess.Popen(
            self.command(), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def command(self):
        context = self.pod["securityContext"]
        assert context["runAsNonRoot"]
        assert self.spec["securityContext"]["readOnlyRootFilesystem"]
        assert self.spec["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        user = [f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}"]
        none = ["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        entrypoint = self.spec.get("command", json.loads(last("ENTRYPOINT")))
        return [
            *("bwrap", "--die-with-parent", "--unshare-pid", "--as-pid-1", "--unshare-ipc"),
            *self._files(),
            *("--", "setpriv", *user, *none, *entrypoint, *self.spec["args"]),
        ]

    def _files(self):
        """Make a root of the system, Python and this project, read-only but for what is mounted."""
        system = [Path("/") / name for name in ("usr", "etc", "bin", "sbin", "lib", "lib64")]
        links = [path for path in system if path.is_symlink()]
        seen = [path for path in system if path.exists() and path not in links]
        seen += [Path(sys.base_prefix), ROOT]
        yield from ("--proc", "/proc", "--dev", "/dev")
        for path in links:
            yield from ("--symlink", str(path.readlink()), str(path))
        for mount in self.spec["volumeMounts"]:
            yield from self._volume(mount)
        for path in seen:
            yield from _visible(path, path)
        yield from _visible(sys.prefix, "/opt/dropserve")
        yield from ("--remount-ro", "/")

    def _volume(self, mount):
        (volume,) = [each for each in self.pod["volumes"] if each["name"] == mount["name"]]
        path = mount["mountPath"]
        if "emptyDir" in volume:
            size = int(re.fullmatch(r"(\d+)Mi", volume["emptyDir"]["sizeLimit"])[1])
            yield from ("--perms", "0777", "--size", str(size * 2**20), "--tmpfs", path)
        else:
            yield from ("--ro-bind" if mount.get("readOnly") else "--bind", self.checkpoints, path)


def _visible(path, place):
    """Show a folder of this machine at a place that every user reaches."""
    for parent in reversed(Path(place).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(parent))
    yield from ("--ro-bind", str(path), str(place))


class Proxy:
    """HAProxy with the settings of docs/operations.md, told by its socket which Pods there are."""

    def __init__(self, folder):
        self.port = free_port()
        self._socket, self._log = folder / "haproxy.sock", folder / "haproxy.log"
        page = (ROOT / "docs/operations.md").read_text()
        (settings,) = re.findall(r"```haproxy\n(.*?)```", page, re.DOTALL)
        configuration = folder / "haproxy.cfg"
        configuration.write_text(f"""
global
    stats socket {self._socket} mode 600 level admin

{settings.rstrip()}
    server-template pod 1-{SLOTS} 127.0.0.1:1 disabled

frontend clients
    bind 127.0.0.1:{self.port}
    default_backend dropserve
""")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                ["haproxy", "-db", "-f", configuration], stdout=log, stderr=log
            )

    async def command(self, text):
        reader, writer = await asyncio.open_unix_connection(self._socket)
        writer.write(text.encode() + b"\n")
        answer = (await reader.read()).decode().strip()
        writer.close()
        return answer

    async def started(self):
        while not self._socket.exists():
            assert self.process.poll() is None, self._log.read_text()
            await asyncio.sleep(0.05)

    async def set(self, slot, port):
        """Send requests to a Pod at this port, or to none (None): what is in flight goes on."""
        server = f"set server dropserve/pod{slot}"
        if port is None:
            answers = [await self.command(f"{server} state maint")]
        else:
            answers = [await self.command(f"{server} addr 127.0.0.1 port {port}")]
            answers.append(await self.command(f"{server} state ready"))
        unknown = [text for text in answers if text and "change" not in text]
        assert not unknown, unknown

    async def clients_of(self, slot):
        """Ports of the clients whose requests a Pod has: HAProxy's sessions with it."""
        text = await self.command("show sess all")
        sessions = re.split(r"^0x", text, flags=re.MULTILINE)
        here = [each for each in sessions if f"server=pod{slot} " in each]
        return {int(re.search(r"source=127\.0\.0\.1:(\d+)", each)[1]) for each in here}

    async def failures(self):
        """Count connections to Pods that were not made, answers that broke off, and retries."""
        text = (await self.command("show stat")).removeprefix("# ")
        rows = csv.DictReader(io.StringIO(text))
        (row,) = [r for r in rows if (r["pxname"], r["svname"]) == ("dropserve", "BACKEND")]
        return sum(int(row[key] or 0) for key in ("econ", "eresp", "wretr", "wredis"))


class Pod:
    """One Pod, from its creation to its end, in one of HAProxy's slots."""

    def __init__(self, cluster, slot):
        self.cluster, self.slot, self.port = cluster, slot, free_port()
        self.ready, self.gone = asyncio.Event(), asyncio.Event()
        self.log = cluster.folder / f"pod-{time.monotonic():.3f}-{slot}.log"
        self.process, self.exit_status, self.seconds_to_ready = None, None, None
        self._deleted, self._changes = False, set()
        self._life = asyncio.create_task(self._live())

    @property
    def main(self):
        """The process id of the server itself: bubblewrap's only child."""
        process = self.process.pid
        return int(Path(f"/proc/{process}/task/{process}/children").read_text())

    async def delete(self):
        """Delete it as a cluster does: from now on proxies learn of it, and its container stops."""
        self._deleted = True
        self._tell()
        sleep = self.cluster.container.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = self.cluster.container.pod["terminationGracePeriodSeconds"]
        await asyncio.sleep(sleep)
        os.kill(self.main, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace - sleep):
                await self.gone.wait()
        except TimeoutError:
            os.kill(self.main, signal.SIGKILL)
            await self.gone.wait()
        await self.told()
        await self._life

    async def told(self):
        """Wait until HAProxy knows how it is."""
        await asyncio.gather(*self._changes)

    def kill(self):
        """Kill the server at once; the kubelet will restart it."""
        os.kill(self.main, signal.SIGKILL)

    def abandon(self):
        """Kill it for good, whatever it does; with another user its server outlives bubblewrap."""
        self._life.cancel()
        with suppress(OSError, ValueError):  # it has ended
            self.kill()
        self.process.kill()
        self.process.wait()

    async def _live(self):
        while not self._deleted:
            with self.log.open("a") as log:
                self.process = self.cluster.container.start(self.port, log)
            probes = asyncio.create_task(self._probe(time.monotonic()))
            while self.process.poll() is None:  # noqa: ASYNC110
                await asyncio.sleep(POLL)
            self.exit_status = self.process.returncode
            probes.cancel()
            await asyncio.wait([probes])
            self._set_ready(False)
        self.gone.set()

    async def _probe(self, started):
        spec = self.cluster.container.spec
        if not await self._holds(spec["startupProbe"]):
            self.kill()
            return
        self.seconds_to_ready = time.monotonic() - started
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_readiness(spec["readinessProbe"]))
            group.create_task(self._watch_liveness(spec["livenessProbe"]))

    async def _holds(self, probe):
        """Ask until it succeeds; say if it did before its failures were too many."""
        for _ in range(probe["failureThreshold"]):
            if await self._ask(probe):
                return True
            await asyncio.sleep(probe["periodSeconds"])
        return False

    async def _watch_readiness(self, probe):
        failures = 0
        while True:
            failures = 0 if await self._ask(probe) else failures + 1
            if failures == 0 or failures >= probe["failureThreshold"]:
                self._set_ready(failures == 0)
            await asyncio.sleep(probe["periodSeconds"])

    async def _watch_liveness(self, probe):
        while await self._holds(probe):  # noqa: ASYNC110
            await asyncio.sleep(probe["periodSeconds"])
        self.cluster.failed_liveness += 1
        self.kill()

    async def _ask(self, probe):
        """Probe as a kubelet does: over a connection of its own, 200 to 399 is success."""
        url = f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}"
        try:
            async with httpx.AsyncClient(timeout=probe.get("timeoutSeconds", 1)) as client:
                return (await client.get(url)).status_code < 400
        except httpx.TransportError:
            return False

    def _set_ready(self, ready):
        if ready != self.ready.is_set():
            (self.ready.set if ready else self.ready.clear)()
            self._tell()

    def _tell(self):
        """Have HAProxy told how it is then, later: it learns of it after a random delay."""

        async def change():
            await asyncio.sleep(self.cluster.draw.uniform(0, PROPAGATION))
            serves = self.ready.is_set() and not self._deleted
            await self.cluster.proxy.set(self.slot, self.port if serves else None)

        task = asyncio.create_task(change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)


class Cluster:
    """The Deployment's controller: so many Pods, replaced one after another."""

    def __init__(self, container, proxy, folder, seed=0):
        self.container, self.proxy, self.folder = container, proxy, folder
        self.draw = random.Random(seed)
        self.pods, self.ended, self.failed_liveness = [], [], 0
        self._free, self._stopping = list(range(1, SLOTS + 1)), set()

    async def scale(self, count):
        """Start so many Pods and wait until they are ready, and until HAProxy knows."""
        self.pods = [self._make() for _ in range(count)]
        for pod in self.pods:
            await pod.ready.wait()
            await pod.told()

    async def replace_all(self):
        """Replace every Pod, as the Deployment's strategy says: one more, then one less."""
        for old in list(self.pods):
            new = self._make()
            self.pods.append(new)
            async with asyncio.timeout(LONGEST_START):
                await new.ready.wait()
            self.pods.remove(old)
            self.stop(old)

    def stop(self, pod):
        task = asyncio.create_task(self._delete(pod))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def end(self):
        """Delete all Pods, and wait until they and those that were replaced are gone."""
        while self.pods:
            self.stop(self.pods.pop())
        await self.settled()

    async def settled(self):
        """Wait until all that were deleted are gone."""
        await asyncio.gather(*self._stopping)

    def _make(self):
        return Pod(self, self._free.pop(0))

    async def _delete(self, pod):
        await pod.delete()
        self.ended.append(pod)
        self._free.append(pod.slot)
