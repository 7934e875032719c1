"""Eight virtual CPU devices, exact float32 products, no network: set before JAX is imported."""

import collections
import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import resource
import signal
import threading
import zlib
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("VIT_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if version("jaxlib").startswith("0.10."):  # Half the time to compile; newer ones end on this flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    # One module of LLVM for each program: eight devices already keep the cores busy.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Eight devices on two cores: programs that wait for one another must not overlap.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Tests, and the processes they start, compile much and compute little.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # Programs that say less of their lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["NO_GCE_CHECK"] = "true"  # TFDS and TensorFlow look for a cloud otherwise.

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in a job that a script left behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator
from pathlib import Path

import equal_runs
import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jax._src import compilation_cache as compilation_cache_lib
from jax._src import compiler
from sklearn.datasets import load_digits

from vit_jax import config as config_lib
from vit_jax.parallel import host_memory, sharding

# These suit a process of one run. In one of many runs they keep what is freed from the next one,
# and going through all of a worker's heap takes long.
host_memory.keep_freed_memory = host_memory.tidy_heap = lambda: None

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How fast the machine is says nothing about the code.
settings.register_profile(
    "any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None
)
settings.load_profile("any machine")

TINY = Path(__file__).parent / "tiny.py"
FIRST_BYTES = 1_000_000_000  # Of a worker that has imported everything.
MORE_BYTES = 600_000_000  # More than after it last forgot its programs makes it forget again.
PHASE_SECONDS = 300  # For the fixtures of a test, and as much for the test itself.
SOAK_SECONDS = 3 * 3600

# Imported modules never become garbage; looking through them takes a tenth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)

LONGEST = ("test_processes.py", "test_train.py", "test_faults.py", "test_tpu.py", "test_recipes.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that no worker begins one when the other is done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails what hangs, with the stacks of all threads; `faulthandler_timeout` ends the rest."""
    seconds = PHASE_SECONDS
    if item.get_closest_marker("soak"):
        seconds = SOAK_SECONDS
        faulthandler.dump_traceback_later(seconds + 60, exit=True)

    def fail(*_):
        faulthandler.dump_traceback()
        pytest.fail(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache for all tests and the processes they start: the same programs recur."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "xla"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if hasattr(compiler, "_cache_read") and hasattr(compiler, "_cache_write"):
        keep_programs()
    return path


KEPT_PROGRAMS = collections.OrderedDict()
MOST_KEPT = 150  # Of a megabyte each.


def keep_programs():
    """Keeps compiled programs in memory by their keys in the cache, the small ones too.

    Reading them from files is a sixth of what a second run of one config takes.
    """
    read, write = compiler._cache_read, compiler._cache_write

    def read_kept(name, key, *args):
        found = KEPT_PROGRAMS.get(key) or read(name, key, *args)
        return keep(key, *found)

    def write_kept(key, seconds, *args):
        _name, _backend, program, host_callbacks = args
        if not host_callbacks:
            keep(key, program, int(seconds))
        write(key, seconds, *args)

    def keep(key, program, seconds):
        if program is not None:
            KEPT_PROGRAMS[key] = program, seconds
            KEPT_PROGRAMS.move_to_end(key)
            while len(KEPT_PROGRAMS) > MOST_KEPT:
                KEPT_PROGRAMS.popitem(last=False)
        return program, seconds

    compiler._cache_read, compiler._cache_write = read_kept, write_kept
    if not (compilation_cache_lib.zstandard or getattr(compilation_cache_lib, "zstd", None)):
        compilation_cache_lib.compress_executable = lambda program: zlib.compress(program, 1)


@pytest.fixture(scope="session", autouse=True)
def shapes_of_models():
    """Traces the initialization of a model once: a test asks for the shapes of one many times."""
    eval_shape = jax.eval_shape

    @functools.lru_cache(300)
    def shapes(model, structure, kinds, settings):
        del settings
        leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
        return eval_shape(model.init, *jax.tree.unflatten(structure, leaves))

    def remembered(function, *args, **kwargs):
        model = getattr(function, "__self__", None)
        if kwargs or not isinstance(model, nn.Module) or function.__name__ != "init":
            return eval_shape(function, *args, **kwargs)
        leaves, structure = jax.tree.flatten(args)
        try:
            kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            found = shapes(model, structure, kinds, equal_runs.settings())
        except (AttributeError, TypeError):  # It has fields that have no hash.
            return eval_shape(function, *args)
        return jax.tree.map(lambda leaf: leaf, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "eval_shape", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """Runs that compute the same are traced and compiled once in a process."""
    with equal_runs.shared():
        yield


@pytest.fixture(scope="session", autouse=True)
def drawing_reports():
    """A context within which runs write their reports, a third of the work; no others do."""
    from vit_jax.training import pictures

    write_report = pictures.write_report

    @contextlib.contextmanager
    def drawing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pictures, "write_report", write_report)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "write_report", lambda workdir: None)
        yield drawing


@pytest.fixture(scope="session")
def memory_after_forgetting():
    """The bytes that the worker held when it last forgot its programs, in a list of one."""
    return [FIRST_BYTES]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(memory_after_forgetting):
    """Forgets compiled programs between files that have added much, since forgetting takes time."""
    yield
    if held_bytes() > memory_after_forgetting[0] + MORE_BYTES:
        jax.clear_caches()
        KEPT_PROGRAMS.clear()
        equal_runs.forget()
        gc.collect()
        give_back_memory()
        memory_after_forgetting[0] = held_bytes()


def give_back_memory():
    """Returns what is freed to the kernel, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def held_bytes():
    """The memory of this process; 0 where Linux does not tell it."""
    memory = Path("/proc/self/statm")
    return int(memory.read_text().split()[1]) * resource.getpagesize() if memory.exists() else 0


@pytest.fixture(scope="session")
def digits_npz(tmp_path_factory):
    """300 real digits, 8×8 uint8, as a file for the `npz` source."""
    digits = load_digits()
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = np.round(digits.images[:300] * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(path, image=images, label=digits.target[:300])
    return path


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """Folder where `digit_scenes` are prepared, 3 scenes to train with and 4 to test."""
    from vit_jax.data.builders import digit_scenes
    from vit_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        for sizes in ("NUM_SCENES", "NUM_SINGLE_DIGITS"):
            patch.setattr(digit_scenes, sizes, {"train": 3, "test": 4})
        for name in ("32px", "16px_single"):
            prepare(f"digit_scenes/{name}", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def running_on_one_device():
    """A context within which runs have one of the devices: for what the mesh does not change."""
    make_mesh = sharding.make_mesh

    @contextlib.contextmanager
    def running():
        with pytest.MonkeyPatch.context() as patch:
            devices = jax.devices()[:1]
            patch.setattr(sharding, "make_mesh", lambda sizes, *_: make_mesh(sizes, devices))
            yield

    return running


@pytest.fixture
def one_device(running_on_one_device):
    """Runs on one of the devices: for tests of what a step computes."""
    with running_on_one_device():
        yield


@pytest.fixture
def tiny_config(digits_npz):
    """`tiny_config(key=value, ...)` → a fresh, validated config of a run that takes seconds.

    `full` is that of `tiny.py`. Dots in keys are written as double underscores: `mesh__fsdp=2`.
    """

    def make(full=False, **keys):
        config = config_lib.load(f"{TINY}:npz={digits_npz},full={full}")
        config.unlock()
        for key, value in keys.items():
            config_lib.set_key(config, key.replace("__", "."), value)
        return config_lib.validate(config)

    return make


@pytest.fixture
def all_optimizations() -> Iterator[None]:
    """Compiles as users do: for what is compared with outputs of the references."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """A hub without repositories, which the program reads from and writes to."""
    from hub_server import Hub
    from huggingface_hub import constants

    from vit_jax.checkpoints import hub

    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub._fetched.cache_clear()
        hub._fetched_dataset.cache_clear()
        yield server
        server.shutdown()
        thread.join()
    hub._fetched.cache_clear()
    hub._fetched_dataset.cache_clear()
