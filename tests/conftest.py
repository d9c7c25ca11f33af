"""Eight fake CPU devices for every test; set before JAX starts, because it reads them once."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of a test's time is LLVM optimizing a program that runs once: without it, compiling takes a third to a half of the time.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect
