"""The inner loop: gradient descent on a task's own examples, differentiable with respect to where it starts."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.func import grad

from common.batch import Batch
from common.params import Params, add

Loss = Callable[[Params, Batch], Tensor]


def descend(loss: Loss, start: Params, batches: Iterator[Batch], lr: float | Tensor) -> Iterator[Params]:
    """Yield phi_0 = start, then phi_{i+1} = phi_i - lr * grad loss(phi_i, batch_i) for every batch.

    Written with `torch.func`, so that a gradient taken through it is exact to any order. Plain SGD: state such as Adam's
    would have to be carried from task to task, which stateless clients cannot.
    """
    phi = start
    yield phi
    for batch in batches:
        phi = add(phi, grad(loss)(phi, batch), -lr)
        yield phi


def last(path: Iterator[Params]) -> Params:
    """The end of a path of parameters."""
    phi = next(path)
    for phi in path:  # noqa: B007 - the last one is the result
        pass
    return phi
