"""The ServerApp: quickbloom's roll call and strategy, and what this app makes of the result."""

from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.engine.build import build_algorithm, constants_of
from quickbloom.common.wire.messages import to_arrays
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.polling_grid import PollingGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = parse_run_config(context.run_config).resolved()
    grid = PollingGrid(grid)  # looks for replies more often than Flower's own grid
    population = call_roll(grid, config, constants_of=partial(constants_of, config))
    algorithm = build_algorithm(config, population.spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    strategy = MetaStrategy(config, population, algorithm, outer)
    strategy.start(grid, to_arrays(outer.meta), num_rounds=config.rounds, timeout=config.round_deadline)
    rate, steps = strategy.chosen_rate()
    test = strategy.score_tasks(grid, outer.meta, population.splits["test"], [rate])
    before, after = test.metrics[:, 0, 0].mean(), test.metrics[:, 0, steps].mean()
    print(f"{len(test.task_ids)} new users: accuracy {before:.3f} before, {after:.3f} after {steps} steps", flush=True)
