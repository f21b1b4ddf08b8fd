"""For launch/preflight.sh: a line for each of CHECKS, status 1 if one fails.

One that takes longer than --timeout ends the process with the stacks of its threads.
"""

import argparse
import faulthandler
import math
import socket
import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from hovle_jax.checkpoint import open_stored
from hovle_jax.cli.main import load_config
from hovle_jax.data.pipeline import open_sources
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.run import hosts as processes
from hovle_jax.stages import get_stage
from hovle_jax.tpu.chips import get_chip


def hosts(args):
    """They find and reach each other."""
    processes.connect(args.coordinator, args.processes, args.process)
    multihost_utils.sync_global_devices("preflight")  # a collective over all devices
    return f"{jax.process_count()} reach each other"


def devices(args):
    """They are those of the topology."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    slices = len({getattr(d, "slice_index", 0) for d in jax.devices()})
    seen = f"{count} of {kind!r} in {slices} slice(s), {jax.local_device_count()} here"
    name, _, shape = args.topology.partition(":")
    if name:
        chip = get_chip(name)
        wanted = args.slices * chip.devices_per_chip * math.prod(map(int, shape.split("x")))
        if (kind, count, slices) != (chip.kind, wanted, args.slices):
            raise RuntimeError(f"{seen}; expected {wanted} of {chip.kind!r} in {args.slices}")
    return seen


def storage(args):
    """What a host writes into the work directory the others read."""
    folder = Path(args.workdir) / "preflight"
    folder.mkdir(parents=True, exist_ok=True)
    (mine := folder / str(jax.process_index())).write_text(socket.gethostname())
    multihost_utils.sync_global_devices("written")
    names = [(folder / str(i)).read_text() for i in range(jax.process_count())]
    multihost_utils.sync_global_devices("read")
    mine.unlink()
    return f"{args.workdir}: written by {len(names)} host(s), read by each"


def data(args):
    """Tokenizer and sources open; the first sample of each can be read."""
    config = load_config(args.config, args.overrides)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    sources, _ = open_sources(config, get_stage(config.stage).data, tokenizer)
    tokens = [len(source.sample(0, 0).ids) for source in sources]
    return f"{len(sources)} source(s), whose first samples have {tokens} tokens"


def parameters(args):
    """What the run starts from opens."""
    init = load_config(args.config, args.overrides).init
    named = filter(None, (init.llm, init.teacher, init.previous))
    return ", ".join(f"{d}: {len(open_stored(d).paths)} arrays" for d in named) or "none named"


CHECKS = (hosts, devices, storage, data, parameters)
OPTIONS = {"config": "", "workdir": "", "topology": "", "slices": 1, "timeout": 300.0}
OPTIONS |= {"coordinator": "", "processes": 1, "process": 0}  # as of hovle train


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args, args.overrides = parser.parse_known_args()
    failed = 0
    for check in CHECKS:
        print(f"{socket.gethostname()}  {check.__name__}", end="  ", flush=True)
        faulthandler.dump_traceback_later(args.timeout, exit=True, file=sys.__stderr__)
        try:
            print("ok:", check(args), flush=True)
        except Exception as error:  # whatever it is, the next check may say more
            failed = 1
            print("FAILED:", (str(error) or repr(error)).splitlines()[0], flush=True)
    faulthandler.cancel_dump_traceback_later()
    return failed


if __name__ == "__main__":
    sys.exit(main())
