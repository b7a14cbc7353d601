"""From the command line to runs, their folders and one comparison."""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import flags

from fedgalore_jax.config import Config

USAGE = """python run.py [--method=fedgalore,fedavg,...] [--flag=value ...]
python run.py --evaluate=DIR --task=TASK   the metrics of a saved model on the test split, as JSON
python run.py --predict=FILE --model=DIR --task=TASK   its answer to every sample of a file, as JSON lines
python run.py --plan [--flag=value ...]    what the run would take, and nothing is run
python run.py --list | --help"""


def reuse_programs() -> None:
    """Keeps compiled programs in the user's cache, where JAX was given no other place: a run that goes on, or
    that differs in nothing but numbers, does not compile again."""
    import jax

    from fedgalore_jax.data.cache import default_cache

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_cache() / "programs"))


def main(argv: list[str] | None = None) -> None:
    """Runs what the flags say."""
    guarded(lambda: _main(sys.argv if argv is None else argv))


def guarded(program: Callable[[], None]) -> None:
    """Runs a program. Bad input is one line on stderr and exit status 2; Ctrl-C gives 130.

    Of several processes, one that fails does not wait for the others, which then fail too.
    """
    try:
        program()
    except KeyboardInterrupt as interrupt:
        _stop(f"interrupted; every file and every line that was written is whole{interrupt}", 130)
    except (flags.Error, ValueError, OSError, ImportError, FloatingPointError) as error:
        _stop(str(error), 2)
    except MemoryError as error:
        _stop(f"out of memory ({error}): lower --batch_size or --local_steps, or set --chunk", 2)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _stop(f"out of device memory ({error}): lower --batch_size or set --chunk", 2)


def _stop(line: str, status: int, *, together: bool = False) -> None:
    sys.stdout.flush()
    print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    if not together and "jax" in sys.modules:
        from fedgalore_jax import hosts

        hosts.leave(status)
    sys.exit(status)


def define(values: flags.FlagValues) -> None:
    """Defines all flags of `run.py` on `values`: those of a run, and what else may be asked."""
    from experiments import flags as our_flags

    our_flags.define(values)
    flags.DEFINE_string("evaluate", None, "a saved model's directory: print its metrics", flag_values=values)
    flags.DEFINE_string("predict", None, "a file that --model answers, a line each", flag_values=values)
    flags.DEFINE_boolean(
        "distributed",
        False,
        "this is one of several processes, found by themselves on TPU pods and under SLURM, else by the three"
        " flags that follow",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", None, "address:port of the first process, as the others see it", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_boolean(
        "plan",
        False,
        "say what the run would take: bytes, operations, memory; nothing runs",
        flag_values=values,
    )
    flags.DEFINE_boolean("list", False, "list tasks, methods and their options", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this", short_name="h", flag_values=values)


def _main(argv: list[str]) -> None:
    from experiments import flags as our_flags

    values = flags.FlagValues()
    define(values)
    rest = values(argv)
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}: flags look like --name=value")
    if values.help:
        print(f"{USAGE}\n\n{values.main_module_help() or values.get_help()}")
        return
    if values.list:
        print(listing())
        return
    asked = [name for name in ("plan", "evaluate", "predict") if values[name].value not in (None, False)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]} are two runs: give one of them")
    if asked and not values.plan:
        _use(values)
        return
    if values.out_dir is None and not values.resume and not values.plan:
        if values.distributed:
            raise ValueError("distributed needs --out_dir: each process would make up a folder of its own")
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        methods = "-".join(values.method) if len(values.method) <= 4 else f"{len(values.method)}-methods"
        values.out_dir = f"runs/{values.task}-{methods}-s{values.seed}-{stamp}"
    runs = our_flags.configs(values)
    _join(values)
    if values.plan:
        _plan(runs)
        return

    from fedgalore_jax.train import Preempted

    out = pathlib.Path(values.out_dir)
    hint = f"go on with the same command and --resume --out_dir={out}"
    try:
        with _terminated() as stop:
            _train(runs, out, stop)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; {hint}" if any(out.glob("**/digests.json")) else "") from None
    except Preempted as error:
        _stop(f"{error}; {hint}", os.EX_TEMPFAIL, together=True)


def _join(values: flags.FlagValues) -> None:
    """Joins the other processes, where there are any; but for the first they say nothing."""
    from fedgalore_jax import hosts

    address = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    if values.distributed:
        hosts.join(*address.values())
        if not hosts.first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives
    elif given := [name for name, value in address.items() if value is not None]:
        raise ValueError(f"{given[0]}={address[given[0]]!r} has no effect: give --distributed too")


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which then ends nothing by itself.

    Asking also raises what Ctrl-C raised, where that was lost: Python drops it inside of callbacks of JAX's.
    """
    told, interrupted = threading.Event(), threading.Event()

    def interrupt(number, frame):
        interrupted.set()
        signal.default_int_handler(number, frame)

    def asked() -> bool:
        if interrupted.is_set():
            raise KeyboardInterrupt
        return told.is_set()

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: told.set())}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plan(runs: list[Config]) -> None:
    """Says what one config would take, or compares several."""
    from experiments import report
    from fedgalore_jax import prepare
    from fedgalore_jax.forecast import forecast

    first = prepare.prepare(runs[0])
    print(prepare.describe(first))
    others = (prepare.prepare(config, beside=first) for config in runs[1:])
    report.plans([forecast(prepared) for prepared in (first, *others)])


def _train(runs: list[Config], out: pathlib.Path, stop: Callable[[], bool]) -> None:
    """Runs one config or compares several; with `--resume`, what is left of them."""
    from experiments import report
    from fedgalore_jax import hosts, journal, prepare, train
    from fedgalore_jax.data.partition import counts
    from fedgalore_jax.folder import CONFIG, SUMMARY, claim, refuse_used

    several, resume = len(runs) > 1, runs[0].resume
    if several and (out / CONFIG).exists():
        raise ValueError(f"out_dir={str(out)!r} is in use by a run of one method: choose a new folder")
    begun = resume and any((out / config.method).exists() for config in runs)
    if several and not begun and hosts.first():
        refuse_used(out, resume=resume)
    found = [journal.finished(config) for config in runs]
    if all(found) and (out / SUMMARY).exists():
        print(f"{out} is complete: nothing is left to do")
        return
    # All are sound before the first begins.
    ready: list[prepare.Prepared | None] = []
    for config, done in zip(runs, found, strict=True):
        beside = next(filter(None, ready), None)
        ready.append(None if done else prepare.prepare(config, beside=beside))
    if other := next(filter(None, ready), None):
        data = {journal.DATA: other.digests[journal.DATA]}
        for i, config in enumerate(runs):
            if found[i] and journal.changes(config, data):  # one comparison is of one data set
                found[i], ready[i] = None, prepare.prepare(config, beside=other)

    def train_one(prepared: prepare.Prepared) -> train.Result:
        dataset, folder = prepared.loaded.dataset, pathlib.Path(str(prepared.config.out_dir))
        clients = counts(prepared.federation.parts, dataset.classes)

        def draw(result: train.Result) -> None:
            report.heat_map(folder / "clients.png", clients, dataset.label_names)
            report.curves(folder, [result])

        if stop():
            raise train.Preempted(f"told to end, before {prepared.config.method}")
        return train.execute(prepared, stop=stop, draw=draw)

    with claim(out, resume=resume) if several and hosts.first() else contextlib.nullcontext():
        results = []
        for config, done, prepared in zip(runs, found, ready, strict=True):
            results.append(train_one(prepared) if prepared else done)
            print(report.result_line(results[-1], pathlib.Path(str(config.out_dir))))
        if several and hosts.first():
            report.compare(out, results)


def _use(values: flags.FlagValues) -> None:
    """Asks a saved model instead of training one."""
    from experiments import flags as our_flags
    from fedgalore_jax import saved

    if values.out_dir is not None:
        raise ValueError(f"out_dir={values.out_dir!r}: --evaluate and --predict write to standard output")
    for name in ("mesh", "distributed"):
        if values[name].value:
            raise ValueError(f"{name} has no effect: --evaluate and --predict run on one device")
    for name in ("evaluate", "predict"):
        if values[name].value == "":
            raise ValueError(f"{name}='' is not usable: give a value, or leave it out")
    config = our_flags.configs(values)[0]
    note = functools.partial(print, file=sys.stderr)  # what asks reads answers alone on standard output
    if values.evaluate is not None:
        print(json.dumps(saved.evaluate(dataclasses.replace(config, model=values.evaluate), say=note)))
        return
    if config.model is None:
        raise ValueError("predict needs --model, the directory of a saved model")
    for answer in saved.predict(config, values.predict, say=note):
        print(json.dumps(answer, ensure_ascii=False))


def listing() -> str:
    """Tasks, methods and options."""
    from fedgalore_jax import strategies, tasks
    from fedgalore_jax.prepare import BY_FLAG
    from fedgalore_jax.strategies.base import Common

    lines = [f"tasks: {', '.join(tasks.names())}"]
    lines += [f"--method={name}: {', '.join(methods)}" for name, methods in strategies.groups().items()]
    lines.append("methods and their own options (--opt name=value):")
    for name in strategies.names():
        own = ", ".join(f"{k}={v}" for k, v in strategies.options(name).items())
        lines.append(f"  {name}: {own or '-'}")
    shared = ", ".join(field.name for field in dataclasses.fields(Common) if field.name not in BY_FLAG)
    return "\n".join([*lines, f"options of every method: {shared}"])
