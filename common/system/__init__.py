"""The machine that runs the program: environment, addresses, processes, terminal."""
