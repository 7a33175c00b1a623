"""A round of a low-rank adapter (LoRA) in MiniLM on one node with 20 tasks, against a plain loop written with torch and peft.

Rank 8 on query and value: 73,728 of 22.7 million numbers are trained. A task has five classes with five sentences each to adapt
to and as many to measure on, padded to 16 tokens. "protonet": prototypes; "fomaml": three inner steps, and a layer to the
outputs. The loop takes the encoder as transformers loads it by default, with peft's adapter, and goes task by task with
autograd. Both sides compute the mean meta-gradient over the tasks from the same token ids, which is checked first.

Repetitions alternate between the two sides in one process with one thread, and ratios are taken within a repetition, so that
other work on the machine affects both alike. Memory is the highest resident memory of a fresh process that computes two rounds,
with all that is imported.

    python -m benchmarks.adapter
    python -m benchmarks.adapter --random        # weights of the same form, drawn: without the package

Needs the package of MiniLM, see `benchmarks/pretrained.py`.
"""

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pretrained import minilm
from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.flower import message_assembly
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

WAYS, SHOTS, LENGTH, RANK, ALPHA = 5, 5, 16, 8, 16.0
STEPS, LR, TEMPERATURE = 3, 0.01, 1.0
ALGORITHMS = ("protonet", "fomaml")
CHUNK = 4
"""Tasks at once: the setting `chunk-size`. More need more memory, and are no faster: the products are large already."""
MOST_MEGABYTES = 2000.0
TOLERANCE = 1e-3
Side = Callable[[], Params]


def main() -> None:
    claim = "a round of a LoRA of MiniLM with 20 tasks takes less than 2 GB, and no longer than a plain loop of torch and peft"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter", description=claim)
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="at least 7; default: %(default)s")
    parser.add_argument("--tasks", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--chunk-size", type=int, default=CHUNK, metavar="N", help="default: %(default)s")
    parser.add_argument("--random", action="store_true", help="drawn weights of MiniLM's form, without its package")
    given = parser.parse_args()
    if given.repetitions < 7:
        parser.error("--repetitions must be at least 7")
    torch.set_num_threads(1)
    message_assembly.keep()  # for both sides, as `quickbloom run` does
    with tempfile.TemporaryDirectory() as folder:
        place = drawn(Path(folder)) if given.random else minilm()
        cases = [compare(name, place, given.tasks, given.chunk_size, given.repetitions) for name in ALGORITHMS]
        for case in cases:
            asked = case["algorithm"], str(place), given.tasks
            case["megabytes"] = {"engine": peak(*asked, given.chunk_size), "loop": peak(*asked, 0)}
    result: dict[str, Any] = {"schema": 1, "benchmark": "adapter", "claim": claim, "cases": cases, "goals": []}
    result |= {"tasks": given.tasks, "chunk_size": given.chunk_size, "random_weights": given.random}
    result |= {"machine": machine(), "versions": _versions(), "commit": commit(), "date": today()}
    for case in cases:
        name, most, ratio = case["algorithm"], case["megabytes"]["engine"], case["ratio"]["median"]
        goal(result, f"{name}: peak memory below {MOST_MEGABYTES:g} MB", most, met=most < MOST_MEGABYTES)
        goal(result, f"{name}: seconds of a round over those of the loop at most 1", ratio, met=ratio <= 1)
    finish(result, table(cases))


def compare(name: str, place: Path, tasks: int, chunk: int, repetitions: int) -> dict[str, Any]:
    """Return seconds of both sides and their ratios. Raises SystemExit if they do not compute the same."""
    engine, loop = sides(name, place, tasks, chunk)
    apart = difference(engine(), loop())
    if apart > TOLERANCE:
        raise SystemExit(f"{name}: the two sides differ by {apart:.2g} of the gradient's length")
    seconds: dict[str, list[float]] = {"engine": [], "loop": []}
    for repetition in range(repetitions):
        order = [("engine", engine), ("loop", loop)][:: 1 if repetition % 2 else -1]
        for what, side in order:
            seconds[what].append(_timed(side))
        say(f"{name}, {repetition + 1} of {repetitions}: {seconds['engine'][-1]:.2f} s, the loop {seconds['loop'][-1]:.2f} s")
    ratios = [one / other for one, other in zip(seconds["engine"], seconds["loop"], strict=True)]
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    ratio = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"algorithm": name, "seconds": medians, "ratio": ratio, "difference": apart, "repetitions": repetitions}


def sides(name: str, place: Path, tasks: int, chunk: int) -> tuple[Side, Side]:
    """Return the two sides, each of which computes the mean meta-gradient of the same tasks from the same start."""
    algorithm = built(name, place)
    meta = start(algorithm)
    data = [task(k, _vocabulary(place)) for k in range(tasks)]
    work = [TaskWork(one, generator(0, k)) for k, one in enumerate(data)]
    loop = PlainLoop(place, meta, name)
    return lambda: run_round(algorithm, meta, work, chunk).gradient, lambda: loop.round(data)


def built(name: str, place: Path) -> Algorithm:
    """Return the algorithm on the adapter in the encoder of a directory."""
    flat: dict[str, Any] = {"algorithm": name, "model": "transformer", "transformer.directory": str(place)}
    flat |= {"transformer.lora-rank": RANK, "transformer.lora-alpha": ALPHA, "transformer.lora-targets": "query,value"}
    flat |= {"fomaml.inner-steps": STEPS, "fomaml.inner-lr": LR, "protonet.temperature": TEMPERATURE}
    return build_algorithm(
        parse_run_config(flat).resolved(), DataSpec("classification", (LENGTH,), WAYS, tokens=_vocabulary(place))
    )


def start(algorithm: Algorithm) -> Params:
    """Return an adapter that does something: a fresh one is zero, and so is half of its gradient."""
    draw = torch.Generator().manual_seed(0)
    return {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in algorithm.init().items()}


def task(number: int, vocabulary: int) -> TaskData:
    """Return sentences of 5 to 14 tokens, padded to 16, in support and query."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(min(1000, vocabulary // 2), vocabulary, (2 * WAYS * SHOTS, LENGTH), generator=draw)
    lengths = torch.randint(5, 15, (len(ids), 1), generator=draw)
    ids = torch.where(torch.arange(LENGTH) < lengths, ids, 0)
    y = torch.arange(len(ids)) % WAYS
    half = WAYS * SHOTS
    support, query = Batch.of(ids[:half], y[:half]), Batch.of(ids[half:], y[half:])
    return TaskData(support, query, query)


class PlainLoop:
    """The same work as one would write it: one module, one task after the other, autograd."""

    def __init__(self, place: Path, meta: Params, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
            import transformers

            transformers.utils.logging.disable_progress_bar()
            self.encoder: Any = transformers.AutoModel.from_pretrained(place, local_files_only=True, dtype=torch.float32).eval()
            settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["query", "value"])
            peft.inject_adapter_in_model(settings, self.encoder)
        self.encoder.pooler = None
        self.head = nn.Linear(self.encoder.config.hidden_size, WAYS) if name == "fomaml" else None
        named = {f"encoder.{one}": value for one, value in self.encoder.named_parameters() if "lora_" in one}
        named |= {f"head.{one}": value for one, value in self.head.named_parameters()} if self.head else {}
        self.trained = {one: named[one] for one in meta}
        for value in self.encoder.parameters():
            value.requires_grad_(False)
        for value in self.trained.values():
            value.requires_grad_(True)
        self.meta = meta

    def round(self, data: list[TaskData]) -> Params:
        """Return the mean meta-gradient over the tasks."""
        total = {name: torch.zeros_like(value) for name, value in self.meta.items()}
        for one in data:
            self._set(self.meta)
            if self.head is not None:
                self._descend(one.support)
                loss = functional.cross_entropy(self.head(self.embed(one.query.x)), one.query.y)
            else:
                loss = self._prototypes(one)
            for sum_of, slope in zip(total.values(), self._gradient(loss), strict=True):
                sum_of += slope
        return {name: value / len(data) for name, value in total.items()}

    def embed(self, ids: Tensor) -> Tensor:
        """Return the mean of the last states over the tokens that are no padding."""
        mask = (ids != self.encoder.config.pad_token_id).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        found: Tensor = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return found

    def _prototypes(self, one: TaskData) -> Tensor:
        embedded = self.embed(one.support.x)
        prototypes = torch.stack([embedded[one.support.y == label].mean(dim=0) for label in range(WAYS)])
        distances = (self.embed(one.query.x)[:, None] - prototypes).square().sum(dim=-1)
        return functional.cross_entropy(-distances / TEMPERATURE, one.query.y)

    def _descend(self, support: Batch) -> None:
        assert self.head is not None
        for _ in range(STEPS):
            slopes = self._gradient(functional.cross_entropy(self.head(self.embed(support.x)), support.y))
            with torch.no_grad():
                for value, slope in zip(self.trained.values(), slopes, strict=True):
                    value -= LR * slope

    def _gradient(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.trained.values()))

    def _set(self, params: Params) -> None:
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(params[name])


def difference(one: Params, other: Params) -> float:
    """Return the length of the difference over that of the second."""
    apart = torch.cat([(one[name] - other[name]).flatten() for name in other])
    return float(apart.norm() / torch.cat([value.flatten() for value in other.values()]).norm())


def drawn(folder: Path) -> Path:
    """Write an encoder of MiniLM's form with drawn weights; return its directory."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig(vocab_size=30_522, **sizes)).save_pretrained(folder)
    return folder


def peak(name: str, place: str, tasks: int, chunk: int) -> float:
    """Return the highest resident memory in MB of a fresh process that computes two rounds. `chunk`: 0: by the loop."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_highest, name, place, tasks, chunk).result()


def _highest(name: str, place: str, tasks: int, chunk: int) -> float:
    torch.set_num_threads(1)
    message_assembly.keep()
    algorithm = built(name, Path(place))
    meta = start(algorithm)
    data = [task(k, _vocabulary(Path(place))) for k in range(tasks)]
    loop = None if chunk else PlainLoop(Path(place), meta, name)
    for _ in range(2):
        if loop is not None:
            loop.round(data)
        else:
            run_round(algorithm, meta, [TaskWork(one, generator(0, k)) for k, one in enumerate(data)], chunk)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM"))


def _vocabulary(place: Path) -> int:
    import transformers

    return int(transformers.AutoConfig.from_pretrained(place, local_files_only=True).vocab_size)


def _timed(side: Side) -> float:
    gc.collect()
    before = time.perf_counter()
    side()
    return time.perf_counter() - before


def _versions() -> dict[str, str]:
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def table(cases: list[dict[str, Any]]) -> str:
    """Return both sides as a Markdown table."""
    lines = ["| algorithm | s a round | loop, s | ratio (least to most) | MB | loop, MB |", "|---|---:|---:|---:|---:|---:|"]
    for case in cases:
        seconds, ratio, memory = case["seconds"], case["ratio"], case["megabytes"]
        lines.append(
            f"| {case['algorithm']} | {seconds['engine']:.2f} | {seconds['loop']:.2f} | {ratio['median']:.2f} "
            f"({ratio['least']:.2f} to {ratio['most']:.2f}) | {memory['engine']:.0f} | {memory['loop']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
