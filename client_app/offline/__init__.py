"""Offline use: adapt a checkpoint to one's own file, and predict with the personal model. For Python and the command.

    quickbloom.adapt("runs/r/checkpoints", "ward.csv", "mine")
    quickbloom.predict("mine", "new-patients.csv").rows

A checkpoint and a personal model describe their own model, classes and columns, so none of these
has to be given again.
"""
