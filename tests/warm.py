"""A `scaler` that has imported its packages already: each command is a process of its own, forked from one that did.

    with warm_scaler(folder, env=environment) as bin:          # a folder for PATH, which holds `scaler`
        subprocess.run(["scaler", "recipe", "list"], env={**environment, "PATH": f"{bin}:{environment['PATH']}"})

Importing torch and timm takes seconds of a processor, longer than most commands themselves; a file that runs dozens of
them does it once. Arguments, folder, variables, streams and exit code are those of the caller; but variables that are
read when a package is imported are the server's.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CLIENT = """#!{python} -IS
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
words = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(s, [len(words).to_bytes(4, "big")], [0, 1, 2])
s.sendall(words)
sys.exit(int(s.makefile().readline()))
"""


@contextlib.contextmanager
def warm_scaler(folder: Path, *, env: dict[str, str]) -> Iterator[Path]:
    """A folder below `folder` that holds the command; the server ends with the `with`."""
    bin, address = folder / "bin", str(folder / "scaler.socket")
    bin.mkdir()
    command = bin / "scaler"
    command.write_text(_CLIENT.format(python=sys.executable, address=address))
    command.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.warm", address], env=env, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield bin
    finally:
        server.kill()
        server.wait()


def _serve(address: str) -> None:
    import timm  # noqa: F401

    import scaler.cli
    import scaler.train

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork():  # the child waits for its own child, so that commands may overlap
                connection.close()
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                continue
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
            words = connection.makefile("rb").read(int.from_bytes(size, "big"))
            child = os.fork()
            if not child:
                argv, cwd, environment = json.loads(words)
                for stream, number in zip(streams, range(3), strict=True):
                    os.dup2(stream, number)
                    os.close(stream)
                connection.close()
                os.chdir(cwd)
                os.environ.clear()
                os.environ.update(environment)
                sys.argv, sys.path[0] = argv, str(Path(sys.executable).parent)
                try:
                    scaler.cli.main()
                    code = 0
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else int(end.code is not None)
                except BaseException:
                    traceback.print_exc()
                    code = 1
                atexit._run_exitfuncs()
                with contextlib.suppress(BrokenPipeError):
                    sys.stdout.flush()
                os._exit(code)  # the interpreter takes a second to let go of all that is imported
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(f"{code}\n".encode())
            os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
