"""`hovle chat`, `hovle generate` and `hovle serve`: answers from a model directory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from hovle_jax.cli.common import add_command, add_hosts, no_more
from hovle_jax.data.files import check_local
from hovle_jax.errors import UserError
from hovle_jax.modules import require

CONTEXT = 8192
PREFIX_MIB = 1024
PATIENCE = 14 * 86400.0  # seconds that a host waits for the answers of the others


def add_commands(commands: Any) -> None:
    """Adds the commands to those of `hovle`."""
    chat = add_command(
        commands,
        "chat",
        _chat,
        "Talk to a trained model about images; without --prompt, interactively.",
        "hovle chat runs/demo/full/instruct --image digit.png --prompt 'Which digit is top-left?'",
    )
    chat.add_argument("model_dir", metavar="MODEL_DIR", help="native or Hugging Face")
    chat.add_argument(
        "--image", action="extend", nargs="+", default=[], metavar="PATH", help="of the first turn"
    )
    chat.add_argument("--prompt", help="one question and its answer")

    generate = add_command(
        commands,
        "generate",
        _generate,
        "Answer every row of a jsonl file; resumes after a kill.",
        "hovle generate runs/stage3 --input questions.jsonl --output answers.jsonl",
    )
    generate.add_argument("model_dir", metavar="MODEL_DIR", help="native or Hugging Face")
    generate.add_argument(
        "--input", required=True, metavar="IN.jsonl", help="'prompt' or 'messages', and 'image'"
    )
    generate.add_argument("--output", required=True, metavar="OUT.jsonl", help="an answer a row")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable"
    )
    generate.add_argument(
        "--retry-errors", action="store_true", help="answer rows again that failed before"
    )
    add_hosts(generate)
    add_engine(generate)

    serve = add_command(
        commands,
        "serve",
        _serve,
        "Serve a model with OpenAI's chat protocol; needs `pip install '.[serve]'`. An API key is "
        "taken from the environment variable HOVLE_API_KEY.",
        "hovle serve runs/stage3 --port 8000",
    )
    serve.add_argument("model_dir", metavar="MODEL_DIR", help="native or Hugging Face")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    serve.add_argument("--port", type=int, default=8000, help="where it listens")
    serve.add_argument("--name", default="", help="of the model; default: the directory's")
    add_engine(serve)
    serve.add_argument("--queue", type=int, default=64, help="answers waiting or running; then 429")
    serve.add_argument("--timeout", type=float, default=600.0, help="seconds of an answer")
    serve.add_argument("--drain", type=int, default=30, help="seconds to finish after SIGTERM")
    serve.add_argument("--max-body-mib", type=int, default=32, help="of a request")
    serve.add_argument("--max-pixels", type=int, default=50_000_000, help="of an image")
    serve.add_argument("--max-tiles", type=int, default=64, help="of a request")
    serve.add_argument("--max-new-tokens", type=int, default=4096, help="of an answer, at most")
    serve.add_argument(
        "--images-first",
        action="store_true",
        help="images of a message go before its text, wherever the client put them",
    )

    for command in (chat, generate):
        command.add_argument("--max-new-tokens", type=int, default=64, help="of an answer, at most")
        _add_sampling(command)


def add_engine(command: argparse.ArgumentParser, *, context: int = CONTEXT) -> None:
    """The flags that `load` and `engine_options` read; `context` 0: the command finds out."""
    command.add_argument("--slots", type=int, default=8, help="requests answered at a time")
    command.add_argument(
        "--context",
        type=int,
        default=context,
        help="most tokens of a prompt and its answer" + ("" if context else "; 0: what they need"),
    )
    command.add_argument("--int8-weights", action="store_true", help="half of bfloat16's bytes")
    command.add_argument("--int8-kv", action="store_true", help="the same for the cache")
    command.add_argument(
        "--prefix-mib",
        type=int,
        default=PREFIX_MIB,
        help="memory that keeps images read before, for the next question about them; 0: none",
    )
    command.add_argument(
        "--mesh",
        default="1x1",
        metavar="DATAxTENSOR",
        help="devices: groups that share the slots x devices that share each layer",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", type=float, default=0.0, help="0: the best token")
    command.add_argument("--top-k", type=int, default=0, help="draw from the best K; 0: from all")
    command.add_argument(
        "--top-p", type=float, default=1.0, help="from the best that hold this probability"
    )
    command.add_argument(
        "--min-p", type=float, default=0.0, help="without those below this share of the best"
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="over 1: tokens already there score lower",
    )
    command.add_argument("--seed", type=int, default=0, help="of drawing")


def _sampling(args: argparse.Namespace) -> Any:
    from hovle_jax.generation.sampling import Sampling

    fields = dataclasses.fields(Sampling)
    return Sampling(**{field.name: getattr(args, field.name) for field in fields})


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")


def load(args: argparse.Namespace, model_dir: str) -> Any:
    """A model directory as an Assistant on the devices that are asked for."""
    import jax

    from hovle_jax.config import MeshConfig
    from hovle_jax.generation.chat import Assistant
    from hovle_jax.sharding import make_mesh

    sizes = args.mesh.split("x")
    if len(sizes) != 2 or not all(s.isdecimal() and int(s) for s in sizes):
        raise UserError(f"--mesh must be two numbers, as 2x4, not {args.mesh}")
    data, tensor = map(int, sizes)
    devices = jax.local_devices()
    if data * tensor > len(devices):
        raise UserError(f"--mesh {args.mesh} needs {data * tensor} devices, found {len(devices)}")
    mesh = None
    if data * tensor > 1:
        mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), devices[: data * tensor])
    return Assistant.load(model_dir, int8_weights=args.int8_weights, mesh=mesh)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Assistant.engine`, but for slots, context and tiles."""
    if args.prefix_mib < 0:
        raise UserError("--prefix-mib must be 0 or more")
    return {"int8_cache": args.int8_kv, "prefix_bytes": args.prefix_mib * 2**20}


def _chat(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("chat", rest)
    from hovle_jax.generation.chat import Assistant, Chat, first_question, interactive

    _at_least_one(args, "max_new_tokens")
    sampling = _sampling(args)
    assistant = Assistant.load(args.model_dir)
    if args.prompt is None:
        chat = Chat(assistant, args.image, args.max_new_tokens, sampling, PREFIX_MIB * 2**20)
        interactive(chat)
    else:
        question = first_question(args.prompt, args.image)
        print(assistant.answer([question], max_new=args.max_new_tokens, sampling=sampling)[0])
    return 0


def _generate(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("generate", rest)
    import jax

    from hovle_jax.generation import batch
    from hovle_jax.run import hosts

    _at_least_one(args, "max_new_tokens", "slots", "context")
    check_local(args.input, "--input")
    check_local(args.output, "--output")
    settings = batch.Settings(args.max_new_tokens, _sampling(args), tuple(filter(None, args.stop)))
    hosts.connect(
        args.coordinator, args.processes, args.process, args.start_timeout, args.dead_after
    )
    host, count = share = jax.process_index(), jax.process_count()
    try:
        barrier = hosts.DataBarrier(PATIENCE)
        with barrier.together():
            target = batch.part_of(args.output, *share)
            if target != args.output:
                batch.make_part(target)
        if target == args.output:  # alone, or what all have written is there
            share = 0, 1
            if host:
                return 0
        else:
            with barrier.together():
                if host == 0:
                    batch.check_parts(args.output, count)
        assistant = load(args, args.model_dir)
        made_with = dataclasses.asdict(settings)
        made_with |= made_with.pop("sampling") | {
            "weights": batch.fingerprint(assistant.params),
            "int8_weights": args.int8_weights,
            "int8_kv": args.int8_kv,
        }
        if share[1] > 1:
            barrier.agree(made_with)
        with barrier.together() if share[1] > 1 else contextlib.nullcontext():
            if host == 0:
                batch.check_settings(args.output, count, made_with)
        engine = assistant.engine(slots=args.slots, context=args.context, **engine_options(args))
        before, now, errors = batch.answer_file(
            assistant, engine, args.input, target, settings, share, args.retry_errors
        )
        was = f" ({before} were there)" if before else ""
        print(f"{target}: {now} rows{was}, {errors} of them errors")
        if share[1] > 1:
            errors = sum(map(int, barrier.gather(str(errors))))
            if host == 0:
                batch.join(args.output, count)
                print(f"{args.output}: the rows of {count} hosts")
    except Exception as error:
        hosts.fail(error)
        raise
    return 1 if errors else 0


def _serve(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("serve", rest)
    uvicorn = require("uvicorn", "serve", "hovle serve")
    web = require("hovle_jax.serve.app", "serve", "hovle serve")
    from hovle_jax.serve.protocol import Limits

    positive = "slots context queue drain max_body_mib max_pixels max_tiles max_new_tokens"
    _at_least_one(args, *positive.split())
    if not args.timeout > 0:
        raise UserError("--timeout must be over 0 seconds")
    limits = Limits(
        body_bytes=args.max_body_mib * 2**20,
        image_pixels=args.max_pixels,
        tiles=args.max_tiles,
        new_tokens=args.max_new_tokens,
        queue=args.queue,
        seconds=args.timeout,
        images_first=args.images_first,
    )
    assistant = load(args, args.model_dir)
    engine = assistant.engine(
        slots=args.slots, context=args.context, tiles=args.max_tiles, **engine_options(args)
    )
    name = args.name or Path(args.model_dir).resolve().name
    key = os.environ.get("HOVLE_API_KEY", "")
    app = web.create_app(assistant, engine, name=name, limits=limits, api_key=key)
    print(f"{name} at http://{args.host}:{args.port}/v1", flush=True)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=args.drain,
        timeout_keep_alive=75,  # longer than clients keep idle connections: they close first
    )
    return 0
