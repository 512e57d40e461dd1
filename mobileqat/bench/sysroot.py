"""The emulated ARM system: qemu, an ARM Python, and the ARM builds of the interpreters, in a folder of the cache.

    python -m mobileqat.bench.sysroot [--runtime litert]

downloads about 100 MB of Debian packages, which apt verifies, and of PyPI's wheels, which pip verifies, and unpacks
them as *parts*: `system`, and one per interpreter, since these need different versions of NumPy. It needs no root and
installs nothing. A part appears under its name when it is complete, and not before; `manifest.json` in it says what
it was made of (name and SHA-256 of every download) and which files must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mobileqat
from mobileqat.bench.child import run_command
from mobileqat.bench.record import Check
from mobileqat.data.cache import cache_folder
from mobileqat.errors import DeviceError
from mobileqat.runtime import RUNTIMES

SETUP = "python -m mobileqat.bench.sysroot"
COMPILER = "apt-get install gcc libc6-dev"
MIRROR_VARIABLE = "MOBILEQAT_DEBIAN_MIRROR"
MIRROR = "http://deb.debian.org/debian"  # apt verifies signatures: no TLS is needed
RELEASE = "bookworm"  # the last one whose qemu is 7.2, of which the plugin's interface is
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# Debian's dynamic qemu (the static one takes no plugins) with its libraries, and the ARM Python with its own.
PACKAGES: dict[str, tuple[str, ...]] = {
    "amd64": (
        *("qemu-user", "libc6", "libgcc-s1", "zlib1g", "libcapstone4", "libffi8", "libglib2.0-0", "libgmp10"),
        *("libgnutls30", "libhogweed6", "libidn2-0", "libnettle8", "libnuma1", "libp11-kit0", "libpcre2-8-0"),
        *("libtasn1-6", "libunistring2", "liburing2"),
    ),
    "arm64": (
        *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libssl3"),
        *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
    ),
}
# What is left away: other processors' emulators, documents, and hooks of a package manager that is not there.
EXCLUDED = ("usr/share", "etc/init.d", "etc/cron.daily")
EMULATOR = "usr/bin/qemu-aarch64"
INTERPRETER = "usr/bin/python3.11"


@dataclass(frozen=True)
class Wheels:
    """The ARM build of an interpreter; `version` is what this machine has, or the one that was tried."""

    version: str
    numpy: str


WHEELS: dict[str, Wheels] = {
    "ai-edge-litert": Wheels("2.3.0", "2.4.6"),
    "tflite-runtime": Wheels("2.14.0", "1.26.4"),
}
PYTHON = "3.11"
TAGS = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"]

Say = Callable[[str], None]


def folder() -> Path:
    """Where everything is; it need not exist."""
    return cache_folder() / "arm"


@dataclass(frozen=True)
class Part:
    """Something that is set up as a whole.

    Attributes:
        name: in messages.
        path: where it is once it is complete.
        fix: the command that sets it up.
    """

    name: str
    path: Path
    fix: str

    def problem(self) -> str | None:
        """None if all of it is there, otherwise what is not."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            files = manifest["files"].items()
        except FileNotFoundError:
            return "not set up"
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return f"damaged: {self.path / 'manifest.json'} cannot be read"
        for name, size in files:
            try:
                found = os.lstat(self.path / name).st_size
            except OSError:
                return f"damaged: {self.path / name} is missing"
            if found != size:
                return f"damaged: {self.path / name} has {found} bytes, expected {size}"
        return None

    def downloads(self) -> dict[str, str]:
        """Name -> SHA-256 of what a complete part was made of."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        return manifest["downloads"]

    def check(self) -> Check:
        problem = self.problem()
        if problem is None:
            return Check(self.name, str(self.path))
        return Check(f"{self.name} ({problem})", None, self.fix)

    def require(self) -> Path:
        """The path.

        Raises:
            DeviceError: it is not complete; the message names the command.
        """
        problem = self.problem()
        if problem is not None:
            raise DeviceError(f"{self.name}: {problem}. Set it up (a download of 100 MB in all) with: {self.fix}")
        return self.path


def system() -> Part:
    """qemu in `host/`, the ARM Python in `root/`."""
    recipe = json.dumps([RELEASE, PACKAGES, EXCLUDED], sort_keys=True)
    key = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    return Part("qemu and an ARM Python", folder() / f"system-{key}", SETUP)


def wheels(runtime: str) -> Part:
    """The ARM build of a runtime's interpreter: a folder for PYTHONPATH.

    Raises:
        DeviceError: there is none.
    """
    package = RUNTIMES[runtime].package if runtime in RUNTIMES else ""
    if package not in WHEELS:
        expected = ", ".join(arm_runtimes())
        raise DeviceError(f"There is no ARM build of the runtime '{runtime}'. Expected one of: {expected}.")
    pins = WHEELS[package]
    name = f"{package}-{interpreter_version(package)}-numpy-{pins.numpy}"
    first = next(key for key, row in RUNTIMES.items() if row.package == package)
    return Part(f"{package} for ARM", folder() / name, f"{SETUP} --runtime {first}")


def arm_runtimes() -> list[str]:
    """The keys of `RUNTIMES` that have an ARM build."""
    return [name for name, runtime in RUNTIMES.items() if runtime.package in WHEELS]


def interpreter_version(package: str) -> str:
    """This machine's version of an interpreter, so that both compute the same, else the one that was tried."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return WHEELS[package].version


def emulator() -> list[str]:
    """The command that starts qemu, with its own libraries whatever this machine has.

    Raises:
        DeviceError: it is not set up.
    """
    return _emulator(system().require() / "host")


def _emulator(host: Path) -> list[str]:
    libraries = host / "lib" / "x86_64-linux-gnu"
    search_path = f"{libraries}:{host / 'usr' / libraries.relative_to(host)}"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", search_path, str(host / EMULATOR)]


def plugin() -> Path:
    """The plugin that counts instructions, compiled when it is not in the cache yet.

    Raises:
        DeviceError: there is no C compiler, or it refuses.
    """
    path = _plugin_path()
    if path.is_file():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise DeviceError(f"A C compiler is needed for the plugin of qemu: {COMPILER}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".plugin-") as new:
        made = Path(new) / path.name
        _run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", str(made), str(plugin_source())], "Compiling qemu's plugin", 60
        )
        os.replace(made, path)
    return path


def is_plugin_made() -> bool:
    """Whether the plugin is in the cache, so that no compiler is needed any more."""
    return _plugin_path().is_file()


def _plugin_path() -> Path:
    key = hashlib.sha256(plugin_source().read_bytes()).hexdigest()[:16]
    return folder() / f"count_instructions-{key}.so"


def plugin_source() -> Path:
    """`_arm/` inside an installed package, `android_bench/arm/` beside the package in a source tree."""
    package = Path(mobileqat.__file__).parent
    installed = package / "_arm"
    parent = installed if installed.is_dir() else package.parent / "android_bench" / "arm"
    return parent / "count_instructions.c"


def find_compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def machine_problem() -> str | None:
    """Why this machine cannot have the emulated system, None if it can."""
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return None
    return f"the emulator is set up on x86-64 Linux only, this is {platform.machine()} {platform.system()}"


# --- setting up


def set_up(runtimes: Sequence[str], say: Say = print) -> None:
    """Downloads and unpacks what is missing, and compiles the plugin; what is complete stays as it is.

    Args:
        runtimes: keys of `RUNTIMES`.
        say: gets a line of progress now and then.

    Raises:
        DeviceError: another kind of machine, a command that is missing, or a download that failed.
    """
    problem = machine_problem()
    if problem:
        raise DeviceError(f"{problem[0].upper()}{problem[1:]}.")
    parts: dict[Part, Callable[[Path, Say], dict[str, str]]] = {system(): _make_system}
    for runtime in runtimes:
        parts[wheels(runtime)] = _wheels_maker(RUNTIMES[runtime].package)
    with _locked(folder(), say):
        say(f"qemu's plugin: ready in {plugin()}")
        for part, make in parts.items():
            _complete(part, make, say)


def _complete(part: Part, make: Callable[[Path, Say], dict[str, str]], say: Say) -> None:
    """Makes a part beside its place and moves it there, if it is not complete already. The lock must be held."""
    problem = part.problem()
    if problem is None:
        say(f"{part.name}: ready in {part.path}")
        return
    say(f"{part.name}: {problem}, setting up")
    new = Path(tempfile.mkdtemp(dir=part.path.parent, prefix=".new-"))
    try:
        new.chmod(0o755)
        downloads = make(new, say)
        _write_manifest(new, downloads)
        if part.path.exists():  # damaged: renamed first, so that nothing half-deleted is ever at its place
            old = Path(tempfile.mkdtemp(dir=part.path.parent, prefix=".old-"))
            os.replace(part.path, old / "part")
        os.replace(new, part.path)
    finally:
        _sweep(part.path.parent)
    say(f"{part.name}: ready in {part.path}")


def _write_manifest(path: Path, downloads: Mapping[str, str]) -> None:
    files = {
        str(found.relative_to(path)): found.lstat().st_size
        for found in sorted(path.rglob("*"))
        if found.is_symlink() or found.is_file()
    }
    manifest = {"date": datetime.date.today().isoformat(), "downloads": dict(downloads), "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """One process (and one thread) at a time; the lock ends with the process, however it ends."""
    import fcntl  # not on Windows, where the rest of the module can be imported

    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / "lock").open("a")
    except OSError as error:
        raise DeviceError(f"The folder {path} cannot be written ({error}): set MOBILEQAT_CACHE to another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is setting up")
            fcntl.flock(file, fcntl.LOCK_EX)
        _sweep(path)
        yield


def _sweep(path: Path) -> None:
    """Removes what was being made, or replaced, by us or by a process that was killed."""
    for pattern in (".new-*", ".old-*"):
        for leftover in path.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _make_system(path: Path, say: Say) -> dict[str, str]:
    """Unpacks `host/` and `root/`; returns the downloads."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DeviceError(f"{tool} is missing: the emulated ARM system comes from Debian, by Debian's tools.")
    mirror = os.environ.get(MIRROR_VARIABLE) or MIRROR
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        # apt reads the list as a user of its own when it runs as root.
        Path(scratch).chmod(0o755)
        environment = {**os.environ, "APT_CONFIG": str(_configure_apt(Path(scratch), mirror)), "LC_ALL": "C"}
        hint = f" The mirror is {mirror}; {MIRROR_VARIABLE} can name another one."
        say(f"  list of packages from {mirror}")
        _run(["apt-get", "--quiet", "update"], "Reading Debian's list of packages", 300, environment, hint)
        for architecture, place in (("amd64", "host"), ("arm64", "root")):
            say(f"  {len(PACKAGES[architecture])} {architecture} packages")
            names = [f"{name}:{architecture}" for name in PACKAGES[architecture]]
            archives = Path(scratch) / place
            archives.mkdir()
            command = ["apt-get", "--quiet", "download", *names]
            _run(command, "Downloading Debian packages", 600, environment, hint, folder=archives)
            (path / place).mkdir()
            for archive in sorted(archives.glob("*.deb")):
                _run(["dpkg-deb", "--extract", str(archive), str(path / place)], f"Unpacking {archive.name}", 120)
        downloads = _hashes(Path(scratch).glob("*/*.deb"))
    for place in ("host", "root"):
        for name in EXCLUDED:
            shutil.rmtree(path / place / name, ignore_errors=True)
    for other in (path / "host" / EMULATOR).parent.iterdir():
        if other != path / "host" / EMULATOR:
            other.unlink()
    say("  trying Python")
    _try_import(path, path, ("importlib.metadata", "json"))
    return downloads


def _try_import(system: Path, site: Path, modules: Sequence[str]) -> None:
    """Imports modules under qemu: what cannot be imported is not set up, and the next time takes a third as long.

    Python leaves its bytecode beside the modules, those of the system's standard library too.
    """
    environment = {"PYTHONPATH": str(site), "LC_ALL": "C.UTF-8"}
    program = [str(system / "root" / INTERPRETER), "-c", f"import {', '.join(modules)}"]
    command = [*_emulator(system / "host"), "-cpu", "cortex-a53", "-L", str(system / "root"), *program]
    _run(command, f"Importing {' and '.join(modules)} under qemu", 300, environment)


def _configure_apt(path: Path, mirror: str) -> Path:
    """An apt with a state of its own, for both architectures: neither root nor this machine's lists are touched."""
    if not KEYRING.is_file():
        raise DeviceError(f"{KEYRING}, which verifies packages, is missing: apt-get install debian-archive-keyring")
    for name in ("state/lists/partial", "cache/archives/partial", "empty"):
        (path / name).mkdir(parents=True)
    (path / "state" / "status").touch()
    (path / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n", encoding="utf-8")
    configuration = path / "apt.conf"
    # Proxies, certificates and retries are this machine's own.
    dump = _run(["apt-config", "dump"], "Reading the configuration of apt", 60)
    kept = [line for line in dump.splitlines() if line.startswith(("Acquire::http", "Acquire::Check"))]
    own = [
        f'Dir::Etc::parts "{path}/empty";',
        'Dir::Etc::main "/dev/null";',
        f'Dir::Etc::sourcelist "{path}/sources.list";',
        f'Dir::Etc::sourceparts "{path}/empty";',
        f'Dir::State "{path}/state";',
        f'Dir::State::status "{path}/state/status";',
        f'Dir::Cache "{path}/cache";',
        'APT::Architecture "amd64";',
        'APT::Architectures { "amd64"; "arm64"; };',
        'APT::Sandbox::User "";',  # its own user could not write into this folder
        'APT::Update::Error-Mode "any";',
        'Acquire::Languages "none";',
        'Acquire::Retries "3";',
    ]
    configuration.write_text("\n".join([*kept, *own]) + "\n", encoding="utf-8")
    return configuration


def _wheels_maker(package: str) -> Callable[[Path, Say], dict[str, str]]:
    def make(path: Path, say: Say) -> dict[str, str]:
        requirements = [f"{package}=={interpreter_version(package)}", f"numpy=={WHEELS[package].numpy}"]
        if importlib.util.find_spec("pip") is None:
            raise DeviceError(f"pip is missing in {sys.executable}: {sys.executable} -m ensurepip")
        platforms = [f"--platform={tag}" for tag in TAGS]
        options = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
            say(f"  {' and '.join(requirements)} from PyPI")
            command = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={scratch}", *options, *requirements]
            _run(command, f"Downloading {requirements[0]} for ARM", 600)
            archives = sorted(Path(scratch).glob("*.whl"))
            for archive in archives:
                _unzip(archive, path)
            downloads = _hashes(archives)
        modules = sorted({runtime.module for runtime in RUNTIMES.values() if runtime.package == package})
        say(f"  trying {', '.join(modules)}")
        _try_import(system().require(), path, modules)
        return downloads

    return make


def _unzip(archive: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DeviceError(f"{archive.name} cannot be unpacked: {error}") from error


def _hashes(archives: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(archives)}


def _run(
    command: Sequence[str],
    what: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    hint: str = "",
    folder: Path | None = None,
) -> str:
    """Runs a command; its standard output.

    Raises:
        DeviceError: it cannot be started, takes too long, or fails.
    """
    done = run_command(command, timeout_s, what, environment, folder)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        # apt's errors stand between its warnings
        errors = [line for line in lines if line.lower().startswith(("e:", "error"))] or lines
        message = " | ".join(errors[-3:]) or f"exit code {done.returncode}"
        raise DeviceError(f"{what} failed: {message.rstrip('.')}.{hint}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Sets up the emulated ARM system; the exit code is 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog=SETUP, description="Sets up the emulated ARM system in the cache.")
    parser.add_argument(
        "--runtime", action="append", choices=arm_runtimes(), help="an interpreter to set up (default: all of them)"
    )
    options = parser.parse_args(arguments)
    try:
        set_up(options.runtime or arm_runtimes(), lambda line: print(line, flush=True))
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
