"""One script per published claim, such as `python -m benchmarks.digits`. Results are in `benchmarks/results`."""

from quickbloom.common.system import surroundings

surroundings.speak_utf8()  # the scripts print ± and names of tasks, whatever the locale
