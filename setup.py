"""What setup.cfg cannot hold: the one compiled file. Without a compiler the installation goes on, and shards/resize.py
takes torch's path."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("shards._kernel", ["shards/_kernel.c"], optional=True, extra_compile_args=["-O3"])])
