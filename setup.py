"""What setup.cfg cannot hold: the compiled files. Without a compiler the installation goes on: shards/resize.py takes
torch's path, shards/sources.py reads files one by one."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(f"shards.{name}", [f"shards/{name}.c"], optional=True, extra_compile_args=["-O3"])
        for name in ("_kernel", "_files")
    ]
)
