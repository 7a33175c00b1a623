"""One script per published claim: `python -m benchmarks.digits`, and so on. Results are in `benchmarks/results`."""

from quickbloom.common.system import surroundings

surroundings.speak_utf8()  # they print ± and names of tasks, whatever the locale
