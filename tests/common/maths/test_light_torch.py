"""torch.func without torch's compiler: the same gradients, and the compiler is there as soon as something asks for it."""

import subprocess
import sys

import pytest

BEGIN = """
import sys
import torch
from torch.func import grad, hessian, vmap
from quickbloom.common.maths.light_torch import spare_the_compiler

def f(x):
    return (x**3).sum()

x = torch.arange(3.0)
"""
LIGHT = """
spare_the_compiler()
print(grad(f)(x).tolist(), vmap(grad(grad(lambda y: y**3)))(x).tolist(), "torch._dynamo" in sys.modules)
"""


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_gradients_need_no_compiler() -> None:
    # f' = 3 x^2, and the second derivative of y^3 is 6 y
    assert said(LIGHT) == "[0.0, 3.0, 12.0] [0.0, 6.0, 12.0] False"


@pytest.mark.parametrize(
    "use",
    [
        "import torch._dynamo",
        "torch._dynamo.config.suppress_errors = False",
        "torch._dynamo.compiled_autograd.reset()",
        "import torch._dynamo.compiled_autograd",
        "torch._dynamo.nothing_of_this_name = 3; assert sys.modules['torch._dynamo'].nothing_of_this_name == 3",
        "torch.compile(f, backend='eager')(x)",
        "torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1).step()",
    ],
)
def test_the_compiler_is_imported_for_whoever_uses_it(use: str) -> None:
    code = f"{LIGHT}\n{use}\nassert torch._dynamo is sys.modules['torch._dynamo']\nprint(grad(f)(x).tolist())"
    assert said(code).splitlines()[1] == "[0.0, 3.0, 12.0]"


def test_a_compiler_that_is_there_is_left_alone() -> None:
    code = "import torch._dynamo\nspare_the_compiler()\nassert torch._dynamo is sys.modules['torch._dynamo']"
    assert said(code + "\nprint(grad(f)(x).tolist())") == "[0.0, 3.0, 12.0]"


def test_a_run_in_process_imports_no_compiler(tmp_path: object) -> None:
    code = """
sys.argv = ["quickbloom", "run", "--algorithm", "maml", "--dataset", "gaussian", "--set", "gaussian.clients=8"]
sys.argv += ["--rounds", "2", "--no-report", "--json", "--output", sys.argv[0] + "PLACE"]
from quickbloom.server_app.cli.main import main
try:
    main()
finally:
    print("torch._dynamo" in sys.modules)
""".replace('sys.argv[0] + "PLACE"', repr(f"{tmp_path}/run"))
    assert said(code).splitlines()[-1] == "False"
