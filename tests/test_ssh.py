"""ssh targets against a real sshd on loopback: the board is this machine, with this Python."""

import ast
import importlib.metadata
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from opbuild import Operand, build

from mobileqat import flatbuffer
from mobileqat.bench import board, ssh
from mobileqat.bench.host import Host
from mobileqat.bench.measure import measure
from mobileqat.bench.record import Job, Settings
from mobileqat.bench.targets import parse_target
from mobileqat.errors import DeviceError

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh") and shutil.which("ssh-keygen")),
    reason="a board on loopback needs the packages openssh-server and openssh-client",
)

CONFIG = """\
Host board
  HostName 127.0.0.1
  Port {port}
Host strange
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/other
  IdentitiesOnly yes
Host unverified
  HostName 127.0.0.1
  Port {port}
  UserKnownHostsFile /dev/null
Host changed
  HostName 127.0.0.1
  Port {port}
  UserKnownHostsFile {folder}/changed
Host closed
  HostName 127.0.0.1
  Port {closed}
Host * !strange
  IdentityFile {folder}/user
  IdentitiesOnly yes
Host *
  StrictHostKeyChecking yes
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """The folder of a running sshd, whose `bin/ssh` is a client that knows it, and its process id."""
    folder = Path(tempfile.mkdtemp(prefix="mobileqat-sshd-"))
    port, closed = free_port(), free_port()
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    for name, key in (("known", "host"), ("changed", "other")):
        (folder / name).write_text(f"[127.0.0.1]:{port} {(folder / f'{key}.pub').read_text()}")
    (folder / "config").write_text(CONFIG.format(port=port, closed=closed, folder=folder))
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    wrapper = folder / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    wrapper.chmod(0o755)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # where sshd separates its privileges
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        login = subprocess.run([wrapper, "board", "true"], capture_output=True, text=True)
        if login.returncode:
            pytest.skip(f"sshd accepts no login of this user: {login.stderr.strip()}")
        yield folder, process.pid
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def wait_for(port, process):
    for _ in range(100):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        if process.poll() is not None:
            pytest.skip("sshd does not start here")
        time.sleep(0.1)
    pytest.skip("sshd does not answer here")


@pytest.fixture
def address(server, monkeypatch, tmp_path):
    """Makes names of targets; temporary folders of the board are in `tmp_path`, which must be empty in the end."""
    monkeypatch.setenv("PATH", f"{server[0] / 'bin'}:{os.environ['PATH']}")
    python = tmp_path / "python"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    python.write_text(f'#!/bin/sh\nexport TMPDIR={scratch}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    yield lambda host="board", python=python: f"ssh://{host}?python={python}"
    assert list(scratch.iterdir()) == []


@pytest.fixture(scope="module")
def jobs():
    """Two files of one operator, with three invocations each."""
    rng = np.random.default_rng(0)
    values = rng.integers(-128, 128, (1, 64), np.int8)
    grids = [(0.5, 3), (0.25, -7)]
    contents = [
        build("ADD", 2, ("AddOptions", {}), [Operand(values, g), Operand(values, g)], (1, 64), (1.0, 0)) for g in grids
    ]
    inputs = tuple(rng.integers(-128, 128, (3, 1, 64), np.int8) for _ in range(2))
    return [Job(f"file {i}", flatbuffer.read(content), inputs) for i, content in enumerate(contents)]


# --- what it does


@needs_sshd
def test_run(address, jobs):
    outcome = parse_target(address()).run(jobs, Settings(warmup=1, runs=4))
    assert (outcome.unit, outcome.runtime) == ("ms", "litert")
    assert outcome.runtime_version == importlib.metadata.version("ai-edge-litert")
    expected = Host().run(jobs, Settings(runs=0)).measurements
    for measured, host in zip(outcome.measurements, expected, strict=True):
        assert len(measured.costs) == 4 and min(measured.costs) > 0 and measured.init_ms > 0
        for received, wanted in zip(measured.outputs, host.outputs, strict=True):
            np.testing.assert_array_equal(received, wanted, strict=True)
    assert outcome.device["cores"] == os.cpu_count() and outcome.device["abi"] == os.uname().machine
    assert outcome.device["system"].endswith(os.uname().release)


@needs_sshd
def test_measure(address, jobs):
    """Operators one by one, and outputs compared with this machine's."""
    settings = Settings(warmup=0, runs=3, profile=True)
    files = {job.name: job.model.content for job in jobs}
    comparison = measure(files, parse_target(address()), settings, samples=2)
    for record in comparison.records.values():
        assert record.agreement.identical == 1 and record.agreement.samples == 2 and record.runs == 3
        assert [(entry.name, entry.kind) for entry in record.profile] == [("y", "ADD")]
    json.dumps(comparison.to_dict())


@needs_sshd
def test_cores_are_the_boards(address, jobs):
    core = min(os.sched_getaffinity(0))
    outcome = parse_target(address()).run(jobs[:1], Settings(warmup=0, runs=1, cpus=str(core)))
    assert outcome.measurements[0].peak_memory_bytes > 0
    with pytest.raises(DeviceError, match="OSError"):
        parse_target(address()).run(jobs[:1], Settings(cpus="100000"))


@needs_sshd
def test_check(address):
    checks = parse_target(address()).check()
    assert all(check.found and not check.fix for check in checks)
    assert f"Python {sys.version.split()[0]}" in checks[0].found and "ai-edge-litert" in checks[2].found


@needs_sshd
def test_chatter_of_the_login_shell_does_not_matter(address, jobs, tmp_path):
    chatty = tmp_path / "chatty"
    chatty.write_text(f'#!/bin/sh\necho welcome; echo "{board.MARK.decode().strip()} 5"\nexec {tmp_path}/python "$@"\n')
    chatty.chmod(0o755)
    assert parse_target(address(python=chatty)).run(jobs[:1], Settings(runs=1)).measurements[0].costs


# --- what can go wrong


@needs_sshd
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("closed", "refuses the connection"),
        ("strange", "does not accept the key.*Permission denied"),
        ("unverified", "host key is not known"),
        ("changed", "host key is not"),
        ("no-such-host.invalid", "the host is unknown"),
    ],
)
def test_no_connection(address, jobs, host, message):
    target = parse_target(address(host))
    with pytest.raises(DeviceError, match=message):
        target.run(jobs, Settings())
    (check,) = target.check()
    assert check.found is None and check.fix.startswith(f"ssh {host} ")


@needs_sshd
def test_no_python(address, jobs):
    with pytest.raises(DeviceError, match=r"no '/no/such/python'.*python="):
        parse_target(address(python="/no/such/python")).run(jobs, Settings())


@needs_sshd
def test_no_runtime(address, jobs, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexport TMPDIR={tmp_path}/scratch\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    target = parse_target(address(python=bare))
    # The worker's own interpreter is started without -S, so take the runtime from it by name.
    with pytest.raises(DeviceError, match=r"No module named 'tflite_runtime'.*pip install numpy ai-edge-litert"):
        target.run(jobs, Settings(runtime="tflite-runtime"))
    numpy_check, runtime_check = target.check()[1:]
    assert numpy_check.found is None and runtime_check.found is None
    assert runtime_check.fix == f"ssh board {bare} -m pip install numpy ai-edge-litert"


@needs_sshd
def test_a_worker_that_takes_too_long(address, jobs):
    with pytest.raises(DeviceError, match="was stopped after 3 s"):
        parse_target(address()).run(jobs, Settings(runs=2_000_000_000, timeout_s=3.0))


@needs_sshd
def test_a_board_that_hangs_before_it_answers(address, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "_PATIENCE_S", 0.5)
    sleepy = tmp_path / "sleepy"
    sleepy.write_text("#!/bin/sh\nexec sleep 30\n")
    sleepy.chmod(0o755)
    with pytest.raises(DeviceError, match="was closed after 1 s"):
        parse_target(address(python=sleepy)).run(jobs, Settings(timeout_s=0.5))


@needs_sshd
def test_a_crash_is_named(address, jobs, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os; os.abort()")
    monkeypatch.setattr(ssh, "WORKER", worker)
    with pytest.raises(DeviceError, match=r"the worker on ssh://board.* was killed by SIGABRT"):
        parse_target(address()).run(jobs, Settings())


CLIENT = """
import sys
import numpy as np
from mobileqat import flatbuffer
from mobileqat.bench.measure import measure
from mobileqat.bench.record import Job, Settings
from mobileqat.bench.ssh import Ssh
model = flatbuffer.read(sys.argv[2])
job = Job("a", model, (np.zeros((1, 1, 64), np.int8),) * 2)
Ssh(sys.argv[1]).run([job], Settings(runs=2_000_000_000))
"""


@needs_sshd
def test_nothing_stays_on_the_board_after_an_interruption(address, jobs, tmp_path):
    path = tmp_path / "file.tflite"
    path.write_bytes(jobs[0].model.content)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, address(), str(path)], stderr=subprocess.PIPE, text=True)
    scratch = tmp_path / "scratch"
    assert until(lambda: list(scratch.iterdir()))
    client.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in client.communicate()[1]
    assert until(lambda: not list(scratch.iterdir()))


@needs_sshd
def test_a_connection_that_is_lost(server, address, jobs, tmp_path):
    target = parse_target(address())
    with ThreadPoolExecutor() as pool:
        running = pool.submit(target.run, jobs, Settings(runs=2_000_000_000))
        assert until(lambda: list((tmp_path / "scratch").iterdir()))
        for session in Path(f"/proc/{server[1]}/task/{server[1]}/children").read_text().split():
            os.kill(int(session), signal.SIGKILL)
        with pytest.raises(DeviceError, match="the connection was lost"):
            running.result()
    assert until(lambda: not list((tmp_path / "scratch").iterdir()))


def until(condition):
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


# --- without a board


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ssh://",
            "ssh://-oProxyCommand=x",
            "ssh://host:port",
            "ssh://a@",
            "ssh://host/folder",
            "ssh://host?shell=sh",
        ),
        *("ssh://$(touch executed)", "ssh://a;b", "ssh://a b", "ssh://`a`", "ssh://a'b", "ssh://a\nb", "ssh://a\n"),
        *("ssh://-l@host", "ssh://$(touch executed)@host", "ssh://a b@host", "ssh://a\0b", "ssh://host:9999999"),
        *("ssh://[-oProxyCommand=x]", "ssh://[a b]", "ssh://host?python=a\nb"),
    ],
)
def test_addresses(name):
    with pytest.raises(DeviceError, match=r"Expected ssh://|no target"):
        parse_target(name)


def test_the_parts_of_an_address():
    target = ssh.Ssh("ssh://me@[fe80::1]:2222?python=/opt/python 3/bin/python3")
    assert (target._host, target._login) == ("fe80::1", ["-l", "me", "-p", "2222"])
    assert target._python == "/opt/python 3/bin/python3"


HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "a;touch executed",
    "$(touch executed)",
    "`touch executed`",
    "'; touch executed; '",
    "-c",
]


@pytest.mark.parametrize("python", [*HOSTILE, "a & touch executed", "a | touch executed", "a > executed", "*", "~/x"])
def test_the_name_of_a_python_reaches_the_shell_quoted(monkeypatch, tmp_path, jobs, python):
    """As on a board: what ssh is given after the host is a command line for `sh`."""
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nfor last in "$@"; do :; done\nexec /bin/sh -c "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.chdir(tmp_path)
    target = ssh.Ssh(f"ssh://board?python={python}")
    with pytest.raises(DeviceError, match=r"there is no '|ended with exit code"):
        target.run(jobs, Settings())
    for check in target.check():  # what a user may copy into a shell
        subprocess.run(["/bin/sh", "-c", check.fix], capture_output=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ssh"]


def test_a_zero_byte_reaches_nobody(jobs):
    with pytest.raises(DeviceError, match="ssh cannot be started"):
        ssh.Ssh("ssh://board?python=a\0b").run(jobs, Settings())


def test_without_ssh(monkeypatch, tmp_path, jobs):
    monkeypatch.setenv("PATH", str(tmp_path))
    target = ssh.Ssh("ssh://board")
    with pytest.raises(DeviceError, match=r"ssh cannot be started.*apt install openssh-client"):
        target.run(jobs, Settings())
    (check,) = target.check()
    assert check.found is None and check.fix == "apt install openssh-client"


@pytest.fixture
def answers(monkeypatch, tmp_path, jobs):
    """Lets a program that is not ssh answer, and returns what `run` makes of it."""

    def run(stdout, code=0, stderr=""):
        (tmp_path / "answer").write_bytes(stdout)
        program = tmp_path / "ssh"
        program.write_text(
            f"#!/bin/sh\n/bin/cat > /dev/null\n/bin/cat {tmp_path}/answer\necho '{stderr}' >&2\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return ssh.Ssh("ssh://board").run(jobs[:1], Settings())

    return run


REPORT = (
    b'{"returncode": 0, "stderr": "", "packages": {}, "device": {"governor": "powersave"},'
    b' "before": {"temperature_c": 40.5, "throttling": {"x": "0"}},'
    b' "after": {"temperature_c": 70.0, "throttling": {"x": "1"}}}'
)
RESULT = b'{"version": null, "models": [{"init_ms": 1.0, "peak_memory_bytes": 5, "latencies_ms": [2.0]}]}'


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=values.dtype == object)
    return stream.getvalue()


def archive(files, **changes):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in changes.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    content = stream.getvalue()
    return board.MARK + b"%d\n" % len(content) + content


GOOD = {"board.json": REPORT, "result.json": RESULT, "0.out0.npy": npy(np.ones((3, 1, 64), np.int8))}


def test_warnings_of_the_board(answers):
    outcome = answers(archive(GOOD))
    assert outcome.device == {"governor": "powersave", "temperature_c": (40.5, 70.0)}
    assert "governor is 'powersave'" in outcome.warnings[0] and "throttled" in outcome.warnings[1]
    assert outcome.measurements[0].costs == (2.0,)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (archive({**GOOD, "../evil": b"x"}), "holds '../evil'"),
        (archive({**GOOD, "/etc/evil": b"x"}), "holds '/etc/evil'"),
        (archive({**GOOD, "worker.py": b"x"}), "holds 'worker.py'"),
        (archive(GOOD, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "holds 'board.json'"),
        (archive(GOOD, type=tarfile.LNKTYPE, linkname="result.json"), "holds 'board.json'"),
        (archive(GOOD, type=tarfile.FIFOTYPE), "holds 'board.json'"),
        (archive({**GOOD, "0.out0.npy": npy(np.array([{}], object))}), "results .* are broken"),
        (archive({**GOOD, "0.out0.npy": b"x"}), "results .* are broken"),
        (archive({name: GOOD[name] for name in ("board.json", "result.json")}), "results .* are broken"),
        (archive({**GOOD, "result.json": b'{"version": "1", "models": []}'}), "results .* are broken"),
        (archive({**GOOD, "result.json": b'{"version": "1", "models": [{}]}'}), "results .* are broken"),
        (archive({**GOOD, "result.json": b'{"error": "RuntimeError: no such operator"}'}), "no such operator"),
        (archive({"result.json": RESULT}), "no usable answer"),
        (archive({**GOOD, "board.json": b"{"}), "no usable answer"),
        (archive(GOOD)[:-9], "no usable answer: the answer is incomplete"),
        (board.MARK + b"x\n", "no usable answer"),
        (board.MARK + b"4\nabcd", "no usable answer"),
        (b"welcome", "exit code 0"),
    ],
)
def test_answers_that_are_not_to_be_trusted(answers, answer, message):
    with pytest.raises(DeviceError, match=message):
        answers(answer)


def test_an_archive_read_twice_is_refused(tmp_path):
    double = archive(GOOD)[len(board.MARK) :].partition(b"\n")[2]
    ssh._unpack(double, tmp_path, set(GOOD))
    with pytest.raises(ValueError, match=r"holds 'board\.json'"):
        ssh._unpack(double, tmp_path, set(GOOD))


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("Connection to board closed by remote host.", "connection was lost .Connection to board closed"),
        ("client_loop: send disconnect: Broken pipe", "connection was lost"),
        ("ssh: connect to host board port 22: No route to host", "cannot be reached"),
        ("ssh: connect to host board port 22: Connection timed out", "cannot be reached"),
        ("config line 3: Bad configuration option: foo", "refuses its configuration"),
        ("", "no message"),
    ],
)
def test_what_ssh_says(answers, stderr, message):
    with pytest.raises(DeviceError, match=message):
        answers(b"", code=255, stderr=stderr)


def test_too_much_of_an_answer(answers, monkeypatch):
    monkeypatch.setattr(ssh, "_LIMIT_BYTES", 100)
    with pytest.raises(DeviceError, match="ssh://board"):
        answers(archive(GOOD))


@pytest.mark.parametrize("path", [board.__file__, ssh.WORKER])
def test_what_runs_on_the_board_is_old_python(path):
    ast.parse(Path(path).read_text(encoding="utf-8"), feature_version=(3, 9))
