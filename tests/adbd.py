"""The device's side of adb in this process, on the loopback interface, with faults to switch on: `Phone`.

It speaks the documented wire protocol (messages CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; services shell, shell v2, exec and
sync with STAT, LST2, SEND and RECV), so the real adb client drives it.  The device's /data and /sys are folders below
`root`: their names are replaced in commands, not in what programs read.  Programs are the host's, and small scripts for
what only Android has; in the place of a pushed ELF program `program` is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import signal
import struct
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

HOST_TOOLS = ("sh", "ls", "cat", "cp", "rm", "mkdir", "rmdir", "chmod", "find", "sed", "dd", "grep", "sleep", "timeout")
PROPERTIES = {
    "ro.product.manufacturer": "mobileqat",
    "ro.product.model": "simulated phone",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a",
    "ro.hardware": "simulated",
    "ro.soc.model": "SIM1",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "sys.boot_completed": "1",
}
CLOCKS_KHZ = (1800000, 1800000, 2400000, 2800000)
MACHINES = (40, 62, 183)  # ELF's numbers of 32-bit ARM, x86-64 and 64-bit ARM
MAX_PAYLOAD = 256 * 1024
VERSION = 0x01000001  # from this version on the checksums are not checked


@dataclass
class Faults:
    """What goes wrong.  Texts select shell commands that contain them.

    Attributes:
        never_authorizes: no key is ever accepted.
        is_mute: nothing is ever answered, not even the first message.
        hang_on: the command never ends.
        die_on, die_at, after_bytes: the device vanishes when so much of the output of the `die_at`-th such command was
            sent.
        reboots: it comes back after that, not yet booted.
        room_bytes: how much can be pushed before the storage is full.
        corrupts: the last byte of a pushed file changes on its way.
        call_on: a text and what is called when a command with it comes.
    """

    never_authorizes: bool = False
    is_mute: bool = False
    hang_on: str | None = None
    die_on: str | None = None
    die_at: int = 1
    after_bytes: int = 0
    reboots: bool = False
    room_bytes: int | None = None
    corrupts: bool = False
    call_on: tuple[str, Callable[[], None]] | None = None


class Phone:
    """A device; use it as a context manager.

    Args:
        root: an empty folder for its storage.
        program: the command line that stands in for pushed programs.
        features: what the device tells the client that it can do.
        environment: more variables for its programs.
    """

    def __init__(
        self,
        root: Path,
        program: list[str],
        features: str = "shell_v2,stat_v2,ls_v2,fixed_push_mkdir",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root, self.features, self._environment = root.resolve(), features, dict(environment)
        self.faults = Faults()
        self.commands: list[str] = []
        self._connections: set[_Connection] = set()
        self._furnish()
        self.program = program

    def __enter__(self) -> Phone:
        self._loop = asyncio.new_event_loop()
        self._shells: list[asyncio.subprocess.Process] = []  # every shell
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._call(self._listen(0))
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._vanish())
        self._call(self._drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for process in self.processes():
            os.kill(process, signal.SIGKILL)

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        """Where pushed files go."""
        return self.root / "data/local/tmp"

    def processes(self) -> list[int]:
        """The processes that work in the device's folders."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(f"{self.root}/data"):
                    found.append(int(link.parent.name))
        return found

    def left_behind(self) -> list[Path]:
        """The files that lie where runs put theirs."""
        return sorted(self.home.iterdir())

    def say(self, service: str, text: str) -> None:
        """Sets what `dumpsys SERVICE` prints; `text` is a shell script if it starts with #!."""
        path = self.root / "dumpsys" / service
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)

    def set_property(self, key: str, value: str) -> None:
        (self.root / "props" / key).write_text(value + "\n")

    @property
    def program(self) -> list[str]:
        """What runs in the place of pushed programs; the app runs it too."""
        return self._program

    @program.setter
    def program(self, words: list[str]) -> None:
        self._program = words
        (self.root / "program").write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (self.root / "program").chmod(0o755)

    def add_tool(self, name: str, script: str) -> None:
        """Puts a shell script where the device's programs are."""
        self.remove_tool(name)
        path = self.root / "system/bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def remove_tool(self, name: str) -> None:
        (self.root / "system/bin" / name).unlink(missing_ok=True)

    # --- the inside

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _listen(self, port: int) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        return self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader, writer) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(connection)
            connection.drop()

    async def _vanish(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.drop()

    async def _drain(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self._shells:  # also those whose client went away; a loop must not end before its children
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process._transport.close()
            await process.wait()

    async def vanish(self) -> None:
        """What a pulled cable or a reboot does."""
        await self._vanish()
        if self.faults.reboots:
            (self.root / "props/sys.boot_completed").unlink()
            await self._listen(self.port)

    def path(self, name: str) -> Path:
        """Where the device's file is on the host; never outside of `root`."""
        return self.root / os.path.normpath("/" + name).lstrip("/")

    def stored(self, name: str) -> Path:
        """The same for reading: the program as it was pushed, not what stands in for it."""
        path = self.path(name)
        original = path.with_name(f".elf-{path.name}")
        return original if original.exists() else path

    def arrived(self, path: Path) -> None:
        """Puts the stand-in where a program was pushed."""
        head = path.read_bytes()[:20]
        if head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") in MACHINES:
            path.rename(path.with_name(f".elf-{path.name}"))
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(str(self.root / "program"))} "$@"\n')

    def mapped(self, command: str) -> str:
        for folder in ("/data/local", "/sys/"):
            command = command.replace(folder, f"{self.root}{folder}")
        return command

    def environment(self) -> dict[str, str]:
        own = {"PATH": str(self.root / "system/bin"), "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
        return own | self._environment

    def _furnish(self) -> None:
        for folder in ("data/local/tmp", "system/bin", "props", "dumpsys", "sys/class/thermal"):
            (self.root / folder).mkdir(parents=True)
        for name in HOST_TOOLS:
            source = next(p for p in (Path("/usr/bin", name), Path("/bin", name)) if p.exists())
            (self.root / "system/bin" / name).symlink_to(source)
        for key, value in PROPERTIES.items():
            self.set_property(key, value)
        for index, khz in enumerate(CLOCKS_KHZ):
            folder = self.root / f"sys/devices/system/cpu/cpu{index}/cpufreq"
            folder.mkdir(parents=True)
            for name, value in (("cpuinfo_max_freq", khz), ("scaling_max_freq", khz), ("scaling_governor", "walt")):
                (folder / name).write_text(f"{value}\n")
        root, log = shlex.quote(str(self.root)), shlex.quote(str(self.root / "logcat"))
        stamp = "11-21 10:00:00.000  7651  7651 I"
        self.add_tool("getprop", f'cat {root}/props/"$1" 2>/dev/null || echo')
        self.add_tool("dumpsys", f'f={root}/dumpsys/$1; [ -x "$f" ] && exec "$f"; cat "$f"')
        self.add_tool("taskset", f'echo "$1" >>{root}/masks; shift; exec "$@"')
        self.add_tool("log", f'echo "{stamp} $2: $3" >>{log}')
        self.add_tool("logcat", f"cat {log}")
        self.add_tool(
            "am",
            f"[ $1 = start ] || exit 0; for a; do :; done; set -f; {root}/program $a 2>&1 "
            f'| sed "s/^/{stamp} tflite  : /" >>{log}',
        )
        name = "package:org.tensorflow.lite.benchmark"
        install = f"echo {name} >{root}/installed; echo Success"
        self.add_tool("pm", f"case $1 in install) {install};; list) cat {root}/installed;; esac")
        for name in ("sha256sum", "md5sum"):
            loop = f'g=$f; [ -e ".elf-$f" ] && g=".elf-$f"; /usr/bin/{name} <"$g" | sed "s|-|$f|"'
            self.add_tool(name, f"for f; do {loop}; done")


class _Stream:
    """One opened service: bytes in, bytes out, one message at a time until the client says OKAY."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.may_write = asyncio.Semaphore(0)
        self.is_open = True
        self._buffer = b""

    async def write(self, data: bytes) -> None:
        limit = self.connection.max_payload
        for start in range(0, len(data), limit):
            await self.may_write.acquire()
            if not self.is_open:
                raise ConnectionResetError
            await self.connection.send(b"WRTE", self.local, self.remote, data[start : start + limit])

    async def read_some(self) -> bytes:
        """What came, empty at the end."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        data = await self.inbox.get()
        if data is None:
            self.inbox.put_nowait(None)
            return b""
        await self.connection.send(b"OKAY", self.local, self.remote)
        return data

    async def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await self.read_some()
            if not part:
                raise EOFError
            data += part
        data, self._buffer = data[:count], data[count:]
        return data

    def end(self) -> None:
        self.is_open = False
        self.inbox.put_nowait(None)
        self.may_write.release()


class _Connection:
    """One client, that is adb's server on the host."""

    def __init__(self, phone: Phone, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.phone, self.reader, self.writer = phone, reader, writer
        self.max_payload = 4096
        self.streams: dict[int, _Stream] = {}
        self.opened = 0

    async def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        word = int.from_bytes(command, "little")
        self.writer.write(struct.pack("<6I", word, first, second, len(data), sum(data), word ^ 0xFFFFFFFF) + data)
        await self.writer.drain()

    async def serve(self) -> None:
        tasks = set()
        while True:
            word, first, second, length = struct.unpack("<4I8x", await self.reader.readexactly(24))
            command, data = word.to_bytes(4, "little"), await self.reader.readexactly(length)
            if self.phone.faults.is_mute:
                continue
            if command in (b"CNXN", b"AUTH"):
                await self._greet(command, second)
            elif command == b"OPEN":
                self.opened += 1
                stream = self.streams[self.opened] = _Stream(self, self.opened, first)
                task = asyncio.create_task(self._run(stream, data.rstrip(b"\0").decode()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            elif second in self.streams:
                self._deliver(self.streams[second], command, data)

    async def _greet(self, command: bytes, max_payload: int) -> None:
        if self.phone.faults.never_authorizes:
            await self.send(b"AUTH", 1, 0, bytes(20))
            return
        self.max_payload = min(max_payload, MAX_PAYLOAD)
        banner = f"device::ro.product.model=simulated;features={self.phone.features}"
        await self.send(b"CNXN", VERSION, MAX_PAYLOAD, banner.encode())

    def _deliver(self, stream: _Stream, command: bytes, data: bytes) -> None:
        if command == b"OKAY":
            stream.may_write.release()
        elif command == b"WRTE":
            stream.inbox.put_nowait(data)
        elif command == b"CLSE":
            self.streams.pop(stream.local).end()

    async def _run(self, stream: _Stream, service: str) -> None:
        kind, _, argument = service.partition(":")
        name, *options = kind.split(",")
        if name not in ("shell", "exec", "sync"):
            await self.send(b"CLSE", 0, stream.remote)
            return
        await self.send(b"OKAY", stream.local, stream.remote)
        stream.may_write.release()
        try:
            if name == "sync":
                await _Sync(self.phone, stream).serve()
            else:
                await self._shell(stream, argument, "v2" in options)
        except (EOFError, ConnectionError):
            pass
        if self.streams.pop(stream.local, None):
            await self.send(b"CLSE", stream.local, stream.remote)

    def drop(self) -> None:
        for stream in self.streams.values():
            stream.end()
        self.streams.clear()
        self.writer.close()

    # --- shell

    async def _shell(self, stream: _Stream, command: str, is_v2: bool) -> None:
        phone, faults = self.phone, self.phone.faults
        phone.commands.append(command)
        if faults.call_on and faults.call_on[0] in command:
            faults.call_on[1]()
        if faults.hang_on and faults.hang_on in command:
            command = "exec sleep 1000"
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            phone.mapped(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=phone.environment(),
            start_new_session=True,
        )
        phone._shells.append(process)
        watcher = asyncio.create_task(self._watch(stream, process))
        left = faults.after_bytes
        asked = sum(faults.die_on in each for each in phone.commands) if faults.die_on else 0
        dies = asked == faults.die_at and faults.die_on is not None and faults.die_on in command
        while data := await process.stdout.read(32 * 1024):
            if dies:
                data, left = data[:left], left - len(data)
                if left <= 0:
                    await stream.write(struct.pack("<BI", 1, len(data)) + data if is_v2 else data)
                    await phone.vanish()
                    return
            await stream.write(struct.pack("<BI", 1, len(data)) + data if is_v2 else data)
        code = await process.wait()
        if is_v2:
            await stream.write(struct.pack("<BIB", 3, 1, code if code >= 0 else 128 - code))
        watcher.cancel()

    async def _watch(self, stream: _Stream, process: asyncio.subprocess.Process) -> None:
        """A client that goes away ends the shell, as on a device: what the shell had started lives on."""
        while await stream.read_some():
            pass
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGHUP)


class _Sync:
    """The service that moves files."""

    def __init__(self, phone: Phone, stream: _Stream) -> None:
        self.phone, self.stream = phone, stream

    async def serve(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", await self.stream.read(8))
            if request == b"QUIT":
                return
            path = (await self.stream.read(length)).decode()
            handler = {b"STAT": self._stat, b"STA2": self._stat2, b"LST2": self._stat2, b"SEND": self._send}
            handler[b"RECV"] = self._receive
            if request not in handler:
                await self._fail(f"no request {request!r}")
                return
            await handler[request](request, path)

    def _facts(self, path: str) -> tuple[int, os.stat_result | None]:
        try:
            return 0, os.stat(self.phone.stored(path))
        except OSError as error:
            return error.errno or errno.EIO, None

    async def _stat(self, request: bytes, path: str) -> None:
        _, facts = self._facts(path)
        words = (facts.st_mode, facts.st_size, int(facts.st_mtime)) if facts else (0, 0, 0)
        await self.stream.write(struct.pack("<4s3I", request, *words))

    async def _stat2(self, request: bytes, path: str) -> None:
        code, facts = self._facts(path)
        words = [0] * 10
        if facts:
            times = [int(facts.st_atime), int(facts.st_mtime), int(facts.st_ctime)]
            words = [facts.st_dev, facts.st_ino, facts.st_mode, facts.st_nlink, 0, 0, facts.st_size, *times]
        await self.stream.write(struct.pack("<4sI2Q4IQ3q", request, code, *words))

    async def _send(self, _: bytes, request: str) -> None:
        name = request.rpartition(",")[0]
        content = b"".join([part async for part in self._parts()])
        room = self.phone.faults.room_bytes
        if room is not None:
            if len(content) > room:
                await self._fail(f"couldn't write file: {os.strerror(errno.ENOSPC)}")
                return
            self.phone.faults.room_bytes = room - len(content)
        if self.phone.faults.corrupts and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        path = self.phone.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.phone.arrived(path)
        await self.stream.write(b"OKAY" + bytes(4))

    async def _parts(self) -> AsyncIterator[bytes]:
        while True:
            kind, length = struct.unpack("<4sI", await self.stream.read(8))
            if kind == b"DONE":
                return
            yield await self.stream.read(length)

    async def _receive(self, _: bytes, path: str) -> None:
        try:
            content = self.phone.stored(path).read_bytes()
        except OSError as error:
            await self._fail(f"open failed: {error.strerror}")
            return
        for start in range(0, len(content), 64 * 1024):
            part = content[start : start + 64 * 1024]
            await self.stream.write(b"DATA" + struct.pack("<I", len(part)) + part)
        await self.stream.write(b"DONE" + bytes(4))

    async def _fail(self, reason: str) -> None:
        text = reason.encode()
        await self.stream.write(b"FAIL" + struct.pack("<I", len(text)) + text)
