"""The command line: rnnfast train | generate | info | bench | tune."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import count, islice
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser

import rnnfast
from rnnfast.bench import command as bench
from rnnfast.errors import UserError, note, reason
from rnnfast.lm import checkpoint
from rnnfast.lm.config import TrainConfig, flag, pick_device
from rnnfast.lm.generate import encode_prefix, generate, render
from rnnfast.lm.train import argument, train

TRAIN = """Train a language model. With no argument this is the setting of the d2l chapter: a tanh RNN of 512 units on
the first 10,000 characters of The Time Machine. Ctrl-C saves the run."""
GENERATE = "Let a trained model continue a prefix."
TUNE = """Measure the GPU backends on this card, each compared with torch.nn before both are timed, and keep the
table that `auto` follows from then on. Continues where an earlier run stopped."""
INFO = "Show a checkpoint's settings and parameters, or the backends that this machine has."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 2 for an error that the user can correct, reported in one line on stderr; 128 + the signal's
        number for a run that was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a question mark
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)  # what is left in a buffer fails here, where it is told
        return status
    except UserError as error:
        note(f"error: {error}")
        return 2
    except KeyboardInterrupt as error:
        note(str(error) or "interrupted")
        return 128 + getattr(error, "signum", 2)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        return 0
    except OSError as error:  # our own files tell more; this is the terminal, or a full disk behind `>`
        note(f"error: {error}" if error.filename else f"error: cannot write the output: {reason(error)}")
        return 2
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Discard output that could not be written: at its end Python would try again, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    parser = ArgumentParser(prog="rnnfast", description=rnnfast.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rnnfast {rnnfast.__version__}")
    verbs = parser.add_subcommands(required=True, dest="verb")
    train_parser = _train_parser()
    verbs.add_subcommand("train", train_parser, help=TRAIN.split(".")[0])
    verbs.add_subcommand("generate", _generate_parser(), help=GENERATE.rstrip("."))
    verbs.add_subcommand("info", _info_parser(), help=INFO.rstrip("."))
    verbs.add_subcommand("bench", bench.parser(), help=bench.DESCRIPTION.split(",")[0])
    verbs.add_subcommand("tune", _tune_parser(), help=TUNE.split(",")[0])
    if not argv:
        raise UserError("give a command: train, generate, info, bench or tune; rnnfast --help says what they do")
    argv = _config_first(argv)
    flags = {argument.split("=")[0] for argument in argv}
    if {"--print_config", "--resume"} <= flags:
        raise UserError(
            "--print_config prints a new run's settings; those of the run to be resumed are its config.json"
        )
    arguments = _parse(parser, argv)
    options = arguments[arguments.verb]
    if arguments.verb == "train" and options.resume is not None:
        # What the run was started with are the defaults of going on with it.
        saved = checkpoint.load(options.resume)
        train_parser.set_defaults(TrainConfig.from_json(saved.config, options.resume).to_json())
        options = _parse(parser, argv).train
    run = {"train": _train, "generate": _generate, "info": _info, "bench": bench.run, "tune": _tune}[arguments.verb]
    return run(options)


def _config_first(argv: list[str]) -> list[str]:
    """The parser goes by the order of arguments, but train's flags override the --config file wherever they stand."""
    if argv[:1] != ["train"]:
        return argv
    files, others, words = [], [], iter(argv)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name == "--config":
            files += [word, *islice(words, not has_value)]
        else:
            others.append(word)
    return [*others[:1], *files, *others[1:]]


def _config_file(argv: list[str]) -> str:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if name == "--config":
            return value if has_value else following
    return ""


def _parse(parser: ArgumentParser, argv: list[str]) -> Any:
    try:
        return parser.parse_args(argv)
    except (ArgumentError, argparse.ArgumentError) as error:
        message = re.sub(r'Parser key "(\w+)"', lambda match: flag(match[1]), " ".join(str(error).split()))
        if message.startswith("Unexpected config:"):
            raise UserError("the --config file holds no settings: write lines such as hidden_size: 256") from error
        message = re.sub(r"<class '(\w+)'>|typing\.", lambda match: match[1] or "", message)
        message = message.replace('"<unicode string>"', "it")  # the file, which the message does not name
        message = NO_SETTING.sub(lambda match: f"there is no setting '{match[1]}'", message)
        if message.startswith(("Problems parsing config:", "there is no setting")):
            message = f"the --config file {_config_file(argv)}: {message.removeprefix('Problems parsing config: ')}"
        message = MISSING.sub(lambda match: match[1] + match[2].upper(), message)
        message = NO_NUMBER.sub(
            lambda match: f"expected {NUMBERS[match[1]]}, got {match[2].strip() or 'none'}", message
        )
        raise UserError(message) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the --config file is not UTF-8 ({error}): convert it with iconv -f latin1 -t utf-8"
        ) from error


# It names a positional argument of ours by the verb and in lower case, the usage in capitals.
MISSING = re.compile(r"(arguments are required: )\w+\.(\w+)")
NO_SETTING = re.compile(r"Subcommand 'train' does not accept option '(\w+)'")
# What jsonargparse says of a value that is no number, or, where none may be given, of a union of types.
NO_NUMBER = re.compile(r"(?:Expected a |Does not validate .* Subtypes: \[)(int|float)\b.* value:(.*)")
NUMBERS = {"int": "a whole number", "float": "a number"}


def _parser(verb: str, description: str) -> ArgumentParser:
    usage = f"rnnfast {verb} [options]"
    return ArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)


def _train_parser() -> ArgumentParser:
    parser = _parser("train", TRAIN)
    parser.add_argument("--config", action="config", help="YAML or JSON file that sets any of the following")
    hints = get_type_hints(TrainConfig)
    for setting in fields(TrainConfig):
        help = setting.metadata["help"]
        if hints[setting.name] is bool:
            parser.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, default=False, help=help)
        else:
            # Of `str | None` the parser would read a name such as null, ~ or #notes as YAML, which means none by it.
            kind = str if hints[setting.name] == str | None else hints[setting.name]
            parser.add_argument(flag(setting.name), type=kind, default=setting.default, help=help)
    parser.add_argument("--out", type=str, metavar="DIR", help="the run's folder (default: a new one in runs/)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that --out, or the folder of a --resume FILE, holds"
    )
    parser.add_argument(
        "--resume", type=str, metavar="DIR", help="continue the run in this folder, or from this checkpoint file"
    )
    return parser


def _train(options: Any) -> int:
    config = TrainConfig(**{setting.name: options[setting.name] for setting in fields(TrainConfig)})
    if options.resume is not None and options.out is not None:
        raise UserError("--resume continues in the run's own folder: leave --out out")
    if options.out == "":
        raise UserError("--out names no folder: give one, or leave --out out")
    resume = options.resume is not None
    out = options.resume if resume else options.out if options.out is not None else _new_folder(config)
    try:
        result = train(config, out, resume=resume, overwrite=options.overwrite)
    finally:
        if not resume and options.out is None:
            with suppress(OSError):  # it is not empty, then: the run has begun
                Path(out).rmdir()
    folder = checkpoint.find(out).parent
    device = next(result.model.parameters()).device
    print(f"perplexity {result.perplexity:.2f}, {result.tokens_per_second:,.0f} tokens/s on {device}, kept in {folder}")
    if not config.bidirectional:  # which cannot generate
        prefix = f"{'=' if config.prefix.startswith('-') else ' '}{quote(config.prefix)}"
        print(f"next: rnnfast generate {argument(folder)} --prefix{prefix}")
    return 0


def _new_folder(config: TrainConfig) -> Path:
    """Make the first free runs/<text>-<model>, -2, -3, ..."""
    text = Path(config.corpus).stem if config.corpus is not None else "text"
    name = f"{text}-{'scratch' if config.scratch else config.cell}"
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # or made this moment by a run that starts beside this one
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {reason(error)}; choose another with --out") from error
    return folder


def _generate_parser() -> ArgumentParser:
    parser = _parser("generate CHECKPOINT", GENERATE)
    parser.add_argument("checkpoint", type=str, help="a run's folder, or its checkpoint.safetensors")
    parser.add_argument("--prefix", type=str, default="time traveller", help="the text to continue")
    parser.add_argument("--num-chars", type=int, default=50, help="characters to write (words, for a model of words)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest; 1 draws as trained")
    parser.add_argument("--top-k", type=int | None, help="draw among the k likeliest only")
    parser.add_argument("--top-p", type=float | None, help="draw among the likeliest that have this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--device", type=str, default="cpu", help="auto, cpu, cuda, ...")
    parser.add_argument("--backend", type=str, default="auto", help="rnnfast's backend")
    return parser


def _generate(options: Any) -> int:
    model, vocab, config, _ = checkpoint.load_model(options.checkpoint, options.device, options.backend)
    ids = encode_prefix(options.prefix, vocab, config.tokens, tell=False)
    written = generate(
        model,
        ids,
        options.num_chars,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    encode_prefix(options.prefix, vocab, config.tokens)  # its note comes once all options are found right
    print(options.prefix, end="", flush=True)
    for piece in render(written, vocab, config.tokens):
        print(piece, end="", flush=True)
    print()
    return 0


def _info_parser() -> ArgumentParser:
    parser = _parser("info [CHECKPOINT]", INFO)
    parser.add_argument("checkpoint", type=str, nargs="?", help="a run's folder, or its checkpoint.safetensors")
    return parser


def _info(options: Any) -> int:
    found = None if options.checkpoint is None else checkpoint.load_model(options.checkpoint, "cpu", "auto")
    print(f"rnnfast   {rnnfast.__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    device = pick_device("auto")
    print(f"device    {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}")
    if found is None:
        print(f"\n{rnnfast.backends()}")
        return 0
    model, vocab, config, progress = found
    print(f"text      {config.corpus}, {len(vocab)} {config.tokens}s")
    print(f"trained   {progress.get('epoch')} epochs, {progress.get('tokens')} tokens\n")
    rows = [(name, "x".join(map(str, p.shape)), f"{p.numel():,}") for name, p in model.named_parameters()]
    rows = [("parameter", "shape", "numbers"), *rows, ("total", "", f"{sum(p.numel() for p in model.parameters()):,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, shape, numbers in rows:
        print(f"{name:{widths[0]}}  {shape:>{widths[1]}}  {numbers:>{widths[2]}}")
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    print("\nsettings other than the defaults: " + (", ".join(f"{k}={v}" for k, v in changed.items()) or "none"))
    return 0


def _tune_parser() -> ArgumentParser:
    parser = _parser("tune", TUNE)
    parser.add_argument("--minutes", type=float, default=5.0, help="start no new size after this")
    parser.add_argument("--backends", type=Literal["cuda", "triton"], nargs="+", help="measure these (default: all)")
    parser.add_argument("--device", type=str, help="cuda:1, ... (default: the current GPU)")
    parser.add_argument("--anew", action="store_true", help="discard what an earlier run measured")
    return parser


def _tune(options: Any) -> int:
    try:
        table = rnnfast.tune(options.device, options.minutes, options.backends, options.anew)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    fastest = ", ".join(f"{name} in {table.wins(name)[0]}" for name in ("cuda", "triton"))
    print(f"of {table.wins('torch')[1]} calls measured on {table.identity.card} fastest: {fastest}; auto follows this")
    return 0
