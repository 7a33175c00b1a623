"""Worker of `benchmarks.peers`: a process that computes the common workload with the requested library.

It imports nothing of this project except for the side `engine`, so that any Python with the library
can run it. Protocol: argv is the workload's file and the names of the sides; a line on stdin is the
name of a side, a line on stdout its times as JSON. The final parameters of a side are written
beside the workload's file, to check that all agree.
"""

import contextlib
import copy
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Arrays = dict[str, np.ndarray]
Round = Callable[[Any, int], Any]
"""(global parameters, number of the round) -> global parameters after it."""
LR, META_LR = 0.05, 0.5
SHOTS, META_STEPS = 10, 5
NAMES = ("1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias")


def main() -> None:
    path, *names = sys.argv[1:]
    # One core for every side, however many threads a library starts.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    work = dict(np.load(path))
    sides: dict[str, Callable[[], Arrays]] = {}
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        started = time.perf_counter()
        try:
            sides[name] = prepare(name, work)
            end = sides[name]()  # compiles and warms up, too
        except Exception as error:
            report[name] = {"missing": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        np.savez(f"{path}.{name}.npz", **end)  # type: ignore[arg-type]
        report[name] = {"first": time.perf_counter() - started, "versions": versions(name)}
    print(json.dumps(report), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        sides[line.strip()]()
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def versions(side: str) -> dict[str, str]:
    libraries = {
        **{"engine": ["torch"], "plain-optim": ["torch"], "plain-grad": ["torch"]},
        **{"jax": ["jax"], "jax-given": ["jax"], "fedjax": ["jax", "fedjax"]},
    }
    result = {}
    for library in libraries.get(side) or libraries.get(side.partition("-")[0], ["torch", side]):
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[library] = metadata.version(library)
    return result


def prepare(name: str, work: Arrays) -> Callable[[], Arrays]:
    """Return a function that computes all rounds of one side, from the common start to the final parameters."""
    begin, one_round, finish = SIDES[name](work)

    def rounds() -> Arrays:
        theta = begin()
        for number in range(len(work["clients"])):
            theta = one_round(theta, number)
        end: Arrays = finish(theta)
        return end

    return rounds


def start(work: Arrays) -> Arrays:
    return {name: work[name] for name in NAMES}


class Digest(ISeedSequence):
    """Copy of `_Digest` in `common.randomness`, which the other libraries' Pythons lack."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return self._words


def minibatches(work: Arrays, number: int) -> np.ndarray:
    """Return [clients, steps, batch] rows of round `number`. Every side draws them anew, as the engine does."""
    _, _, steps, size = work["rows"].shape
    num_rows = work["x"].shape[1]
    per_epoch = num_rows // size
    result = []
    for k in work["clients"][number]:
        text = "\x1f".join(("0", "peers", str(number), str(k)))
        digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
        rng = np.random.Generator(np.random.PCG64(Digest(digest)))  # type: ignore[arg-type]
        walk = rng.random((-(-steps // per_epoch), num_rows)).argsort(axis=1)[:, : per_epoch * size]
        result.append(walk.reshape(-1, size)[:steps])
    return np.stack(result)


def engine(work: Arrays) -> tuple[Callable[[], Any], Round, Callable[[Any], Arrays]]:
    """Return this project's side: a node's round of `fedavg`, with drawing of minibatches and scoring of query losses."""
    import torch

    from quickbloom.common.algorithms import ALGORITHMS
    from quickbloom.common.engine.round import TaskWork, run_round
    from quickbloom.common.maths.batch import Batch, TaskData
    from quickbloom.common.maths.learner import Learner
    from quickbloom.common.maths.params import subtract
    from quickbloom.common.models.mlp import perceptron
    from quickbloom.common.randomness import generator

    torch.set_num_threads(1)
    steps, size = work["rows"].shape[2:]
    options = ALGORITHMS["fedavg"].Options.model_validate({"inner-lr": LR, "inner-steps": steps, "batch-size": size})
    features, classes = work["x"].shape[-1], len(work["5.bias"])
    algorithm = ALGORITHMS["fedavg"](options, Learner(perceptron((features, 64, 64, classes)), "classification", classes))
    half = work["x"].shape[1] // 2
    tasks = []
    for x, y in zip(torch.from_numpy(work["x"]), torch.from_numpy(work["y"]), strict=True):
        query = Batch.of(x[half:], y[half:])
        tasks.append(TaskData(Batch.of(x[:half], y[:half]), query, query))

    def one_round(theta: Any, number: int) -> Any:
        chosen = [TaskWork(tasks[k], generator(0, "peers", number, int(k))) for k in work["clients"][number]]
        return subtract(theta, run_round(algorithm, theta, chosen, chunk_size=128).gradient)

    return lambda: {n: torch.from_numpy(v) for n, v in start(work).items()}, one_round, lambda theta: to_numpy(theta)


def to_numpy(theta: Any) -> Arrays:
    return {name: value.detach().numpy() for name, value in theta.items()}


def torch_loop(work: Arrays, local: Callable[..., Any]) -> tuple[Callable[[], Any], Round, Callable[[Any], Arrays]]:
    """Return a side with one client after the other in PyTorch.

    `local(model, batches)` returns the parameters after its steps, in order.
    """
    import torch
    from torch import nn

    torch.set_num_threads(1)
    features, classes = work["x"].shape[-1], len(work["5.bias"])
    hidden = [nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    model = nn.Sequential(nn.Flatten(), *hidden)
    x, y = torch.from_numpy(work["x"]), torch.from_numpy(work["y"])

    def one_round(theta: Any, number: int) -> Any:
        model.load_state_dict(theta)
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for k, rows in zip(work["clients"][number], torch.from_numpy(minibatches(work, number)), strict=True):
            after = local(model, [(x[k, row], y[k, row]) for row in rows])
            with torch.no_grad():
                for (name, before), value in zip(theta.items(), after, strict=True):
                    total[name] += (value - before) / len(work["clients"][number])
        return {name: value + total[name] for name, value in theta.items()}

    return lambda: {n: torch.from_numpy(v) for n, v in start(work).items()}, one_round, lambda theta: to_numpy(theta)


def plain_optim(work: Arrays) -> Any:
    """Return the side with a copy of the module and torch.optim.SGD for every client, as tutorials write it."""
    import torch
    import torch.nn.functional as F

    def local(model: Any, batches: Any) -> Any:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=LR)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return list(own.parameters())

    return torch_loop(work, local)


def plain_grad(work: Arrays) -> Any:
    """Return the side with parameters as tensors and torch.autograd.grad."""
    import torch
    import torch.nn.functional as F
    from torch.func import functional_call

    def local(model: Any, batches: Any) -> Any:
        phi = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
        for x, y in batches:
            gradients = torch.autograd.grad(F.cross_entropy(functional_call(model, phi, (x,)), y), list(phi.values()))
            phi = {n: (v - LR * g).detach().requires_grad_() for (n, v), g in zip(phi.items(), gradients, strict=True)}
        return list(phi.values())

    return torch_loop(work, local)


def learn2learn(work: Arrays) -> Any:
    import learn2learn as l2l
    import torch.nn.functional as F

    def local(model: Any, batches: Any) -> Any:
        learner = l2l.algorithms.MAML(model, lr=LR, first_order=True).clone()
        for x, y in batches:
            learner.adapt(F.cross_entropy(learner(x), y))
        return list(learner.parameters())

    return torch_loop(work, local)


def higher(work: Arrays) -> Any:
    import higher as library
    import torch
    import torch.nn.functional as F

    def local(model: Any, batches: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with library.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fast, fast_optimizer):
            for x, y in batches:
                fast_optimizer.step(F.cross_entropy(fast(x), y))
            return [value.detach() for value in fast.parameters()]

    return torch_loop(work, local)


def torchopt(work: Arrays) -> Any:
    import torch.nn.functional as F
    import torchopt as library
    from torch.func import functional_call

    def local(model: Any, batches: Any) -> Any:
        phi = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
        optimizer = library.FuncOptimizer(library.sgd(lr=LR))
        for x, y in batches:
            phi = optimizer.step(F.cross_entropy(functional_call(model, phi, (x,)), y), phi)
            phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
        return list(phi.values())

    return torch_loop(work, local)


def pfl(work: Arrays) -> Any:
    """Return the side of pfl-research: FederatedAveraging and the simulated backend, round by round, without evaluations."""
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.algorithm_utils import run_train_eval
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel
    from torch import nn

    torch.set_num_threads(1)
    features, classes = work["x"].shape[-1], len(work["5.bias"])
    size = work["rows"].shape[-1]
    x, y = torch.from_numpy(work["x"]), torch.from_numpy(work["y"])

    class Perceptron(nn.Sequential):
        def loss(self, x: Any, y: Any) -> Any:
            return F.cross_entropy(self(x), y)

        def metrics(self, x: Any, y: Any) -> Any:
            return {}

    hidden = [nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    module = Perceptron(nn.Flatten(), *hidden)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    algorithm = FederatedAveraging()
    # An `evaluation_frequency` that no round is a multiple of.
    params = NNAlgorithmParams(10**9, 10**9, train_cohort_size=len(work["clients"][0]), val_cohort_size=0)
    train = NNTrainHyperParams(local_batch_size=size, local_num_epochs=1, local_learning_rate=LR)

    def begin() -> Any:
        module.load_state_dict({name: torch.from_numpy(value) for name, value in start(work).items()})
        return module

    def one_round(_: Any, number: int) -> Any:
        each = zip(work["clients"][number], torch.from_numpy(minibatches(work, number)), strict=True)
        cohort = iter([Dataset([x[k, rows.flatten()], y[k, rows.flatten()]], user_id=str(k)) for k, rows in each])
        data = FederatedDataset(lambda dataset: dataset, lambda: next(cohort))
        contexts, _, _ = algorithm.get_next_central_contexts(model, number + 1, params, train)
        [(statistics, metrics)] = run_train_eval(algorithm, SimulatedBackend(data, data), model, contexts)
        algorithm.process_aggregated_statistics_from_all_contexts(((contexts[0], statistics),), metrics, model)
        return module

    return begin, one_round, lambda module: to_numpy(dict(module.named_parameters()))


def jax_loss(theta: Any, x: Any, y: Any) -> Any:
    import jax

    h = jax.nn.relu(x @ theta["1.weight"].T + theta["1.bias"])
    h = jax.nn.relu(h @ theta["3.weight"].T + theta["3.bias"])
    logits = jax.nn.log_softmax(h @ theta["5.weight"].T + theta["5.bias"])
    return -logits[jax.numpy.arange(len(y)), y].mean()


def jax_side(work: Arrays, draw: Callable[[Arrays, int], np.ndarray] = minibatches) -> Any:
    """Return the side with jit(vmap(scan)) over the clients of a round."""
    import jax

    x, y = work["x"], work["y"].astype(np.int32)

    def local(theta: Any, x: Any, y: Any, rows: Any) -> Any:
        def step(phi: Any, row: Any) -> Any:
            gradient = jax.grad(jax_loss)(phi, x[row], y[row])
            return jax.tree.map(lambda value, g: value - LR * g, phi, gradient), None

        return jax.lax.scan(step, theta, rows)[0]

    @jax.jit  # type: ignore[untyped-decorator]
    def together(theta: Any, x: Any, y: Any, rows: Any) -> Any:
        ends = jax.vmap(local, in_axes=(None, 0, 0, 0))(theta, x, y, rows)
        return jax.tree.map(lambda before, after: before + (after - before).mean(axis=0), theta, ends)

    def one_round(theta: Any, number: int) -> Any:
        chosen = work["clients"][number]
        return jax.block_until_ready(together(theta, x[chosen], y[chosen], draw(work, number).astype(np.int32)))

    return lambda: start(work), one_round, lambda theta: {name: np.asarray(value) for name, value in theta.items()}


def jax_given(work: Arrays) -> Any:
    """Return the side of `jax_side` with minibatches drawn in advance."""
    return jax_side(work, lambda work, number: work["rows"][number])


def fedjax(work: Arrays) -> Any:
    """Return the side of FedJAX: `for_each_client` with its backend for one device, compiled.

    Batches come in the given order.
    """
    import fedjax as library
    import jax

    x, y = work["x"], work["y"].astype(np.int32)

    def step(phi: Any, batch: Any) -> Any:
        gradient = jax.grad(jax_loss)(phi, batch["x"], batch["y"])
        return jax.tree.map(lambda value, g: value - LR * g, phi, gradient)

    with library.for_each_client_backend("jit"):
        each = library.for_each_client(lambda theta, _: theta, step, lambda theta, phi: phi)

    def one_round(theta: Any, number: int) -> Any:
        chosen = zip(work["clients"][number], minibatches(work, number), strict=True)
        clients: list[Any] = [(k, [{"x": x[k, row], "y": y[k, row]} for row in rows], {}) for k, rows in chosen]
        ends = [end for _, end in each(theta, clients)]
        return jax.block_until_ready(jax.tree.map(lambda *values: sum(values) / len(values), *ends))

    return lambda: start(work), one_round, lambda theta: {name: np.asarray(value) for name, value in theta.items()}


# Few-shot learning: a client's first SHOTS rows are its support, the next its query.


def shots(work: Arrays, number: int) -> list[np.ndarray]:
    """Return the support's inputs and labels, then the query's, of all clients of a round."""
    some = [slice(0, SHOTS), slice(SHOTS, 2 * SHOTS)]
    chosen = work["clients"][number]
    return [work[key][chosen, rows] for rows in some for key in ("x", "y")]


def few_shot_engine(name: str) -> Callable[[Arrays], Any]:
    """Return this project's side of `maml` or `protonet`."""

    def side(work: Arrays) -> Any:
        import torch

        from quickbloom.common.algorithms import ALGORITHMS
        from quickbloom.common.engine.round import TaskWork, run_round
        from quickbloom.common.maths.batch import Batch, TaskData
        from quickbloom.common.maths.learner import Learner
        from quickbloom.common.maths.params import add
        from quickbloom.common.models.mlp import perceptron
        from quickbloom.common.randomness import generator

        torch.set_num_threads(1)
        chosen, classes = ALGORITHMS[name], len(work["5.bias"])
        settings = {"inner_lr": LR, "inner_steps": META_STEPS, "embedding": classes}
        options = chosen.Options.model_validate({key: v for key, v in settings.items() if key in chosen.Options.model_fields})
        model = perceptron((work["x"].shape[-1], 64, 64, classes))
        algorithm = chosen(options, Learner(model, "classification", classes))

        tasks = []
        for x, y in zip(torch.from_numpy(work["x"]), torch.from_numpy(work["y"]), strict=True):
            support, query = (Batch.of(x[rows], y[rows]) for rows in (slice(0, SHOTS), slice(SHOTS, 2 * SHOTS)))
            tasks.append(TaskData(support, query, query))

        def one_round(theta: Any, number: int) -> Any:
            chosen = [TaskWork(tasks[k], generator(0, "peers", number, int(k))) for k in work["clients"][number]]
            return add(theta, run_round(algorithm, theta, chosen, chunk_size=128).gradient, -META_LR)

        return lambda: {n: torch.from_numpy(v) for n, v in start(work).items()}, one_round, to_numpy

    return side


def few_shot_jax(objective: Callable[..., Any]) -> Callable[[Arrays], Any]:
    """Return the side with jit(vmap(grad)) of an objective of theta and one client's shots."""

    def side(work: Arrays) -> Any:
        import jax

        @jax.jit  # type: ignore[untyped-decorator]
        def together(theta: Any, *parts: Any) -> Any:
            slopes = jax.vmap(jax.grad(objective), in_axes=(None, 0, 0, 0, 0))(theta, *parts)
            return jax.tree.map(lambda value, slope: value - META_LR * slope.mean(axis=0), theta, slopes)

        def one_round(theta: Any, number: int) -> Any:
            parts = [values.astype(np.int32) if values.dtype == np.int64 else values for values in shots(work, number)]
            return jax.block_until_ready(together(theta, *parts))

        return lambda: start(work), one_round, lambda theta: {name: np.asarray(value) for name, value in theta.items()}

    return side


def jax_maml(theta: Any, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
    import jax

    def step(phi: Any, _: Any) -> Any:
        return jax.tree.map(lambda value, g: value - LR * g, phi, jax.grad(jax_loss)(phi, x, y)), None

    return jax_loss(jax.lax.scan(step, theta, None, length=META_STEPS)[0], query_x, query_y)


def jax_protonet(theta: Any, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
    """Cross-entropy over squared distances to the class means; classes without support are left out."""
    import jax
    import jax.numpy as jnp

    def embedded(x: Any) -> Any:
        h = jax.nn.relu(x @ theta["1.weight"].T + theta["1.bias"])
        h = jax.nn.relu(h @ theta["3.weight"].T + theta["3.bias"])
        return h @ theta["5.weight"].T + theta["5.bias"]

    members = jax.nn.one_hot(y, len(theta["5.bias"]))
    counts = members.sum(axis=0)
    prototypes = members.T @ embedded(x) / jnp.maximum(counts, 1)[:, None]
    gaps = ((embedded(query_x)[:, None] - prototypes) ** 2).sum(axis=-1)
    logits = jax.nn.log_softmax(jnp.where(counts > 0, -gaps, -1e30))
    weight = (counts > 0)[query_y]
    return -(jnp.where(weight, logits[jnp.arange(len(query_y)), query_y], 0.0)).sum() / jnp.maximum(weight.sum(), 1)


SIDES: dict[str, Callable[[Arrays], Any]] = {
    "engine": engine,
    "plain-optim": plain_optim,
    "plain-grad": plain_grad,
    "learn2learn": learn2learn,
    "higher": higher,
    "torchopt": torchopt,
    "pfl": pfl,
    "jax": jax_side,
    "jax-given": jax_given,
    "fedjax": fedjax,
    "engine-maml": few_shot_engine("maml"),
    "jax-maml": few_shot_jax(jax_maml),
    "engine-protonet": few_shot_engine("protonet"),
    "jax-protonet": few_shot_jax(jax_protonet),
}


if __name__ == "__main__":
    main()
