"""Training across two hosts: network namespaces of this machine, joined by one cable (a veth pair)."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import VLORA_FLAGS, make_vlora
from tests.two_stacks import REPO, Finished, environment

pytestmark = pytest.mark.slow

STEPS = 3
FLAGS = {
    "bf16": False,
    "tf32": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "model_max_length": 256,
    "learning_rate": 1e-3,
    "save_steps": 10**6,
    "mm_vision_dtype": "float32",
    **VLORA_FLAGS,
}


@dataclass
class Network:
    """Two hosts ``10.77.0.1`` and ``10.77.0.2``."""

    names: tuple[str, str]
    interfaces: tuple[str, str]

    def inside(self, host: int) -> list[str]:
        """What to write before a command so that it runs on this host."""
        return ["ip", "netns", "exec", self.names[host]]

    def transferred(self, host: int) -> dict[str, int]:
        """Bytes that this host has received and sent."""
        folder = f"/sys/class/net/{self.interfaces[host]}/statistics"
        files = [f"{folder}/{way}_bytes" for way in ("rx", "tx")]
        read = subprocess.run([*self.inside(host), "cat", *files], capture_output=True, text=True)
        return dict(zip(("received", "sent"), map(int, read.stdout.split()), strict=True))

    def kill(self, host: int, by: signal.Signals = signal.SIGKILL) -> None:
        """End every process of this host at once, as a power cut would."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], stdout=subprocess.PIPE)
        for pid in found.stdout.split():
            os.kill(int(pid), by)

    def remove(self) -> None:
        for host, name in enumerate(self.names):
            self.kill(host)
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def network() -> Iterator[Network]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("two hosts need Linux and its program ip")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    tag = secrets.token_hex(3)  # an interface's name has 15 characters at most
    made = Network((f"vlora-{tag}-0", f"vlora-{tag}-1"), (f"vl{tag}-0", f"vl{tag}-1"))
    try:
        try:
            for name in made.names:
                ip("netns", "add", name)
            ends = [["netns", name] for name in made.names]
            first, second = made.interfaces
            ip("link", "add", first, *ends[0], "type", "veth", "peer", "name", second, *ends[1])
            for host, name in enumerate(made.names):
                interface = made.interfaces[host]
                ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", interface)
                for device in ("lo", interface):
                    ip("-n", name, "link", "set", device, "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def recipe(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Environment of scripts/finetune.sh: a tiny run in which two processes take one sample each."""
    start = tmp_path_factory.mktemp("one") / "mm_projector.bin"
    generator = make_vlora(llm_dir, tower_dir).generator.state_dict()
    torch.save({f"model.mm_projector.{k}": v for k, v in generator.items()}, start)
    return environment(
        TRAINER="llava.train.train",
        LAUNCHER="torchrun",
        LLM=str(llm_dir),
        VISION_TOWER=str(tower_dir),
        DATA=str(data_dir / "finetune.json"),
        IMAGES=str(data_dir / "images"),
        PRETRAINED=str(start),
        PER_DEVICE="1",
        GLOBAL_BATCH="2",
        HF_HUB_OFFLINE="1",
    )


class Host:
    """A host's part of a run; it prints to files."""

    def __init__(self, command: list[str], settings: dict[str, str], log: Path) -> None:
        self.log = log
        settings = {**settings, "PYTHONFAULTHANDLER": "1"}  # SIGABRT prints where it was
        with open(f"{log}.out", "w") as output, open(f"{log}.err", "w") as errors:
            self.process = subprocess.Popen(
                command, env=settings, stdout=output, stderr=errors, start_new_session=True
            )

    def read(self) -> Finished:
        texts = (Path(f"{self.log}.{end}").read_text() for end in ("out", "err"))
        return Finished(self.process.poll() or 0, *texts)

    def wait(self, seconds: float = 240) -> Finished:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s:\n{self.read().errors[-3000:]}")
        return self.read()


def both(network: Network, hosts: list[Host], seconds: float = 240) -> list[Finished]:
    """Wait for both hosts; if they hang, say where."""
    patience = time.monotonic() + seconds
    while any(host.process.poll() is None for host in hosts):
        if time.monotonic() > patience:
            for host in range(2):
                network.kill(host, signal.SIGABRT)
            time.sleep(5)
            logs = (f"host {i}: {h.read().output}{h.read().errors}" for i, h in enumerate(hosts))
            pytest.fail(f"still running after {seconds} s:\n" + "\n".join(logs))
        time.sleep(0.2)
    return [host.read() for host in hosts]


def finetune(out: Path, **more: object) -> list[str]:
    """The recipe of stage 2."""
    flags = {"deepspeed": "", "max_steps": STEPS, "output_dir": out, **FLAGS, **more}
    recipe = str(REPO / "scripts" / "finetune.sh")
    return ["bash", recipe, *(f"--{name}={value}" for name, value in flags.items())]


def start(network: Network, recipe: dict[str, str], out: Path, **more: object) -> list[Host]:
    """The recipe on both hosts, as a user types it on two machines."""
    shared = {"GPUS": "1", "NODES": "2", "MASTER_ADDR": "10.77.0.1", **recipe}
    hosts = []
    for host, interface in enumerate(network.interfaces):
        own = {"NODE_RANK": str(host), "GLOO_SOCKET_IFNAME": interface}
        command = [*network.inside(host), *finetune(out, **more)]
        hosts.append(Host(command, {**shared, **own}, out.parent / f"log-{host}"))
    return hosts


@pytest.fixture(scope="module")
def one_host(
    recipe: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], Path]:
    """Losses and folder of the same two processes on one host."""
    out = tmp_path_factory.mktemp("one-host") / "out"
    done = Host(finetune(out), {**recipe, "GPUS": "2"}, out.parent / "log").wait()
    assert done.code == 0, done.errors[-3000:]
    assert len(done.losses()) == STEPS
    return done.losses(), out


@pytest.mark.parametrize("zero", ["", "zero2"])
def test_two_hosts_train_as_one_does(
    zero: str,
    network: Network,
    recipe: dict[str, str],
    one_host: tuple[list[float], Path],
    tmp_path: Path,
) -> None:
    if zero:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        zero = str(REPO / "scripts" / f"{zero}.json")
    before = [network.transferred(host) for host in range(2)]
    hosts = start(network, recipe, tmp_path / "out", deepspeed=zero)
    for done in both(network, hosts):
        assert done.code == 0, done.errors[-3000:]
        assert done.losses() == pytest.approx(one_host[0], abs=2e-4 if zero else 0)
    expected, found = (load_file(f / "model.safetensors") for f in (one_host[1], tmp_path / "out"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3 if zero else 0, msg=name)
    # Each step, gradients in float32 of everything but the frozen tower pass each way at least once.
    learned = sum(t.numel() for name, t in expected.items() if "vision_tower" not in name)
    for host, old in enumerate(before):
        now = network.transferred(host)
        for way, count in now.items():
            assert count - old[way] > STEPS * 4 * learned, (host, way)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_ends_the_other(
    lost: int, network: Network, recipe: dict[str, str], tmp_path: Path
) -> None:
    hosts = start(network, recipe, tmp_path / "out", max_steps=100000)
    left = hosts[1 - lost]
    patience = time.monotonic() + 150
    while len(left.read().losses()) < 2:
        assert time.monotonic() < patience, left.read().errors[-3000:]
        assert left.process.poll() is None, left.read().errors[-3000:]
        time.sleep(0.5)
    network.kill(lost)
    done = left.wait(90)
    assert done.code not in (0, None)
    assert "llava_vlora.run FAILED" in done.errors
    assert not (tmp_path / "out" / "config.json").exists()  # nothing that looks like a result


def test_torchrun_finds_the_hosts_itself(
    network: Network,
    recipe: dict[str, str],
    one_host: tuple[list[float], Path],
    tmp_path: Path,
) -> None:
    """torchrun's c10d rendezvous, in which no host has a number."""
    out = tmp_path / "out"
    settings = {**recipe, "GPUS": "1", "NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "unused"}
    dry = subprocess.check_output(finetune(out), env={**settings, "DRY_RUN": "1"}, text=True)
    words = shlex.split(dry)
    program = words[words.index("-m") :]
    meet = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id 7 --rdzv_endpoint 10.77.0.1:29400"
    hosts = []
    for host, interface in enumerate(network.interfaces):
        # Both hosts have this machine's name, by which torchrun would otherwise tell them apart.
        known = ["--local_addr", f"10.77.0.{host + 1}", "--rdzv_conf", f"is_host={1 - host}"]
        launch = ["torchrun", *meet.split(), *known, *program]
        own = {**recipe, "GLOO_SOCKET_IFNAME": interface}
        hosts.append(Host([*network.inside(host), *launch], own, tmp_path / f"log-{host}"))
    for done in both(network, hosts):
        assert done.code == 0, done.errors[-3000:]
        assert done.losses() == one_host[0]
