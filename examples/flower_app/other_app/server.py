"""The ServerApp: quickbloom's roll call and strategy, and what this app makes of the result."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.assemble import build_algorithm
from common.config import parse_run_config
from common.wire import to_arrays
from server_app.outer import OuterOptimizer
from server_app.polling import PollingGrid
from server_app.rollcall import call_roll
from server_app.strategy import MetaStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = parse_run_config(context.run_config).resolved()
    grid = PollingGrid(grid)  # looks for replies more often than Flower's own grid
    population = call_roll(grid, config)
    algorithm = build_algorithm(config, population.spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    strategy = MetaStrategy(config, population, algorithm, outer)
    strategy.start(grid, to_arrays(outer.meta), num_rounds=config.rounds, timeout=config.round_deadline)
    rate, steps = strategy.chosen_rate()
    test = strategy.score_tasks(grid, outer.meta, population.splits["test"], [rate])
    before, after = test.metrics[:, 0, 0].mean(), test.metrics[:, 0, steps].mean()
    print(f"{len(test.task_ids)} new users: accuracy {before:.3f} before, {after:.3f} after {steps} steps", flush=True)
