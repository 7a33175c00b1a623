"""Builds the distribution `quickbloom-kernels`: the kernels compiled for machines that have no C++ compiler."""
